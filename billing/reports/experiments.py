"""What each arm of an experiment earned, and how much more than the first one, with how sure that is.

Counts what was used while the experiment ran and was in force, of its adapters. One that was changed meanwhile is
another one, with rows of its own: each says what happened under its own terms, whatever is configured later.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from billing.money import Nanos
from billing.pricing.modifiers import Experiment
from billing.reports.intervals import Interval, by_arm, difference, mean
from billing.reports.worth import Worth
from billing.usage import TenantId, UsageRecord


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm's part of the span."""

    experiment: str
    arm: str
    tenants: int
    """In the arm, also those that used nothing."""
    requests: int
    revenue_nanos: Nanos
    each: Interval | None
    """Nanos of revenue from one tenant; ``None`` where the arm has too few of them to say."""
    gain: Interval | None
    """Nanos that one tenant brings more than one of the first arm; ``None`` for that one, and for too few tenants."""


def results(
    records: Sequence[UsageRecord],
    tenants: Iterable[TenantId],
    worth: Worth,
    span_ms: tuple[int, int],
) -> list[ArmResult]:
    """Every arm of the experiments that ran in ``span_ms``, its end left out, in the configurations' order."""
    everyone = {*tenants, *(record.tenant for record in records)}
    in_force = [one for catalog in worth.history.within(*span_ms) for one in catalog.pricing.experiments]
    ran = [one for number, one in enumerate(in_force) if one not in in_force[:number] and _ran_in(one, span_ms)]
    return [result for one in ran for result in _arms(one, records, everyone, worth)]


def _arms(
    experiment: Experiment, records: Sequence[UsageRecord], tenants: set[TenantId], worth: Worth
) -> Iterator[ArmResult]:
    revenue: Counter[TenantId] = Counter()
    requests: defaultdict[str, int] = defaultdict(int)
    for record in records:
        in_force = worth.history.at(record.occurred_at_ms).pricing.experiments
        if experiment in in_force and _is_about(experiment, record):
            revenue[record.tenant] += worth.revenue(record)
            requests[experiment.arm_of(record.tenant).id] += record.usage.requests
    arms = by_arm(experiment, revenue, tenants)
    first = arms[experiment.arms[0].id]
    for arm, values in arms.items():
        gain = None if values is first else difference(values, first)
        yield ArmResult(experiment.id, arm, len(values), requests[arm], Nanos(sum(values)), mean(values), gain)


def _is_about(experiment: Experiment, record: UsageRecord) -> bool:
    model, moment = record.adapter.partition("@")[0], datetime.fromtimestamp(record.occurred_at_ms / 1_000, UTC)
    return experiment.runs(moment) and (not experiment.adapters or model in experiment.adapters)


def _ran_in(experiment: Experiment, span_ms: tuple[int, int]) -> bool:
    start, end = (datetime.fromtimestamp(ms / 1_000, UTC) for ms in span_ms)
    is_over = experiment.ends is not None and experiment.ends <= start
    return not is_over and (experiment.starts is None or experiment.starts < end)
