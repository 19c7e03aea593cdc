"""``farebox webhooks list`` and ``replay``: deliveries that could not be applied, and another try.

Knows options and tables; what applying means is billing's.
"""

import json
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table

from billing.clock import now_ms
from billing.commerce.inbox import Delivery, Inbox
from cluster.cli.books import JsonOption, ask, err, out, store
from cluster.cli.standing import Standing

MAX_LISTED = 10_000

app = typer.Typer(no_args_is_help=True, help="Webhooks from Dodo Payments that wait to be applied.")


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """Show deliveries that wait, each with its reason and how often it was tried."""
    parked = ask(_parked)
    if as_json:
        print(json.dumps([_delivery_json(delivery) for delivery in parked], indent=2))
        return
    table = Table("id", "type", "received", "attempts", "reason")
    for one in parked:
        table.add_row(one.id, one.type, _moment(one.received_at_ms), str(one.attempts), one.reason or "not tried yet")
    out.print(table)


@app.command()
def replay(
    id_: Annotated[str, typer.Argument(metavar="ID", help="of one delivery, as `farebox webhooks list` shows it")] = "",
    every: Annotated[bool, typer.Option("--all", help="all of them")] = False,
) -> None:
    """Try deliveries again now instead of when they are due. First mend what the reason says."""
    if bool(id_) == every:
        raise typer.BadParameter("give the id of one delivery, or --all")
    known = [one.id for one in ask(_parked)]
    chosen = known if every else [one for one in known if one == id_]
    if id_ and not chosen:
        err.print(f"[bold red]farebox:[/] no delivery {id_} waits: see `farebox webhooks list`", highlight=False)
        raise typer.Exit(1)
    ask(lambda standing: _reschedule(standing, chosen))
    out.print(f"the billing actor tries {len(chosen)} of {len(known)} again within seconds")


async def _parked(standing: Standing) -> list[Delivery]:
    async with store(standing) as redis:
        return await Inbox(redis).parked(limit=MAX_LISTED)


async def _reschedule(standing: Standing, webhook_ids: list[str]) -> None:
    async with store(standing) as redis:
        await Inbox(redis).reschedule(webhook_ids, now_ms())


def _moment(ms: int) -> str:
    return datetime.fromtimestamp(ms // 1_000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _delivery_json(one: Delivery) -> dict[str, object]:
    return {
        "id": one.id,
        "type": one.type,
        "received_at_ms": one.received_at_ms,
        "attempts": one.attempts,
        "reason": one.reason,
    }
