"""The owner's figures of a span of time: revenue, cost and margin by plan, adapter and tenant, and churn.

Pure: from records, tenants and catalogs to rows. Money is what was earned by use; ``billing.reports.statement`` has
what was paid in. The report of a span that is over never changes: what is known only of now is left out of it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from billing.catalog.catalog import Catalog
from billing.money import Nanos
from billing.pricing.costs import PERCENT, Costs
from billing.reports.experiments import ArmResult, results
from billing.reports.worth import Worth
from billing.tenants.tenant import ENDED, Subscription, Tenant
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
    """``None`` where the configuration of then had no cost of a GPU."""

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
    recurring_nanos: Nanos | None
    """The monthly prices of all subscriptions that are live now; this and the next two are ``None`` in a past span."""
    live_subscriptions: int | None
    ended_subscriptions: int | None
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
    costs: Costs | None
    """Of every moment; ``None``: those of the catalog in force when a record was written."""
    lines: dict[str, Line] = field(default_factory=dict)
    compute_ms: defaultdict[str, Counter[Costs | None]] = field(default_factory=lambda: defaultdict(Counter))
    """By line, what its compute cost then."""

    def add(self, name: str, record: UsageRecord) -> None:
        line = self.lines.get(name, Line(name))
        self.lines[name] = replace(
            line,
            records=line.records + 1,
            usage=line.usage + record.usage,
            list_nanos=Nanos(line.list_nanos + record.list_nanos),
            revenue_nanos=Nanos(line.revenue_nanos + self.worth.revenue(record)),
        )
        costs = self.costs or self.worth.history.at(record.occurred_at_ms).costs
        self.compute_ms[name][costs] += record.usage.compute_ms

    def costed(self) -> list[Line]:
        lines = [replace(line, cost_nanos=cost_of(self.compute_ms[name])) for name, line in self.lines.items()]
        return sorted(lines, key=lambda line: (-line.revenue_nanos, line.name))


def cost_of(compute_ms: Mapping[Costs | None, int]) -> Nanos | None:
    """What compute cost, by what an hour of it cost then; ``None`` where that is not known of all of it."""
    known = [(costs, ms) for costs, ms in compute_ms.items() if costs is not None]
    return Nanos(sum(costs.of(ms) for costs, ms in known)) if len(known) == len(compute_ms) else None


def build(
    records: Sequence[UsageRecord],
    active_before: frozenset[TenantId],
    tenants: Sequence[Tenant],
    worth: Worth,
    costs: Costs | None,
    span_ms: tuple[int, int],
    now_ms: int,
) -> Report:
    """Add up the records of ``span_ms``, its end left out; ``active_before`` used something in the span before.

    ``costs`` values all compute, in place of what the catalogs of then say.
    """
    sums: defaultdict[str, _Sums] = defaultdict(lambda: _Sums(worth, costs))
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
    live = [t.subscription for t in tenants if t.subscription is not None and t.subscription.is_live(now_ms)]
    reaches_now = now_ms < span_ms[1]
    return Report(
        total=next(iter(sums["total"].costed()), Line("total")),
        by_plan=sums["plan"].costed(),
        by_adapter=sums["adapter"].costed(),
        by_tenant=sums["tenant"].costed(),
        by_status={status.value: statuses[status.value] for status in Status},
        by_hour=hours,
        arms=results(records, there, worth, span_ms),
        recurring_nanos=_recurring(live, worth.history.at(now_ms)) if reaches_now else None,
        live_subscriptions=len(live) if reaches_now else None,
        ended_subscriptions=sum(_has_ended(tenant, span_ms) for tenant in tenants) if reaches_now else None,
        active=active,
        lost=active_before - active,
        stayed=active_before & active,
    )


def _recurring(subscriptions: Iterable[Subscription], catalog: Catalog) -> Nanos:
    """What they pay a month: what each was sold at, or its plan's price of now where that was not kept."""
    return Nanos(sum(_monthly_price(one, catalog) for one in subscriptions))


def _monthly_price(subscription: Subscription, catalog: Catalog) -> int:
    if subscription.sold is not None:
        return subscription.sold.price
    plan = catalog.plan_named(subscription.plan)
    return plan.monthly_price if plan is not None else 0


def _has_ended(tenant: Tenant, span_ms: tuple[int, int]) -> bool:
    one = tenant.subscription
    return one is not None and one.status in ENDED and span_ms[0] <= one.period_end_ms < span_ms[1]
