"""``farebox unresolved``: settles whose hold the store has lost and that nobody can be sure were never charged.

Knows options and tables; what charging means is the ledger's.
"""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from billing.ledger.ledger import Ledger
from billing.ledger.recovery import Kept
from billing.money import format_usd
from billing.usage import RequestId
from cluster.cli.books import JsonOption, ask, out, store
from cluster.cli.standing import Standing

app = typer.Typer(no_args_is_help=True, help="Records that only a person can decide about, after a lost store.")
Id = Annotated[str, typer.Argument(metavar="REQUEST", help="as `farebox unresolved list` shows it")]


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """Show them, oldest first, each with what it would cost and the reason."""
    kept = ask(_kept)
    if as_json:
        print(json.dumps([_kept_json(one) for one in kept], indent=2))
        return
    table = Table("request", "tenant", "status", "usd at most", "reason")
    table.columns[3].justify = "right"
    for one in kept:
        ended = one.settlement
        table.add_row(ended.request_id, ended.tenant, ended.status, f"${format_usd(ended.list_nanos)}", one.reason)
    out.print(table)


@app.command()
def charge(request: Id) -> None:
    """Charge one. First make sure that `farebox usage` and the archive know no record of it."""
    record = ask(lambda standing: _charge(standing, request))
    out.print(f"{request} is charged: {record}", highlight=False)


@app.command()
def drop(request: Id) -> None:
    """Forget one: it was charged before, or shall not be."""
    ask(lambda standing: _drop(standing, request))
    out.print(f"{request} is dropped", highlight=False)


async def _kept(standing: Standing) -> list[Kept]:
    async with store(standing) as redis:
        return await Ledger(redis).recovery.kept()


async def _charge(standing: Standing, request: str) -> str:
    async with store(standing) as redis:
        return (await Ledger(redis).recovery.charge(RequestId(request))).record.record_id


async def _drop(standing: Standing, request: str) -> None:
    async with store(standing) as redis:
        await Ledger(redis).recovery.drop(RequestId(request))


def _kept_json(one: Kept) -> dict[str, object]:
    ended = one.settlement
    return {
        "request_id": ended.request_id,
        "tenant": ended.tenant,
        "status": ended.status,
        "list_nanos": ended.list_nanos,
        "usage": asdict(ended.usage),
        "reason": one.reason,
        "kept_at_ms": one.at_ms,
    }
