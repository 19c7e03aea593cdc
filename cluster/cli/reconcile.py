"""``farebox reconcile``: the ledger compared with the journal, with open holds and with Dodo's sums."""

import asyncio
from dataclasses import asdict
from typing import Annotated

import typer

from billing.dodo.belonging import refuse_other
from billing.dodo.call_budget import CallBudget, SharedBudget
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.reconcile.proofs import Row
from billing.reconcile.reconciler import Reconciler, Report
from billing.reports import history
from cluster.cli.output import JsonOption, Table, err, out, print_json, table
from cluster.cli.target import Target
from cluster.local.settings import Settings

DIFFERENT, UNPROVEN = 1, 2
"""Exit codes: there is a difference; there is none, but not everything could be compared."""
SHOWN_MAX = 50


def reconcile(
    as_json: JsonOption = False,
    with_dodo: Annotated[bool, typer.Option("--dodo/--no-dodo", help="Compare with Dodo's own sums.")] = True,
    calls_per_minute: Annotated[
        int, typer.Option(min=1, help="How many calls to Dodo at most; the export needs some of Dodo's limit.")
    ] = 60,
    is_full: Annotated[
        bool, typer.Option("--full", help="Read closed days again that an earlier run has compared.")
    ] = False,
) -> None:
    """Compare entries, credit, holds, exposure, export and Dodo's sums, to the nano-dollar.

    Exit code 0 without a difference, 1 with one, 2 if not everything could be compared. The store remembers which
    closed days were right, so that the next run skips them.
    """
    report = asyncio.run(_reconcile(Target.find(Settings.from_env()), with_dodo, calls_per_minute, is_full))
    if as_json:
        print_json(
            {
                "is_clean": report.is_clean,
                "proofs": [asdict(line) for line in report.summary()],
                "drift": [asdict(row) | {"difference": row.difference} for row in report.faults],
                "unproven": list(report.unproven),
            }
        )
    else:
        _print(report)
    if report.faults:
        raise typer.Exit(DIFFERENT)
    raise typer.Exit(UNPROVEN if report.unproven else 0)


async def _reconcile(target: Target, with_dodo: bool, calls_per_minute: int, is_full: bool) -> Report:
    dodo = Dodo(DodoSettings.from_env(target.environment)) if with_dodo else None
    try:
        async with target.store() as redis:
            if dodo is not None:
                await refuse_other(redis, target.dodo_environment)
            archive = await history.archive_of(redis)
            budget = CallBudget(calls_per_minute, within=SharedBudget(redis))
            return await Reconciler(redis, dodo, archive, budget, is_full=is_full).run()
    finally:
        if dodo is not None:
            await dodo.close()


def _print(report: Report) -> None:
    numbers = ("expected", "found", "difference")
    rows = table("proof", "of", "unit", *numbers, right=numbers, title="reconciliation")
    for line in report.summary():
        difference = f"{line.wrong} wrong" if line.wrong else "0"
        cells = (line.proof, str(line.rows), line.unit, str(line.expected), str(line.found), difference)
        rows.add_row(*cells, style="bold red" if line.wrong else "")
    out.print(rows)
    if report.faults:
        out.print(_differences(report.faults))
    for reason in report.unproven:
        err.print(f"not compared: {reason}")
    if report.is_clean:
        out.print("every proof holds to the nano")


def _differences(faults: tuple[Row, ...]) -> Table:
    numbers = ("expected", "found", "difference")
    rows = table("proof", "tenant", *numbers, "at fault", right=numbers, prose=("at fault",), title="differences")
    for row in faults[:SHOWN_MAX]:
        cells = (row.proof, row.tenant, str(row.expected), str(row.found), f"{row.difference:+d}", row.named)
        rows.add_row(*cells, style="red")
    if len(faults) > SHOWN_MAX:
        rows.caption = f"and {len(faults) - SHOWN_MAX} more: --json shows all"
    return rows
