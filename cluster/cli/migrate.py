"""``farebox migrate``: brings a store that an earlier version wrote to this version's schema."""

import asyncio
from typing import Annotated

import typer

from billing.store import migrations
from billing.store.connection import reach, verify_server
from billing.store.keys import SCHEMA
from billing.store.migrations import Migration
from cluster.cli.output import err, out, table
from cluster.cli.target import Target
from cluster.local.settings import Settings


def migrate(
    is_dry: Annotated[bool, typer.Option("--dry-run", help="Show what would be done and change nothing.")] = False,
    ignore_unnamed: Annotated[
        bool, typer.Option("--ignore-unnamed", help="Connections without a name are no farebox before 0.2.")
    ] = False,
) -> None:
    """Bring the store of REDIS_URL to this version's schema, once every gateway is stopped.

    `farebox up` does this for the store that it starts. The command may be repeated, also after it was killed.
    """
    done = asyncio.run(_migrate(Target.find(Settings.from_env()), is_dry, ignore_unnamed))
    if not done.is_needed:
        out.print(f"the store has schema {SCHEMA}" if done.found else "the store is new and needs no migration")
        return
    count = "would change" if is_dry else "changed"
    rows = table("values", count, right=(count,), title=f"schema {done.found} to {SCHEMA}")
    for change in done.changes:
        rows.add_row(change.what, str(change.count))
    out.print(rows)
    for connection in done.connected:
        err.print(f"stop this first: {connection}")


async def _migrate(target: Target, is_dry: bool, ignore_unnamed: bool) -> Migration:
    redis = await reach(target.store_url)
    try:
        await verify_server(redis, target.store_options["durability"])
        return await migrations.migrate(redis, is_dry, ignore_unnamed)
    finally:
        await redis.aclose()
