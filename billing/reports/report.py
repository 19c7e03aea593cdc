"""The owner's figures of a span of time: revenue, cost and margin by plan, adapter and tenant, and churn.

Pure: from records, tenants and prices to rows. Money is what was earned, not what was paid in.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from billing.catalog.catalog import Catalog
from billing.money import Nanos
from billing.pricing.costs import PERCENT, Costs
from billing.reports.experiments import ArmResult, results
from billing.reports.worth import Worth
from billing.tenants.tenant import ENDED, Tenant
from billing.usage import NOTHING, Status, TenantId, Usage, UsageRecord

HOURS = 24


@dataclass(frozen=True, slots=True)
class Line:
    """One plan's, adapter's or tenant's part."""

    name: str
    records: int = 0
    usage: Usage = NOTHING
    list_nanos: Nanos = Nanos(0)
    revenue_nanos: Nanos = Nanos(0)
    cost_nanos: Nanos | None = None
    """``None`` where the configuration has no cost of a GPU."""

    @property
    def margin_percent(self) -> int | None:
        """Of the revenue, rounded down; ``None`` where there is no revenue or no known cost."""
        if self.cost_nanos is None or self.revenue_nanos == 0:
            return None
        return (self.revenue_nanos - self.cost_nanos) * PERCENT // self.revenue_nanos

    @property
    def is_below_cost(self) -> bool:
        return self.cost_nanos is not None and self.revenue_nanos < self.cost_nanos

    @property
    def completion_per_compute_second(self) -> int:
        """Tokens generated in a second of a replica's time, rounded down; 0 where no time was counted."""
        return self.usage.completion_tokens * 1_000 // self.usage.compute_ms if self.usage.compute_ms else 0


@dataclass(frozen=True, slots=True)
class Report:
    """A span of time in figures; each list is ordered by revenue, the largest first."""

    total: Line
    by_plan: Sequence[Line]
    by_adapter: Sequence[Line]
    by_tenant: Sequence[Line]
    by_status: dict[str, int]
    by_hour: Sequence[int]
    """Requests by the hour of the day, in UTC."""
    arms: Sequence[ArmResult]
    """Of the experiments that ran."""
    recurring_nanos: Nanos
    """The monthly prices of all subscriptions that are live now."""
    live_subscriptions: int
    ended_subscriptions: int
    """Whose last period ended within the span."""
    active: frozenset[TenantId]
    """Tenants that used something."""
    lost: frozenset[TenantId]
    """Tenants that used something in the span before and nothing in this one."""
    stayed: frozenset[TenantId]

    @property
    def churn_percent(self) -> int | None:
        """Lost tenants of those that were active before, rounded down."""
        before = len(self.lost) + len(self.stayed)
        return len(self.lost) * PERCENT // before if before else None


@dataclass
class _Sums:
    """Lines by name, added up record by record."""

    worth: Worth
    lines: dict[str, Line] = field(default_factory=dict)

    def add(self, name: str, record: UsageRecord) -> None:
        line = self.lines.get(name, Line(name))
        self.lines[name] = replace(
            line,
            records=line.records + 1,
            usage=line.usage + record.usage,
            list_nanos=Nanos(line.list_nanos + record.list_nanos),
            revenue_nanos=Nanos(line.revenue_nanos + self.worth.revenue(record)),
        )

    def costed(self, costs: Costs | None) -> list[Line]:
        lines = list(self.lines.values())
        if costs is not None:
            lines = [replace(line, cost_nanos=costs.of(line.usage.compute_ms)) for line in lines]
        return sorted(lines, key=lambda line: (-line.revenue_nanos, line.name))


def build(
    records: Sequence[UsageRecord],
    active_before: frozenset[TenantId],
    tenants: Sequence[Tenant],
    worth: Worth,
    costs: Costs | None,
    span_ms: tuple[int, int],
    now_ms: int,
) -> Report:
    """Add up the records of ``span_ms``, its end left out; ``active_before`` used something in the span before."""
    sums: defaultdict[str, _Sums] = defaultdict(lambda: _Sums(worth))
    statuses: Counter[str] = Counter()
    hours = [0] * HOURS
    for record in records:
        names = {"plan": record.plan, "adapter": record.adapter.partition("@")[0], "tenant": str(record.tenant)}
        for kind, name in (*names.items(), ("total", "total")):
            sums[kind].add(name, record)
        statuses[record.status.value] += 1
        hours[datetime.fromtimestamp(record.occurred_at_ms // 1_000, UTC).hour] += record.usage.requests
    active = frozenset(record.tenant for record in records if record.usage != NOTHING)
    there = [one.id for one in tenants if one.created_at_ms < span_ms[1]]
    live = [t.subscription.plan for t in tenants if t.subscription is not None and t.subscription.is_live(now_ms)]
    return Report(
        total=next(iter(sums["total"].costed(costs)), Line("total")),
        by_plan=sums["plan"].costed(costs),
        by_adapter=sums["adapter"].costed(costs),
        by_tenant=sums["tenant"].costed(costs),
        by_status={status.value: statuses[status.value] for status in Status},
        by_hour=hours,
        arms=results(worth.catalog.pricing.experiments, records, there, worth, span_ms),
        recurring_nanos=_recurring(live, worth.catalog),
        live_subscriptions=len(live),
        ended_subscriptions=sum(_has_ended(tenant, span_ms) for tenant in tenants),
        active=active,
        lost=active_before - active,
        stayed=active_before & active,
    )


def _recurring(plans: Iterable[str], catalog: Catalog) -> Nanos:
    found = (catalog.plan_named(name) for name in plans)
    return Nanos(sum(plan.monthly_price for plan in found if plan is not None))


def _has_ended(tenant: Tenant, span_ms: tuple[int, int]) -> bool:
    one = tenant.subscription
    return one is not None and one.status in ENDED and span_ms[0] <= one.period_end_ms < span_ms[1]
