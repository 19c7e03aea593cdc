"""``farebox demo``: simulations on a temporary store and Dodo sandbox, which need no running farebox."""

import asyncio
import tempfile
from collections import Counter
from pathlib import Path

import typer
from rich.text import Text

from cluster.cli.output import Table, err, out, table
from cluster.demo.year import Row, run_year

app = typer.Typer(no_args_is_help=True, help="Simulations on a temporary store and Dodo sandbox.")


@app.callback()
def simulations() -> None:
    """Simulations on a temporary store and Dodo sandbox."""


@app.command()
def year() -> None:
    """Simulate a tenant's year: free plan, packs, a declined card, subscriptions, dunning, a refund, disputes.

    Exit code 1 if the reconciliation at the end finds a difference.
    """
    with tempfile.TemporaryDirectory(prefix="fbx-") as folder, out.status("simulating a year") as status:
        simulated = asyncio.run(run_year(Path(folder), lambda row: status.update(f"{row.day}  {row.what}")))
    out.print(_table(simulated.rows))
    notices = ", ".join(f"{kind} x {times}" for kind, times in Counter(simulated.notices).items())
    out.print(f"notices: {notices}")
    report = simulated.report
    if report.is_clean:
        out.print(Text(f"{len(report.rows)} proofs of the ledger and of Dodo's sums: no difference", style="green"))
        return
    for problem in (*report.unproven, *map(str, report.faults)):
        err.print(Text(problem, style="red"))
    raise typer.Exit(1)


def _table(rows: tuple[Row, ...]) -> Table:
    money = ("balance", "exposure", "to charge", "covered", "invoiced", "refunded")
    columns = ("2027", "what", "status", "admitted", "refused, by", *money)
    made = table(*columns, right=("admitted", *money), prose=("what", "refused, by"))
    for row in rows:
        refused = f"{row.refused}  {row.refusal.partition('(')[2].rstrip(')')}" if row.refused else ""
        amounts = (row.balance, row.exposure, row.exported_charge, row.exported_covered, row.invoiced, row.refunded)
        made.add_row(row.day, row.what, row.status, str(row.admitted or ""), refused, *amounts)
    return made
