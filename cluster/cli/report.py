"""``farebox report`` and ``farebox price``: revenue, cost and margin, and prices that leave a margin."""

import csv
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from redis.asyncio import Redis
from rich.measure import Measurement
from rich.table import Table

from billing.catalog import publication
from billing.clock import month_of, now_ms, unix_ms
from billing.commerce.cash import CashBook, Entry, explained
from billing.commerce.inbox import Inbox
from billing.money import NANOS_PER_CENT, Nanos, format_usd, parse_usd
from billing.pricing.costs import Costs, Speeds, per_compute_second, per_request, suggest
from billing.reports import history
from billing.reports.experiments import ArmResult
from billing.reports.intervals import LEAST, Interval
from billing.reports.report import Line, Report, build
from billing.reports.statement import Month, Statement, read_statement
from billing.reports.worth import Worth
from billing.tenants.directory import Tenants
from billing.usage import NOTHING, TenantId
from cluster.cli.output import JsonOption, err, fail, out, print_json, table, utc
from cluster.cli.target import with_store
from cluster.cli.usage import Until, days
from cluster.local.settings import SettingsError

TENANTS_SHOWN = 10
NOTHING_KNOWN: Mapping[TenantId, int] = {}
MOST_COLUMNS = 10_000
NANOS_PER_MICRO = 1_000
RANGES = ("per tenant", "more than the first")
"""Columns whose cells are long, and may be read in two lines."""
MARGIN = "margin_percent"
CASH_COLUMNS = (
    "booked_at", "at_dodo", "id", "kind", "for", "tenant", "payment", "amount", "tax", "currency", "settled",
    "settled_tax", "ours", "foreign", "settled_currency",
)  # fmt: skip
FORMULA = ("=", "+", "-", "@", "\t", "\r")
NUMBER = re.compile(r"-?\d+(\.\d+)?", re.ASCII)
BARS = "▁▂▃▄▅▆▇█"

GpuHour = Annotated[
    str, typer.Option(help="US dollars for an hour of one GPU (default: `costs` in the configuration).")
]


