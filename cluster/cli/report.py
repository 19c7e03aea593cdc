"""``farebox report`` and ``farebox price``: revenue, cost and margin, and prices that leave a margin."""

from collections.abc import Sequence
from typing import Annotated

import typer
from redis.asyncio import Redis
from rich.table import Table

from billing.catalog import publication
from billing.clock import now_ms
from billing.commerce.inbox import Inbox
from billing.money import Nanos, format_usd, parse_usd
from billing.pricing.costs import Costs, Speeds, per_compute_second, per_request, suggest
from billing.reports import history
from billing.reports.experiments import ArmResult
from billing.reports.intervals import LEAST, Interval
from billing.reports.report import Line, Report, build
from billing.reports.worth import Worth
from billing.tenants.directory import Tenants
from billing.usage import NOTHING
from cluster.cli.output import JsonOption, dollars, fail, out, print_json, table
from cluster.cli.target import with_store
from cluster.cli.usage import Since, Until, days
from cluster.local.settings import SettingsError

TENANTS_SHOWN = 10
BARS = "▁▂▃▄▅▆▇█"

GpuHour = Annotated[
    str, typer.Option(help="US dollars for an hour of one GPU (default: `costs` in the configuration).")
]


def report(since: Since = "", until: Until = "", gpu_hour: GpuHour = "", as_json: JsonOption = False) -> None:
    """Show revenue, margin and churn by plan, adapter and tenant, and mark what is sold below cost."""
    given = _given_costs(gpu_hour)
    span_ms = days(since, until)
    found, costs = with_store(lambda redis: _report(redis, span_ms, given))
    if as_json:
        print_json(_report_json(found, costs))
        return
    out.print(_headline(found))
    for title, lines in (
        ("plan", found.by_plan),
        ("adapter", found.by_adapter),
        ("tenant", found.by_tenant[:TENANTS_SHOWN]),
    ):
        out.print(_lines_table(title, lines))
    if found.arms:
        out.print(_arms_table(found.arms))
    out.print(f"requests by hour, UTC  {_bars(found.by_hour)}")


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


async def _report(redis: Redis, span_ms: tuple[int, int], costs: Costs | None) -> tuple[Report, Costs | None]:
    """The report, and the costs that it was made with."""
    start, end = span_ms
    catalogs = await publication.in_force_ever(redis)
    if catalogs is None:
        raise SettingsError("no gateway has published a catalog yet: start one, or deploy a configuration")
    before = {
        record.tenant
        async for record in history.of_all_tenants(redis, start - (end - start), start)
        if record.usage != NOTHING
    }
    records = [record async for record in history.of_all_tenants(redis, start, end)]
    worth = Worth(catalogs, await Inbox(redis).names())
    tenants = await Tenants(redis).list()
    found = build(records, frozenset(before), tenants, worth, costs, span_ms, now_ms())
    return found, costs or catalogs.at(end - 1).costs


def _given_costs(gpu_hour: str) -> Costs | None:
    if not gpu_hour:
        return None
    try:
        return Costs.model_construct(gpu_hour=parse_usd(gpu_hour))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _headline(found: Report) -> Table:
    rows = table("revenue", "recurring a month", "subscriptions", "ended", "tenants", "lost", "churn", "margin")
    churn, margin = found.churn_percent, found.total.margin_percent
    rows.add_row(
        dollars(found.total.revenue_nanos, 2),
        dollars(found.recurring_nanos, 2),
        str(found.live_subscriptions),
        str(found.ended_subscriptions),
        str(len(found.active)),
        str(len(found.lost)),
        "-" if churn is None else f"{churn} %",
        "-" if margin is None else f"{margin} %",
    )
    return rows


def _lines_table(title: str, lines: Sequence[Line]) -> Table:
    numbers = ("requests", "prompt", "completion", "compute s", "revenue", "cost", "margin")
    rows = table(title, *numbers, right=numbers)
    for line in lines:
        usage, margin = line.usage, line.margin_percent
        rows.add_row(
            line.name,
            str(usage.requests),
            str(usage.prompt_tokens),
            str(usage.completion_tokens),
            f"{usage.compute_ms / 1_000:.1f}",
            dollars(line.revenue_nanos),
            "-" if line.cost_nanos is None else dollars(line.cost_nanos),
            "below cost" if line.is_below_cost else "-" if margin is None else f"{margin} %",
            style="bold red" if line.is_below_cost else "",
        )
    return rows


def _arms_table(arms: Sequence[ArmResult]) -> Table:
    numbers = ("tenants", "requests", "revenue", "per tenant", "more than the first arm")
    rows = table("experiment", "arm", *numbers, right=numbers)
    for one in arms:
        is_clear = one.gain is not None and one.gain.is_clear
        rows.add_row(
            one.experiment,
            one.arm,
            str(one.tenants),
            str(one.requests),
            dollars(one.revenue_nanos),
            _range(one.each),
            "" if one.arm == _first_of(one.experiment, arms) else _range(one.gain),
            style="bold" if is_clear else "",
        )
    rows.caption = f"ranges are 95 % confidence intervals; an arm with fewer than {LEAST} tenants has none"
    return rows


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
        "recurring_usd": format_usd(found.recurring_nanos),
        "live_subscriptions": found.live_subscriptions,
        "ended_subscriptions": found.ended_subscriptions,
        "active_tenants": sorted(found.active),
        "lost_tenants": sorted(found.lost),
        "churn_percent": found.churn_percent,
        "gpu_hour_usd": None if costs is None else format_usd(costs.gpu_hour),
    }


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
