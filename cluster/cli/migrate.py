"""``farebox migrate``: bring a store that an earlier farebox wrote to this one's schema."""

from typing import Annotated

import typer
from rich.table import Table

from billing.store.connection import reach, verify_server
from billing.store.keys import SCHEMA
from billing.store.migrations import Migration
from billing.store.migrations import migrate as migrate_store
from cluster.cli.books import ask, err, out
from cluster.cli.standing import Standing


def migrate(
    is_dry: Annotated[bool, typer.Option("--dry-run", help="show what would be done and change nothing")] = False,
    ignore_unnamed: Annotated[
        bool, typer.Option("--ignore-unnamed", help="connections without a name are no farebox before 0.2")
    ] = False,
) -> None:
    """Bring the store of REDIS_URL to this version's schema, once every gateway is stopped.

    `farebox up` does this for the store that it starts. The command may be repeated, also after it was killed.
    """
    _print(ask(lambda standing: _migrate(standing, is_dry, ignore_unnamed)), is_dry)


async def _migrate(standing: Standing, is_dry: bool, ignore_unnamed: bool) -> Migration:
    redis = await reach(standing.store_url)
    try:
        await verify_server(redis, standing.terms["durability"])
        return await migrate_store(redis, is_dry, ignore_unnamed)
    finally:
        await redis.aclose()


def _print(done: Migration, is_dry: bool) -> None:
    if not done.is_needed:
        out.print(f"the store has schema {SCHEMA}" if done.found else "the store is new and needs no migration")
        return
    table = Table("values", "would change" if is_dry else "changed", title=f"schema {done.found} to {SCHEMA}")
    table.columns[1].justify = "right"
    for change in done.changes:
        table.add_row(change.what, str(change.count))
    out.print(table)
    for connection in done.connected:
        err.print(f"stop this first: {connection}", highlight=False, soft_wrap=True)
