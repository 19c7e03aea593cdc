"""``farebox notices``: what the owner should hear of, newest first. Knows a table; what is told is billing's."""

import json
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table

from billing.notices.log import Notices
from billing.notices.notice import Notice
from cluster.cli.books import JsonOption, ask, out, store
from cluster.cli.standing import Standing


def notices(
    count: Annotated[int, typer.Option("-n", min=1, max=10_000, help="at most so many")] = 50,
    as_json: JsonOption = False,
) -> None:
    """Show what happened that an owner wants to know: allowances used up, low balances, refills, failures."""
    found = ask(lambda standing: _newest(standing, count))
    if as_json:
        print(json.dumps([json.loads(notice.to_json()) for notice in found], indent=2))
        return
    table = Table("when, UTC", "what", "tenant", "facts")
    for notice in found:
        when = datetime.fromtimestamp(notice.at_ms // 1_000, UTC).strftime("%Y-%m-%d %H:%M:%S")
        facts = ", ".join(f"{name} {value}" for name, value in notice.facts.items())
        table.add_row(when, notice.kind.value, notice.tenant, facts)
    out.print(table)


async def _newest(standing: Standing, count: int) -> list[Notice]:
    async with store(standing) as redis:
        return await Notices(redis).newest(count)