def report(
    month: Annotated[str, typer.Option(help="One calendar month in UTC, such as 2026-10.")] = "",
    since: Annotated[str, typer.Option(help="First day in UTC (default: of the month two before the last).")] = "",
    until: Until = "",
    gpu_hour: GpuHour = "",
    cash: Annotated[bool, typer.Option("--cash", help="List the cash book of these days instead.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print exact figures as CSV, one line for each month.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show month by month what was earned and paid in, then revenue and margin by plan, adapter and tenant."""
    if as_csv and as_json:
        raise typer.BadParameter("give either --csv or --json")
    if cash and gpu_hour:
        raise typer.BadParameter("give either --cash or --gpu-hour: the cash book has no compute to value")
    given, span_ms = _given_costs(gpu_hour), _span(month, since, until)
    if cash:
        _report_cash(span_ms, as_csv, as_json)
        return
    statement, found, costs = with_store(lambda redis: _with_statement(redis, span_ms, given))
    months, left_out = statement.months(*span_ms), statement.left_out(*span_ms)
    if as_json:
        print_json(_report_json(found, costs) | {"months": [_month_row(one) for one in months], "not_in_usd": left_out})
        return
    if left_out:
        named = ", ".join(f"{count} in {currency}" for currency, count in left_out.items())
        err.print(
            f"not in these sums, since Dodo settles them in no dollars: {named}; --cash lists them", soft_wrap=True
        )
    if as_csv:
        _print_csv([_month_row(one) for one in months], ["month", *(f"{name}_usd" for name in AMOUNTS), MARGIN])
        return
    for rows in (*_month_tables(months), _headline(found)):
        _show(rows)
    for title, lines in (
        ("plan", found.by_plan),
        ("adapter", found.by_adapter),
        ("tenant", found.by_tenant[:TENANTS_SHOWN]),
    ):
        _show(_lines_table(title, lines))
    if found.arms:
        _show(_arms_table(found.arms))
    out.print(f"requests by hour, UTC  {_bars(found.by_hour)}")


def _report_cash(span_ms: tuple[int, int], as_csv: bool, as_json: bool) -> None:
    start, end = span_ms
    whole = explained(with_store(lambda redis: CashBook(redis).until(end)))
    booked = [one for one in whole if one.booked_at_ms >= start]
    rows = [_cash_row(one) for one in booked]
    if as_json:
        print_json(rows)
    elif as_csv:
        _print_csv(rows, CASH_COLUMNS)
    else:
        _show(_cash_table(booked))


def _span(month: str, since: str, until: str) -> tuple[int, int]:
    """A month, or from one day to another; without either this month and the two before it.

    Raises:
        SettingsError: no month or day, one that has not begun, or the last is before the first.
    """
    for day in filter(None, (since, until)):
        _refuse_what_has_not_begun(day, days(day, day)[0])
    if not month:
        last = days(until or since, until)[1] - 1 if until else now_ms()
        first = (month_of(last)[0] - timedelta(days=1)).replace(day=1) - timedelta(days=1)
        return days(since or f"{first:%Y-%m}-01", until)
    if since or until:
        raise SettingsError("give either --month or --since and --until")
    try:
        start = datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC)
    except ValueError:
        raise SettingsError(f"{month!r} is not a month: write it as 2026-10") from None
    _refuse_what_has_not_begun(month, unix_ms(start))
    return days(str(start.date()), "")[0], unix_ms(month_of(unix_ms(start))[1])


def _refuse_what_has_not_begun(name: str, start_ms: int) -> None:
    if start_ms > now_ms():
        raise SettingsError(f"{name} has not begun: give a time until today, {utc(now_ms())[:10]}")


def price(
    margin: Annotated[int, typer.Option(min=0, max=99, help="Percent of the revenue that is left.")] = 60,
    gpu_hour: GpuHour = "",
    tokens_per_second: Annotated[
        int | None, typer.Option(min=0, help="Tokens that one busy replica generates (default: as measured).")
    ] = None,
    prompt_tokens_per_second: Annotated[
        int | None, typer.Option(min=0, help="Prompt tokens that it reads (default: ten times as many).")
    ] = None,
    busy: Annotated[int, typer.Option(min=1, max=100, help="Percent of the time that a replica is busy.")] = 50,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompt tokens of a typical request.")] = 400,
    completion_tokens: Annotated[int, typer.Option(min=1, help="Completion tokens of a typical request.")] = 200,
    as_json: JsonOption = False,
) -> None:
    """Suggest prices that leave a margin, from what the GPU costs and how fast it is."""
    given = costs = _given_costs(gpu_hour)
    if costs is None or not tokens_per_second:
        measured, costs = with_store(lambda redis: _report(redis, days("", ""), given))
        tokens_per_second = tokens_per_second or measured.total.completion_per_compute_second
    if costs is None:
        fail("the cost of a GPU is not known: give --gpu-hour, or set `costs: {gpu_hour: ...}` in the configuration")
    if not tokens_per_second:
        fail("no usage records show how fast a replica is: give --tokens-per-second")
    speeds = Speeds(tokens_per_second, prompt_tokens_per_second or 10 * tokens_per_second, busy)
    rates = suggest(costs, speeds, margin)
    suggested = {
        "output_per_1m": format_usd(rates.output_per_1m),
        "input_per_1m": format_usd(rates.input_per_1m),
        "cached_input_per_1m": format_usd(rates.cached_input_per_1m or 0),
        "per_request": format_usd(per_request(rates, prompt_tokens, completion_tokens)),
        "per_compute_second": format_usd(per_compute_second(costs, margin, busy)),
    }
    if as_json:
        print_json(suggested | {"tokens_per_second": tokens_per_second, "margin_percent": margin})
        return
    title = f"{margin} % margin with replicas that are busy {busy} % of the time"
    rows = table("rate", "usd", right=("usd",), title=title)
    for name, usd in suggested.items():
        rows.add_row(name, usd)
    out.print(rows)
    out.print(
        f"for {tokens_per_second} tokens a second; per_request replaces the token rates, for requests of "
        f"{prompt_tokens} prompt and {completion_tokens} completion tokens"
    )


async def _with_statement(
    redis: Redis, span_ms: tuple[int, int], costs: Costs | None
) -> tuple[Statement, Report, Costs | None]:
    statement = await read_statement(redis, await _worth(redis), costs, min(span_ms[1], now_ms()))
    found, used = await _report(redis, span_ms, costs, statement.first_ms)
    return statement, found, used


async def _worth(redis: Redis) -> Worth:
    catalogs = await publication.in_force_ever(redis)
    if catalogs is None:
        raise SettingsError("no gateway has published a catalog yet: start one, or deploy a configuration")
    return Worth(catalogs, await Inbox(redis).names())


async def _report(
    redis: Redis, span_ms: tuple[int, int], costs: Costs | None, first_ms: Mapping[TenantId, int] = NOTHING_KNOWN
) -> tuple[Report, Costs | None]:
    """The report, and the costs that it was made with.

    A tenant whose creation has no time, such as one made by a payment, is there since its first entry: ``first_ms``.
    """
    start, end = span_ms
    worth = await _worth(redis)
    before = {
        record.tenant
        async for record in history.of_all_tenants(redis, start - (end - start), start)
        if record.usage != NOTHING
    }
    records = [record async for record in history.of_all_tenants(redis, start, end)]
    tenants = [
        one if one.created_at_ms else one.model_copy(update={"created_at_ms": first_ms.get(one.id, end)})
        for one in await Tenants(redis).list()
    ]
    found = build(records, frozenset(before), tenants, worth, costs, span_ms, now_ms())
    return found, costs or worth.history.at(end - 1).costs


def _given_costs(gpu_hour: str) -> Costs | None:
    if not gpu_hour:
        return None
    try:
        nanos = parse_usd(gpu_hour)
    except ValueError as error:
        raise typer.BadParameter(f"--gpu-hour: {error}") from None
    if nanos <= 0:
        raise typer.BadParameter(f"--gpu-hour: {gpu_hour} is no price: give one above 0")
    return Costs.model_construct(gpu_hour=nanos)


def _headline(found: Report) -> Table:
    """What the span was; what is known only of now is left out of a past one."""
    rows = _table("", "", right=())
    churn, margin = found.churn_percent, found.total.margin_percent
    facts = {
        "earned by use": _rounded(found.total.revenue_nanos),
        "margin on it": "-" if margin is None else f"{margin} %",
        "tenants": f"{len(found.active)} active, {len(found.lost)} lost",
        "churn": "-" if churn is None else f"{churn} %",
    }
    if found.recurring_nanos is not None:
        facts["recurring a month"] = _rounded(found.recurring_nanos)
        facts["subscriptions"] = f"{found.live_subscriptions} live, {found.ended_subscriptions} ended"
    for name, value in facts.items():
        rows.add_row(name, value)
    return rows


def _month_tables(months: Sequence[Month]) -> list[Table]:
    earned = ("prepaid", "allowance", "postpaid", "expired", "earned", "given")
    cash = ("paid", "tax", "refunds", "disputes", "fees", "net")
    rest = ("deferred", "unpaid", "paid out", "cost", "margin")
    tables = [_table("month", *numbers, right=numbers) for numbers in (earned, cash, rest)]
    for one in months:
        tables[0].add_row(one.name, *(_rounded(getattr(one, name)) for name in earned))
        tables[1].add_row(one.name, *(_rounded(getattr(one, name)) for name in cash))
        margin, cost = one.margin_percent, "-" if one.cost is None else _rounded(one.cost)
        amounts = (_rounded(nanos) for nanos in (one.deferred, one.unpaid, one.paid_out))
        tables[2].add_row(one.name, *amounts, cost, "-" if margin is None else f"{margin} %")
    return tables


def _lines_table(title: str, lines: Sequence[Line]) -> Table:
    numbers = ("requests", "prompt", "completion", "revenue", "cost", "margin")
    rows = _table(title, *numbers, right=numbers)
    for line in lines:
        usage, margin = line.usage, line.margin_percent
        rows.add_row(
            line.name,
            str(usage.requests),
            str(usage.prompt_tokens),
            str(usage.completion_tokens),
            _rounded(line.revenue_nanos),
            "-" if line.cost_nanos is None else _rounded(line.cost_nanos),
            "below cost" if line.is_below_cost else "-" if margin is None else f"{margin} %",
            style="bold red" if line.is_below_cost else "",
        )
    return rows


def _arms_table(arms: Sequence[ArmResult]) -> Table:
    numbers = ("tenants", "requests", "revenue", *RANGES)
    rows = _table("experiment", "arm", *numbers, right=numbers)
    for one in arms:
        is_clear = one.gain is not None and one.gain.is_clear
        rows.add_row(
            one.experiment,
            one.arm,
            str(one.tenants),
            str(one.requests),
            _rounded(one.revenue_nanos),
            _range(one.each),
            "" if one.arm == _first_of(one.experiment, arms) else _range(one.gain),
            style="bold" if is_clear else "",
        )
    rows.caption = f"ranges are 95 % confidence intervals; an arm with fewer than {LEAST} tenants has none"
    return rows


def _cash_table(entries: Sequence[Entry]) -> Table:
    rows = _table(
        "booked", "kind", "for", "tenant", "amount", "", "ours", "foreign", right=("amount", "ours", "foreign")
    )
    for one in entries:
        amounts = (_units(one.amount), one.currency, _units(one.ours), _units(one.foreign))
        rows.add_row(utc(one.booked_at_ms)[:10], one.kind.value.replace("_", " "), one.what, one.tenant, *amounts)
    rows.caption = "ours and foreign are without tax; --csv and --json have every column"
    return rows


def _units(minor: int | None) -> str:
    """Hundredths as a decimal."""
    return "" if minor is None else format_usd(minor * NANOS_PER_CENT, 2)


def _table(*columns: str, right: Collection[str]) -> Table:
    """Without lines between its columns, so that seven amounts fit into 80."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), caption_justify="left", show_header=any(columns))
    for number, name in enumerate(columns):
        is_right = name in right
        may_wrap = number < 2 or name in RANGES
        made.add_column(name, justify="right" if is_right else "left", overflow="fold", no_wrap=not may_wrap)
    return made


def _show(rows: Table) -> None:
    """A table on a terminal folds what does not fit; elsewhere each row is one line, whatever its length."""
    if out.is_terminal:
        out.print(rows)
    else:
        needed = Measurement.get(out, out.options.update(max_width=MOST_COLUMNS), rows).maximum
        out.print(rows, width=max(out.width, needed), crop=False, soft_wrap=False)
    out.print()


def _rounded(nanos: int) -> str:
    """Dollars as people read them: to the cent, what is less than ten of them to a ten-thousandth."""
    unit = 100 * NANOS_PER_MICRO if abs(nanos) < 10 * NANOS_PER_CENT else NANOS_PER_CENT
    near = (2 * abs(nanos) + unit) // (2 * unit) * unit
    return f"{'-' if nanos < 0 and near else ''}${format_usd(near, 2)}"


def _first_of(experiment: str, arms: Sequence[ArmResult]) -> str:
    return next(one.arm for one in arms if one.experiment == experiment)


def _range(interval: Interval | None) -> str:
    if interval is None:
        return "too few tenants"
    estimate, low, high = (_usd(nanos) for nanos in (interval.estimate, interval.low, interval.high))
    return f"{estimate} ({low} to {high})"


def _usd(nanos: float) -> str:
    """Rounded to a millionth of a dollar."""
    sign = "-" if nanos < 0 else ""
    return f"{sign}${format_usd(Nanos(round(abs(nanos) / 1_000) * 1_000))}"


def _bars(counts: Sequence[int]) -> str:
    most = max(counts) or 1
    return "".join(BARS[count * (len(BARS) - 1) // most] for count in counts)


def _report_json(found: Report, costs: Costs | None) -> dict[str, object]:
    return {
        "total": _line_json(found.total),
        "by_plan": [_line_json(line) for line in found.by_plan],
        "by_adapter": [_line_json(line) for line in found.by_adapter],
        "by_tenant": [_line_json(line) for line in found.by_tenant],
        "by_status": found.by_status,
        "by_hour": list(found.by_hour),
        "experiments": [_arm_json(one) for one in found.arms],
        "recurring_usd": None if found.recurring_nanos is None else format_usd(found.recurring_nanos),
        "live_subscriptions": found.live_subscriptions,
        "ended_subscriptions": found.ended_subscriptions,
        "active_tenants": sorted(found.active),
        "lost_tenants": sorted(found.lost),
        "churn_percent": found.churn_percent,
        "gpu_hour_usd": None if costs is None else format_usd(costs.gpu_hour),
    }


AMOUNTS = (
    "paid", "tax", "refunds", "disputes", "fees", "net", "paid_out", "prepaid", "allowance", "postpaid", "expired",
    "earned", "given", "deferred", "unpaid", "differences", "cost",
)  # fmt: skip


def _month_row(one: Month) -> dict[str, str | int | None]:
    """Amounts as exact decimal dollars; ``None`` where it is not known."""
    amounts = {name: getattr(one, name) for name in AMOUNTS}
    exact = {f"{name}_usd": None if nanos is None else format_usd(nanos) for name, nanos in amounts.items()}
    return {"month": one.name, **exact, "margin_percent": one.margin_percent}


def _cash_row(one: Entry) -> dict[str, str | int | None]:
    """Amounts in minor units of the currency beside them."""
    return {
        "booked_at": utc(one.booked_at_ms),
        "at_dodo": utc(one.at_ms),
        "id": one.id,
        "kind": one.kind.value,
        "for": one.what,
        "tenant": one.tenant,
        "payment": one.payment_id,
        "amount": one.amount,
        "tax": one.tax,
        "currency": one.currency,
        "settled": one.settled,
        "settled_tax": one.settled_tax,
        "ours": one.ours,
        "foreign": one.foreign,
        "settled_currency": one.settled_currency,
    }


def _print_csv(rows: Sequence[Mapping[str, str | int | None]], columns: Sequence[str]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row[name]) for name in columns] for row in rows)


def _cell(value: str | int | None) -> str:
    """A text that a spreadsheet would run as a formula gets an apostrophe before it; a number below zero is none."""
    text = "" if value is None else str(value)
    return f"'{text}" if text.startswith(FORMULA) and not NUMBER.fullmatch(text) else text


def _arm_json(one: ArmResult) -> dict[str, object]:
    return {
        "experiment": one.experiment,
        "arm": one.arm,
        "tenants": one.tenants,
        "requests": one.requests,
        "revenue_usd": format_usd(one.revenue_nanos),
        "usd_per_tenant": _interval_json(one.each),
        "usd_more_than_first_arm": _interval_json(one.gain),
    }


def _interval_json(interval: Interval | None) -> dict[str, str] | None:
    """``None`` if there are too few tenants for an interval."""
    if interval is None:
        return None
    parts = {"estimate": interval.estimate, "low": interval.low, "high": interval.high}
    return {name: _usd(nanos).replace("$", "") for name, nanos in parts.items()}


def _line_json(line: Line) -> dict[str, object]:
    return {
        "name": line.name,
        "requests": line.usage.requests,
        "prompt_tokens": line.usage.prompt_tokens,
        "cached_tokens": line.usage.cached_tokens,
        "completion_tokens": line.usage.completion_tokens,
        "compute_ms": line.usage.compute_ms,
        "list_usd": format_usd(line.list_nanos),
        "revenue_usd": format_usd(line.revenue_nanos),
        "cost_usd": None if line.cost_nanos is None else format_usd(line.cost_nanos),
        "margin_percent": line.margin_percent,
        "below_cost": line.is_below_cost,
    }
