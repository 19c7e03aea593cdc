"""``farebox reconcile`` and ``farebox usage``: the books proved, and what was used, in tables or JSON.

Knows options, tables and exit codes; every figure comes from ``billing``.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal, TypeVar

import typer
from redis.asyncio import Redis
from rich.console import Console
from rich.table import Table

from billing.clock import now_ms
from billing.dodo.call_budget import CallBudget, SharedBudget
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.errors import BillingError
from billing.money import format_usd
from billing.reconcile.proofs import Row
from billing.reconcile.reconciler import Reconciler, Report
from billing.reports import history
from billing.reports.history import Total
from billing.store.connection import connect
from billing.tenants.directory import Tenants
from billing.usage import TenantId
from cluster.cli.operate import NotRunning
from cluster.cli.standing import Standing
from cluster.local.settings import Settings, SettingsError

DRIFT, UNPROVEN = 1, 2
"""Exit codes: something differs; nothing differs, but not everything could be proved."""
MAX_SHOWN = 50
DAYS = 30

T = TypeVar("T")
JsonOption = Annotated[bool, typer.Option("--json", help="for programs")]
out = Console()
err = Console(stderr=True)


def reconcile(
    as_json: JsonOption = False,
    with_dodo: Annotated[bool, typer.Option("--dodo/--no-dodo", help="ask Dodo for its own sums")] = True,
    calls_per_minute: Annotated[int, typer.Option(min=1, help="to Dodo, at most; the pump needs the rest")] = 60,
    is_full: Annotated[bool, typer.Option("--full", help="read closed days too that were proved before")] = False,
) -> None:
    """Prove the books: entries, credit, holds, exposure, export and Dodo's sums. Exit 1 on one nano of drift.

    Closed days are read once; what is right is remembered in the store.
    """
    report = ask(lambda standing: _reconcile(standing, with_dodo, calls_per_minute, is_full))
    if as_json:
        print(json.dumps(_report_json(report), indent=2))
    else:
        _print_report(report)
    if report.faults:
        raise typer.Exit(DRIFT)
    raise typer.Exit(UNPROVEN if report.unproven else 0)


async def _reconcile(standing: Standing, with_dodo: bool, calls_per_minute: int, is_full: bool) -> Report:
    dodo = Dodo(DodoSettings.from_env(standing.environment)) if with_dodo else None
    try:
        async with store(standing) as redis:
            archive = await history.archive_of(redis)
            budget = CallBudget(calls_per_minute, within=SharedBudget(redis))
            return await Reconciler(redis, dodo, archive, budget, is_full=is_full).run()
    finally:
        if dodo is not None:
            await dodo.close()


def _print_report(report: Report) -> None:
    table = Table("proof", "of", "unit", "expected", "found", "difference", title="the books", title_justify="left")
    for column in table.columns[3:]:
        column.justify = "right"
    for line in report.summary():
        style = "bold red" if line.wrong else ""
        difference = f"{line.wrong} wrong" if line.wrong else "0"
        table.add_row(
            line.proof, str(line.rows), line.unit, str(line.expected), str(line.found), difference, style=style
        )
    out.print(table)
    if report.faults:
        out.print(_faults_table(report.faults))
    for reason in report.unproven:
        err.print(f"not proved: {reason}", highlight=False, soft_wrap=True)
    if report.is_clean:
        out.print("every proof holds to the nano")


def _faults_table(faults: tuple[Row, ...]) -> Table:
    table = Table("proof", "tenant", "expected", "found", "difference", "at fault", title="drift", title_justify="left")
    for row in faults[:MAX_SHOWN]:
        table.add_row(
            row.proof, row.tenant, str(row.expected), str(row.found), f"{row.difference:+d}", row.named, style="red"
        )
    if len(faults) > MAX_SHOWN:
        table.caption = f"and {len(faults) - MAX_SHOWN} more: --json shows all"
    return table


def _report_json(report: Report) -> dict[str, object]:
    """Amounts are whole nanos, requests or entries, as ``unit`` says."""
    return {
        "is_clean": report.is_clean,
        "proofs": [asdict(line) for line in report.summary()],
        "drift": [asdict(row) | {"difference": row.difference} for row in report.faults],
        "unproven": list(report.unproven),
    }


def usage(
    tenant: Annotated[str, typer.Option(help="one tenant only")] = "",
    since: Annotated[str, typer.Option(help="first day in UTC, 2026-11-23 (default: thirty days ago)")] = "",
    until: Annotated[str, typer.Option(help="last day in UTC (default: today)")] = "",
    group_by: Annotated[Literal["model", "day"], typer.Option("--by")] = "model",
    as_json: JsonOption = False,
) -> None:
    """Show what tenants used and what it cost, from the store and the archive together."""
    found = ask(lambda standing: _usage(standing, tenant, days(since, until), group_by))
    if as_json:
        rows = [{"tenant": name} | _total_json(total) for name, totals in found.items() for total in totals]
        print(json.dumps(rows, indent=2))
        return
    table = Table("tenant", group_by, "requests", "prompt", "cached", "completion", "list", "charged", "overage")
    for column in table.columns[2:]:
        column.justify = "right"
    for name, totals in found.items():
        for total in totals:
            counts = (total.requests, total.prompt_tokens, total.cached_tokens, total.completion_tokens)
            money = (total.list_nanos, total.charged_nanos, total.overage_nanos)
            table.add_row(name, total.group, *map(str, counts), *(f"${format_usd(nanos)}" for nanos in money))
    out.print(table)


async def _usage(
    standing: Standing, only: str, between_ms: tuple[int, int], group_by: history.GroupBy
) -> dict[TenantId, list[Total]]:
    async with store(standing) as redis:
        tenants = Tenants(redis)
        names = [(await tenants.get(TenantId(only))).id] if only else [one.id for one in await tenants.list()]
        return {name: await history.totals(redis, name, *between_ms, group_by) for name in names}


def _total_json(total: Total) -> dict[str, object]:
    """Money as decimal dollars."""
    return {
        name.removesuffix("_nanos") + "_usd" if name.endswith("_nanos") else name: format_usd(value)
        if name.endswith("_nanos")
        else value
        for name, value in asdict(total).items()
    }


def days(since: str, until: str) -> tuple[int, int]:
    """From the start of the first day until before the day after the last, in Unix milliseconds."""
    today = datetime.fromtimestamp(now_ms() // 1_000, UTC)
    try:
        last = datetime.strptime(until, "%Y-%m-%d").replace(tzinfo=UTC) if until else today
        first = datetime.strptime(since, "%Y-%m-%d").replace(tzinfo=UTC) if since else last - timedelta(days=DAYS)
    except ValueError:
        raise SettingsError(f"a day is written 2026-11-23, not {since or until!r}") from None
    end = last.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
    start = first.replace(hour=0, minute=0, second=0, microsecond=0)
    return int(start.timestamp()) * 1_000, int(end.timestamp()) * 1_000


@asynccontextmanager
async def store(standing: Standing) -> AsyncIterator[Redis]:
    redis = await connect(standing.store_url, **standing.terms)
    try:
        yield redis
    finally:
        await redis.aclose()


def ask(question: Callable[[Standing], Coroutine[None, None, T]]) -> T:
    """Ask the farebox of this folder or of the environment; leave with exit code 1 and say why it does not answer."""
    try:
        return asyncio.run(question(Standing.find(Settings.from_env())))
    except (BillingError, NotRunning, SettingsError) as error:
        err.print(f"[bold red]farebox:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
