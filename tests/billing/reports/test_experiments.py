"""What an experiment's arms earned, checked against figures worked out by hand."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from billing.catalog.publication import CatalogHistory
from billing.pricing.modifiers import Experiment
from billing.reports.experiments import ArmResult, results
from billing.reports.intervals import Interval
from billing.reports.worth import Worth
from billing.usage import OVERAGE, TenantId, UsageRecord
from tests.support.reports import CATALOG, HOUR_MS, USD, WORTH, record

DAY = (0, 24 * HOUR_MS)
ARMS = [{"id": "control"}, {"id": "raised", "multiplier": "1.2"}]
RAISE = Experiment.model_validate({"id": "raise", "arms": ARMS, "adapters": ["pirate"]})


def members(arm: str, count: int) -> list[TenantId]:
    names = (TenantId(f"tenant-{n}") for n in range(1_000))
    return [name for name in names if RAISE.arm_of(name).id == arm][:count]


def used(tenants: Sequence[TenantId], dollars: Sequence[int]) -> list[UsageRecord]:
    return [record(OVERAGE, usd * USD, tenant=name) for name, usd in zip(tenants, dollars, strict=True)]


def of(experiment: Experiment, records: list[UsageRecord], tenants: list[TenantId]) -> list[ArmResult]:
    return results(records, tenants, worth_with((0, [experiment])), DAY)


def worth_with(*parts: tuple[int, list[Experiment]]) -> Worth:
    """What catalogs with these experiments were in force, and from when on."""
    pricings = ((start, CATALOG.pricing.model_copy(update={"experiments": tuple(ran)})) for start, ran in parts)
    changed = ((start, CATALOG.model_copy(update={"pricing": pricing})) for start, pricing in pricings)
    return replace(WORTH, history=CatalogHistory.of(*changed))


def in_usd(interval: Interval | None) -> list[float]:
    assert interval is not None
    return [round(part / USD, 2) for part in (interval.estimate, interval.low, interval.high)]


def test_each_arm_has_its_mean_and_what_it_is_above_the_first() -> None:
    """Six tenants each: 1 to 6 and 3 to 8 dollars. Student's quantiles are 2.571 (5) and 2.228 (10)."""
    control, raised = members("control", 6), members("raised", 6)
    found = of(RAISE, used(control, range(1, 7)) + used(raised, range(3, 9)), control + raised)
    first, second = found
    assert [(one.experiment, one.arm, one.tenants, one.requests) for one in found] == [
        ("raise", "control", 6, 6),
        ("raise", "raised", 6, 6),
    ]
    assert [one.revenue_nanos for one in found] == [21 * USD, 33 * USD]
    assert in_usd(first.each) == [3.5, 1.54, 5.46]
    assert in_usd(second.each) == [5.5, 3.54, 7.46]
    assert first.gain is None
    assert in_usd(second.gain) == [2.0, -0.41, 4.41]


def test_tenant_without_usage_counts_as_zero() -> None:
    control, raised = members("control", 6), members("raised", 6)
    first, second = of(RAISE, used(raised[:1], [6]), control + raised)
    assert (first.tenants, first.requests, in_usd(first.each)) == (6, 0, [0, 0, 0])
    assert (second.tenants, in_usd(second.each)[0]) == (6, 1.0)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_too_few_tenants_have_no_interval_and_no_difference(count: int) -> None:
    control, raised = members("control", 6), members("raised", count)
    first, second = of(RAISE, used(raised, [3] * count), control + raised)
    assert first.each is not None
    assert (second.tenants, second.revenue_nanos) == (count, 3 * count * USD)
    assert (second.each, second.gain) == (None, None)


def test_only_its_adapters_count_and_only_while_it_ran() -> None:
    [name] = members("raised", 1)
    timed = RAISE.model_copy(update={"starts": _at(2), "ends": _at(6)})
    records = [
        record(OVERAGE, USD, tenant=name, occurred_at_ms=2 * HOUR_MS),
        record(OVERAGE, USD, tenant=name, occurred_at_ms=6 * HOUR_MS),
        record(OVERAGE, USD, tenant=name, occurred_at_ms=1 * HOUR_MS),
        record(OVERAGE, USD, tenant=name, adapter="yaml@abc"),
    ]
    assert [one.revenue_nanos for one in of(timed, records, [name])] == [0, USD]


def test_changed_experiment_is_another_one() -> None:
    """Until six o'clock with the terms of then; what was used behind that counts for the new ones."""
    [name] = members("raised", 1)
    raised_more = Experiment.model_validate(
        {"id": "raise", "arms": [{"id": "control"}, {"id": "raised", "multiplier": "2"}]}
    )
    worth = worth_with((0, [RAISE]), (6 * HOUR_MS, [raised_more]), (30 * HOUR_MS, []))
    records = [record(OVERAGE, hour * USD, tenant=name, occurred_at_ms=hour * HOUR_MS) for hour in (1, 5, 6)]
    found = results(records, [name], worth, DAY)
    assert [(one.arm, one.revenue_nanos) for one in found] == [
        ("control", 0),
        ("raised", 6 * USD),
        ("control", 0),
        ("raised", 6 * USD),
    ]
    assert results(records, [name], worth, (30 * HOUR_MS, 31 * HOUR_MS)) == []


@pytest.mark.parametrize(
    ("starts", "ends", "is_shown"),
    [(None, None, True), (24, None, False), (-9, 0, False), (-9, 1, True), (23, 99, True)],
)
def test_experiment_is_shown_where_it_ran_in_the_span(starts: int | None, ends: int | None, is_shown: bool) -> None:
    update = {"starts": None if starts is None else _at(starts), "ends": None if ends is None else _at(ends)}
    assert bool(of(RAISE.model_copy(update=update), [], [])) == is_shown


def _at(hour: int) -> datetime:
    return datetime.fromtimestamp(0, UTC) + timedelta(hours=hour)
