"""``farebox webhooks``: webhooks from Dodo that could not be applied yet."""

from typing import Annotated

import typer
from redis.asyncio import Redis

from billing.clock import now_ms
from billing.commerce.inbox import Delivery, Inbox
from cluster.cli.output import JsonOption, fail, out, print_json, table, utc
from cluster.cli.target import with_store

LISTED_MAX = 10_000

app = typer.Typer(no_args_is_help=True, help="Webhooks from Dodo Payments that could not be applied yet.")


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """Show the webhooks that wait, each with the reason and the number of attempts."""
    parked = with_store(_parked)
    if as_json:
        names = ("id", "type", "received_at_ms", "attempts", "reason")
        print_json([{name: getattr(one, name) for name in names} for one in parked])
        return
    rows = table("id", "type", "received, UTC", "attempts", "reason", right=("attempts",))
    for one in parked:
        rows.add_row(one.id, one.type, utc(one.received_at_ms), str(one.attempts), one.reason or "not tried yet")
    out.print(rows)


@app.command()
def replay(
    id_: Annotated[str, typer.Argument(metavar="ID", help="Of a webhook, from `farebox webhooks list`.")] = "",
    every: Annotated[bool, typer.Option("--all", help="Apply all of them.")] = False,
) -> None:
    """Apply webhooks now instead of at their next attempt. First fix what the reason says."""
    if bool(id_) == every:
        raise typer.BadParameter("give either the id of a webhook or --all")
    parked = [one.id for one in with_store(_parked)]
    chosen = parked if every else [one for one in parked if one == id_]
    if id_ and not chosen:
        fail(f"no webhook with the id {id_} waits: `farebox webhooks list` lists them")
    with_store(lambda redis: Inbox(redis).reschedule(chosen, now_ms()))
    out.print(f"the billing actor tries {len(chosen)} of {len(parked)} webhooks again within seconds")


async def _parked(redis: Redis) -> list[Delivery]:
    return await Inbox(redis).parked(limit=LISTED_MAX)
