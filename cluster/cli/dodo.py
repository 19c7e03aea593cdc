"""``farebox dodo``: products created at Dodo, dead letters, and whether Dodo behaves as farebox expects.

Also ``farebox dodo-sandbox``, the Dodo sandbox by itself.
"""

import asyncio
import os
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from redis.asyncio import Redis
from rich.text import Text

from billing.dodo.contract import Contract, Finding
from billing.dodo.errors import DodoMisconfigured
from billing.dodo.settings import DodoSettings
from billing.export.events import SealedEvent
from billing.export.outbox import Outbox
from cluster.cli.lifecycle import ConfigOption
from cluster.cli.output import JsonOption, dollars, fail, out, print_json, table
from cluster.cli.selling import make_at_dodo, sync_table
from cluster.cli.target import Target, with_store
from cluster.dodo_sandbox.server import SandboxServer
from cluster.local import configuration
from cluster.local.dodo_products import sync_products
from cluster.local.environment import LIVE, SANDBOX
from cluster.local.settings import Settings
from cluster.local.state import Home

SANDBOX_CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(no_args_is_help=True, help="Products and usage at Dodo Payments.")


@app.command()
def sync(
    config: ConfigOption = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only show what would be created.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation, not even in live mode.")] = False,
) -> None:
    """Create the packs, plans, meter and webhook that Dodo lacks.

    Shows them first, and in live mode asks for confirmation. Nothing at Dodo is changed or deleted: where a price or a
    grant differs, a new product takes the place of the old one. A second run changes nothing.
    """
    target = Target.find(Settings.from_env(config=config))
    settings = target.settings if config is None else target.settings.model_copy(update={"config": config.absolute()})
    wanted = configuration.checked(settings)
    if plan:
        out.print(sync_table(sync_products(wanted, target.environment, is_dry_run=True)))
    elif make_at_dodo(wanted, target.environment, is_agreed=yes) is None:
        out.print("Dodo has everything that this file sells")


@app.command()
def dead(as_json: JsonOption = False) -> None:
    """Show the dead letters: usage events that Dodo rejected for good, oldest first, each with the reason."""
    letters = with_store(lambda redis: Outbox(redis).dead())
    if as_json:
        print_json(
            [
                {"id": one.id, "tenant": one.tenant, "event": one.name, "nanos": one.nanos, "reason": one.reason}
                for one in letters
            ]
        )
        return
    rows = table("id", "tenant", "event", "nanos", "usd", "reason", right=("nanos", "usd"), prose=("reason",))
    for one in letters:
        rows.add_row(one.id, one.tenant, one.name, str(one.nanos), dollars(one.nanos), one.reason)
    out.print(rows)


@app.command()
def revive(
    id_: Annotated[str, typer.Argument(metavar="ID", help="Of a dead letter, from `farebox dodo dead`.")] = "",
    every: Annotated[bool, typer.Option("--all", help="Send all dead letters again.")] = False,
) -> None:
    """Send dead letters again, with the same ids and quantities. First fix what the reason says."""
    if bool(id_) == every:
        raise typer.BadParameter("give either the id of a dead letter or --all")
    letters = with_store(lambda redis: Outbox(redis).dead())
    chosen = letters if every else [letter for letter in letters if letter.id == id_]
    if id_ and not chosen:
        fail(f"no dead letter has the id {id_}: `farebox dodo dead` lists them")
    revived = with_store(lambda redis: _revive(redis, chosen))
    out.print(f"{revived} of {len(letters)} dead letters are sent with the next export")


async def _revive(redis: Redis, letters: list[SealedEvent]) -> int:
    """How many this command revived: another command may have revived some."""
    return sum([await Outbox(redis).revive(replace(letter, reason="")) for letter in letters])


@app.command()
def verify(as_json: JsonOption = False) -> None:
    """Check that Dodo behaves as farebox expects, and show what differs. Refused in live mode.

    Checks a temporary sandbox; with FAREBOX_DODO_ENVIRONMENT=test_mode and a test key it checks the real Dodo, where
    the run leaves customers and events.
    """
    findings = _findings()
    if as_json:
        print_json([asdict(one) | {"held": one.has_held} for one in findings])
    else:
        rows = table("farebox expects", "found", "Dodo does instead", prose=("farebox expects", "Dodo does instead"))
        for one in findings:
            mark = Text("as expected", "green") if one.has_held else Text("differs", "red")
            rows.add_row(one.expectation, mark, one.difference)
        out.print(rows)
    raise typer.Exit(0 if all(one.has_held for one in findings) else 1)


def _findings() -> Sequence[Finding]:
    environment = os.environ.get("FAREBOX_DODO_ENVIRONMENT", "") or SANDBOX
    if environment == LIVE:
        raise DodoMisconfigured(
            "verify creates customers and events, so it refuses live_mode: set FAREBOX_DODO_ENVIRONMENT=test_mode "
            "and DODO_PAYMENTS_API_KEY to a test key"
        )
    if environment != SANDBOX or os.environ.get("DODO_PAYMENTS_BASE_URL"):
        return asyncio.run(contract_findings(DodoSettings.from_env(os.environ)))
    with tempfile.TemporaryDirectory() as folder, SandboxServer(Path(folder), "dodo_test_verify") as sandbox:
        return asyncio.run(contract_findings(DodoSettings(sandbox.api_key, base_url=sandbox.url)))


async def contract_findings(settings: DodoSettings) -> Sequence[Finding]:
    return await Contract(settings, f"farebox-verify-{secrets.token_hex(4)}").verify()


def dodo_sandbox(context: typer.Context) -> None:
    """Run the Dodo sandbox alone; takes the options of `python -m cluster.dodo_sandbox.server`."""
    from cluster.dodo_sandbox.server import main

    settings = Settings.from_env()
    home = Home.open(settings)
    defaults = ["--port", str(settings.sandbox_port), "--state", str(home.dodo)]
    defaults += ["--api-key", home.secrets().dodo_api_key, "--webhook-secret", home.secrets().webhook_secret]
    main([*defaults, *context.args])
