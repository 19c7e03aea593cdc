"""What a file sells, made at Dodo: shown first, and in live mode asked for."""

import asyncio
from collections.abc import Mapping

import typer

from billing.commerce.sync import WEBHOOK, SyncReport
from billing.dodo.errors import DodoUnavailable
from cluster.cli.output import Table, out, table
from cluster.local.dodo_products import missing_products, sync_products
from cluster.local.environment import LIVE, SANDBOX
from cluster.local.launch import LaunchError
from cluster.serve_api import ServeConfig


def make_at_dodo(config: ServeConfig, env: Mapping[str, str], is_agreed: bool) -> SyncReport | None:
    """Create what Dodo lacks of what a file sells; ``None`` where nothing was created.

    Without an answer of Dodo nothing is compared, and a file is deployable if it sells only what was created before.

    Raises:
        LaunchError: nothing was created, and the file sells what Dodo has not; the reason says what to do.
        DodoRefused: Dodo's answer.
    """
    try:
        planned = sync_products(config, env, is_dry_run=True)
    except DodoUnavailable as error:
        if missing := asyncio.run(missing_products(config, env)):
            raise LaunchError(
                f"{error}; and this file sells what was not created there yet: {', '.join(missing)}. Deploy again "
                "when Dodo answers"
            ) from error
        out.print(f"not compared with Dodo: {error}")
        return None
    if not planned.created:
        return None
    out.print(sync_table(planned))
    _agree(env, is_agreed)
    created = sync_products(config, env)
    out.print(f"created at Dodo: {', '.join(created.created)}")
    if WEBHOOK in created.created and env.get("FAREBOX_DODO_ENVIRONMENT", SANDBOX) != SANDBOX:
        out.print("set DODO_PAYMENTS_WEBHOOK_KEY to the secret that Dodo's dashboard shows for this webhook")
    return created


def _agree(env: Mapping[str, str], is_agreed: bool) -> None:
    """In live mode, ask. Raises typer.Abort for a no, and where there is no answer."""
    if env.get("FAREBOX_DODO_ENVIRONMENT") == LIVE and not is_agreed:
        typer.confirm("This is Dodo's live mode. Create them? (--yes says yes beforehand)", abort=True)


def sync_table(report: SyncReport) -> Table:
    """What is created, and why it takes the place of what was sold until now."""
    rows = table("at Dodo", "state", "until now", "from now on", prose=("state",))
    for name in report.created:
        differences = [one for one in report.drift if one.name == name]
        if not differences:
            rows.add_row(name, "to be created")
        for one in differences:
            rows.add_row(name, f"to be created anew, for its {one.what}", one.theirs, one.ours, style="yellow")
    for name in report.found:
        rows.add_row(name, "exists")
    return rows
