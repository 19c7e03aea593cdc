"""``farebox demo``: scripted stories on a throw-away store and sandbox, shown as tables. No farebox need run.

Knows words and tables; what happens stands in ``cluster.demo``.
"""

import asyncio
import tempfile
from collections import Counter
from pathlib import Path

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cluster.demo.stage import StoryStuck
from cluster.demo.year import Row, Year, play
from cluster.valkey import StoreError

app = typer.Typer(no_args_is_help=True, help="Scripted stories on a throw-away store and sandbox.")
out = Console()
err = Console(stderr=True)

MONEY = ("balance", "owed", "to charge", "covered", "invoiced", "refunded")
WIDTH = 150
"""A table cut to a narrow screen says nothing: there it wraps."""


@app.callback()
def stories() -> None:
    """Scripted stories on a throw-away store and sandbox."""


@app.command()
def year() -> None:
    """Play a tenant's year: free, packs, a failing card, subscriptions, dunning, a refund, disputes, the end."""
    try:
        with tempfile.TemporaryDirectory(prefix="fbx-") as folder, out.status("playing a year") as status:
            played = asyncio.run(play(Path(folder), lambda row: status.update(f"{row.day}  {row.what}")))
    except (StoreError, StoryStuck) as error:
        err.print(f"[red]{error}[/red]")
        raise typer.Exit(1) from None
    Console(width=max(out.width, WIDTH)).print(_table(played.rows))
    out.print(f"the owner was told: {_counted(played.notices)}", highlight=False)
    _close(played)


def _table(rows: tuple[Row, ...]) -> Table:
    table = Table("2027", "what", "status", "ran", "refused, by", *MONEY, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in table.columns:
        column.no_wrap = True
    for column in (table.columns[3], *table.columns[5:]):
        column.justify = "right"
    for row in rows:
        money = (row.balance, row.owed, row.told_charge, row.told_covered, row.invoiced, row.refunded)
        refused = f"{row.refused}  {row.why.partition('(')[2].rstrip(')')}" if row.refused else ""
        table.add_row(row.day, row.what, row.status, str(row.admitted or ""), refused, *money)
    return table


def _counted(notices: tuple[str, ...]) -> str:
    return ", ".join(f"{kind} x {times}" for kind, times in Counter(notices).items())


def _close(played: Year) -> None:
    """Exit code 1 where the books do not agree."""
    if played.report.is_clean:
        out.print(f"[green]{len(played.report.rows)} proofs of the books, Dodo's included: no difference[/green]")
        return
    for problem in (*played.report.unproven, *map(str, played.report.faults)):
        err.print(f"[red]{problem}[/red]")
    raise typer.Exit(1)
