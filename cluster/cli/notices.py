"""``farebox notices``: events that the owner of a farebox is notified of."""

import json
from typing import Annotated

import typer

from billing.notices.log import Notices
from cluster.cli.output import JsonOption, out, print_json, table, utc
from cluster.cli.target import with_store


def notices(
    count: Annotated[int, typer.Option("-n", min=1, max=10_000, help="How many notices at most.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """Show the newest notices: allowances used up, low balances, failed payments, refunds, disputes and more."""
    found = with_store(lambda redis: Notices(redis).newest(count))
    if as_json:
        print_json([json.loads(notice.to_json()) for notice in found])
        return
    rows = table("time, UTC", "notice", "tenant", "facts", prose=("facts",))
    for notice in found:
        facts = ", ".join(f"{name} {value}" for name, value in notice.facts.items())
        rows.add_row(utc(notice.at_ms), notice.kind.value, notice.tenant, facts)
    out.print(rows)
