"""``farebox webhooks``: webhooks from Dodo that could not be applied yet, or are about what is not ours."""

from typing import Annotated

import typer
from pydantic import TypeAdapter
from redis.asyncio import Redis

from billing.clock import now_ms
from billing.commerce.alerts import payment_of
from billing.commerce.decisions import Booking, Decisions
from billing.commerce.inbox import Delivery, Inbox, Outcome
from billing.ledger.account import out_of_bounds
from billing.money import MAX_GRANT_NANOS, AmountError, parse_usd
from billing.tenants.tenant import Reason
from billing.usage import TenantId, Unit
from cluster.cli.output import JsonOption, dollars, fail, out, print_json, table, utc
from cluster.cli.target import with_store
from cluster.cli.tenants import check_value

LISTED_MAX = 10_000

app = typer.Typer(no_args_is_help=True, help="Webhooks from Dodo Payments that wait or are set aside.")
Id = Annotated[str, typer.Argument(metavar="ID", help="Of a webhook, from `farebox webhooks list`.")]


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """Show the webhooks that wait, and those set aside because they are about products that are not farebox's."""
    found = with_store(_unfinished)
    if as_json:
        names = ("id", "type", "received_at_ms", "outcome", "attempts", "reason")
        print_json([{**{name: getattr(one, name) for name in names}, **payment_of(one)} for one in found])
        return
    rows = table("id", "type", "received, UTC", "state", "attempts", "reason", right=("attempts",))
    for one in found:
        state, reason = one.outcome.replace("_", " "), one.reason or "not tried yet"
        rows.add_row(one.id, one.type, utc(one.received_at_ms), state, str(one.attempts), reason)
    out.print(rows)


@app.command()
def replay(
    id_: Annotated[str, typer.Argument(metavar="ID", help="Of a webhook, from `farebox webhooks list`.")] = "",
    every: Annotated[bool, typer.Option("--all", help="Apply all that wait.")] = False,
) -> None:
    """Apply webhooks now instead of at their next attempt. First fix what the reason says."""
    if bool(id_) == every:
        raise typer.BadParameter("give either the id of a webhook or --all")
    found = with_store(_unfinished)
    chosen = [one.id for one in found if one.id == id_ or (every and one.outcome is Outcome.WAITING)]
    if id_ and not chosen:
        fail(f"no webhook with the id {id_} waits or is set aside: `farebox webhooks list` lists them")
    with_store(lambda redis: Inbox(redis).reschedule(chosen, now_ms()))
    out.print(f"the billing actor tries {len(chosen)} of {len(found)} webhooks again within seconds")


@app.command()
def drop(
    id_: Id,
    reason: Annotated[str, typer.Option(help="Why it is never applied. It is kept in a notice.")],
) -> None:
    """End a webhook without applying it, such as a payment for something else that you sell."""
    if not reason.strip():
        raise typer.BadParameter("say why it is never applied", param_hint="--reason")
    check_value("reason: give at most 500 characters without line breaks or tabs", TypeAdapter(Reason), reason.strip())
    dropped = with_store(lambda redis: Decisions(redis).drop(id_, reason.strip()))
    out.print(f"{dropped.id} ({dropped.type}) is dropped: it moves nothing, and is not tried again")


@app.command()
def book(
    id_: Id,
    tenant: Annotated[str, typer.Option(metavar="TENANT", help="Who gets the credit.")],
    usd: Annotated[str, typer.Option(help='US dollars, such as "12.50".')] = "",
    requests: Annotated[int, typer.Option(min=0, help="Or a number of requests of any length.")] = 0,
    adapters: Annotated[
        list[str] | None, typer.Option("--adapter", help="Which adapter the requests are for; may be repeated.")
    ] = None,
    expires_days: Annotated[int, typer.Option(min=0, max=3650, help="Days until it expires; 0 for never.")] = 0,
) -> None:
    """Grant credit for a payment that waits or is set aside, once. Its refunds and disputes take it back."""
    if bool(usd) == bool(requests) or (usd and adapters):
        raise typer.BadParameter("give either --usd or --requests, and --adapter only with --requests")
    try:
        unit, amount = (Unit.NANOS, int(parse_usd(usd, MAX_GRANT_NANOS))) if usd else (Unit.REQUESTS, requests)
    except AmountError as error:
        raise typer.BadParameter(str(error), param_hint="--usd") from error
    if not 0 < amount <= MAX_GRANT_NANOS:
        raise typer.BadParameter(out_of_bounds(unit, amount), param_hint=f"--{'usd' if usd else 'requests'}")
    booking = Booking(TenantId(tenant), unit, amount, expires_days, tuple(adapters or ()))
    booked = with_store(lambda redis: Decisions(redis).book(id_, booking))
    what = dollars(booked.amount) if booked.unit is Unit.NANOS else f"{booked.amount} requests"
    out.print(f"{id_} is booked: {tenant} has {what} for it ({booked.source})")


async def _unfinished(redis: Redis) -> list[Delivery]:
    return await Inbox(redis).unfinished(limit=LISTED_MAX)
