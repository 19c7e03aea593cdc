"""``farebox dodo verify``: is Dodo as our code expects it? Of the offline Dodo, or of the real one in test mode.

Knows which Dodo is asked and how to show the answer; what is asked stands in ``billing.dodo.contract``.
"""

import asyncio
import json
import os
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from billing.dodo.contract import Contract, Finding
from billing.dodo.errors import DodoMisconfigured
from billing.dodo.settings import DodoSettings
from cluster.cli.books import JsonOption
from cluster.dodo_sandbox.server import SandboxServer
from cluster.local.environment import LIVE, SANDBOX

out = Console()
err = Console(stderr=True)


def verify(as_json: JsonOption = False) -> None:
    """Ask Dodo for everything that farebox relies on, and show what differs. Never in live mode.

    With FAREBOX_DODO_ENVIRONMENT=test_mode and a test key the real Dodo is asked, where customers and events of the
    run stay; else a sandbox made for it.
    """
    try:
        findings = _asked(os.environ)
    except DodoMisconfigured as error:
        err.print(f"[red]{error}[/red]", highlight=False)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps([asdict(one) | {"held": one.has_held} for one in findings], indent=2))
    else:
        out.print(_table(findings))
    raise typer.Exit(0 if all(one.has_held for one in findings) else 1)


def _asked(environ: Mapping[str, str]) -> list[Finding]:
    environment = environ.get("FAREBOX_DODO_ENVIRONMENT", "") or SANDBOX
    if environment == LIVE:
        raise DodoMisconfigured("verify makes customers and events: it refuses live mode, use test_mode and its key")
    if environment != SANDBOX or environ.get("DODO_PAYMENTS_BASE_URL"):
        return asyncio.run(findings_of(DodoSettings.from_env(environ)))
    with tempfile.TemporaryDirectory() as folder, SandboxServer(Path(folder), "dodo_test_verify") as sandbox:
        return asyncio.run(findings_of(DodoSettings(sandbox.api_key, base_url=sandbox.url)))


async def findings_of(settings: DodoSettings) -> list[Finding]:
    return await Contract(settings, f"farebox-verify-{secrets.token_hex(4)}").verify()


def _table(findings: Sequence[Finding]) -> Table:
    table = Table("what farebox relies on", "", "what Dodo does instead")
    for one in findings:
        table.add_row(one.expectation, "[green]held[/green]" if one.has_held else "[red]differs[/red]", one.difference)
    return table
