"""``farebox unresolved``: settlements whose hold the store has lost; a person decides whether to charge them."""

from dataclasses import asdict
from typing import Annotated

import typer

from billing.ledger.ledger import Ledger
from billing.usage import RequestId
from cluster.cli.output import JsonOption, dollars, out, print_json, table
from cluster.cli.target import with_store

app = typer.Typer(no_args_is_help=True, help="Settlements that the store cannot decide about after it lost data.")
Id = Annotated[str, typer.Argument(metavar="REQUEST", help="A request id, from `farebox unresolved list`.")]


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """Show them, oldest first, each with the highest possible charge and the reason."""
    unresolved = with_store(lambda redis: Ledger(redis).recovery.kept())
    if as_json:
        print_json(
            [
                {
                    "request_id": one.settlement.request_id,
                    "tenant": one.settlement.tenant,
                    "status": one.settlement.status,
                    "list_nanos": one.settlement.list_nanos,
                    "usage": asdict(one.settlement.usage),
                    "reason": one.reason,
                    "kept_at_ms": one.at_ms,
                }
                for one in unresolved
            ]
        )
        return
    rows = table("request", "tenant", "status", "usd at most", "reason", right=("usd at most",), prose=("reason",))
    for one in unresolved:
        settled = one.settlement
        rows.add_row(settled.request_id, settled.tenant, settled.status, dollars(settled.list_nanos), one.reason)
    out.print(rows)


@app.command()
def charge(request: Id) -> None:
    """Charge one. First check that neither `farebox usage` nor the archive has a record of it."""
    settled = with_store(lambda redis: Ledger(redis).recovery.charge(RequestId(request)))
    out.print(f"{request} is charged: {settled.record.record_id}")


@app.command()
def drop(request: Id) -> None:
    """Delete one without a charge, because it was charged before or should be free."""
    with_store(lambda redis: Ledger(redis).recovery.drop(RequestId(request)))
    out.print(f"{request} is dropped")
