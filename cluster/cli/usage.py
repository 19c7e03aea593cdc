"""``farebox usage``: what tenants used, and what it cost."""

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from redis.asyncio import Redis

from billing.clock import now_ms
from billing.money import format_usd
from billing.reports import history
from billing.reports.history import Total
from billing.tenants.directory import Tenants
from billing.usage import TenantId
from cluster.cli.output import JsonOption, dollars, out, print_json, table
from cluster.cli.target import with_store
from cluster.local.settings import SettingsError

DAYS = 30
FIRST_YEAR, LAST_YEAR = 1971, 2999

Since = Annotated[str, typer.Option(help="First day in UTC, such as 2026-11-23 (default: 30 days before the last).")]
Until = Annotated[str, typer.Option(help="Last day in UTC (default: today).")]


def usage(
    tenant: Annotated[str, typer.Option(help="Only this tenant.")] = "",
    since: Since = "",
    until: Until = "",
    group_by: Annotated[history.GroupBy, typer.Option("--by", help="One line for each model or each day.")] = "model",
    as_json: JsonOption = False,
) -> None:
    """Show what tenants used and what it cost, from the store and the archive together."""
    span_ms = days(since, until)
    found = with_store(lambda redis: _usage(redis, tenant, span_ms, group_by))
    if as_json:
        print_json([{"tenant": name} | _json(total) for name, totals in found.items() for total in totals])
        return
    counts = ("requests", "prompt", "cached", "completion")
    money = ("list", "charged", "on credit")
    rows = table("tenant", group_by, *counts, *money, right=(*counts, *money))
    for name, totals in found.items():
        for one in totals:
            numbers = (one.requests, one.prompt_tokens, one.cached_tokens, one.completion_tokens)
            amounts = (one.list_nanos, one.charged_nanos, one.overage_nanos)
            rows.add_row(name, one.group, *map(str, numbers), *map(dollars, amounts))
    out.print(rows)


async def _usage(
    redis: Redis, only: str, span_ms: tuple[int, int], group_by: history.GroupBy
) -> dict[TenantId, list[Total]]:
    tenants = Tenants(redis)
    names = [(await tenants.get(TenantId(only))).id] if only else [one.id for one in await tenants.list()]
    return {name: await history.totals(redis, name, *span_ms, group_by) for name in names}


def _json(total: Total) -> dict[str, object]:
    """The fields of ``total``, with amounts as decimal dollars."""
    return {
        f"{name.removesuffix('_nanos')}_usd" if name.endswith("_nanos") else name: (
            format_usd(value) if name.endswith("_nanos") else value
        )
        for name, value in asdict(total).items()
    }


def days(since: str, until: str) -> tuple[int, int]:
    """The start of the first day and the end of the last, in Unix milliseconds.

    Raises:
        SettingsError: no date, or the last day is before the first.
    """
    last = _day(until) if until else datetime.fromtimestamp(now_ms() // 1_000, UTC)
    first = _day(since) if since else last - timedelta(days=DAYS)
    start = first.replace(hour=0, minute=0, second=0, microsecond=0)
    end = last.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
    if end <= start:
        raise SettingsError(f"the last day, {last:%Y-%m-%d}, is before the first, {first:%Y-%m-%d}: exchange them")
    return int(start.timestamp()) * 1_000, int(end.timestamp()) * 1_000


def _day(text: str) -> datetime:
    try:
        found = datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        raise SettingsError(f"{text!r} is not a day: write it as 2026-11-23") from None
    if not FIRST_YEAR <= found.year <= LAST_YEAR:
        raise SettingsError(f"{text} is too far away: give a day of the years {FIRST_YEAR} to {LAST_YEAR}")
    return found
