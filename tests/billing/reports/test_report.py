"""The owner's figures: credit is earned when it is used, at what it was bought for, and cost is compute time."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest

from billing.catalog.plans import Plan
from billing.catalog.publication import CatalogHistory
from billing.catalog.terms import Terms
from billing.pricing.costs import Costs, Speeds, per_compute_second, per_request, suggest
from billing.pricing.prices import Price
from billing.reports.report import Report, build
from billing.tenants.tenant import Subscription, SubscriptionStatus, Tenant
from billing.usage import NOTHING, OVERAGE, BucketId, Draw, Status, TenantId, Unit, Usage, UsageRecord
from tests.support.reports import CATALOG, HOUR_MS, USD, WORTH, record

PLANS_LATER = {"prepaid": {"kind": "prepaid"}}
COSTS = Costs.model_validate({"gpu_hour": "3.60"})
"""A tenth of a cent per second."""


@pytest.mark.parametrize(
    ("one", "earned"),
    [
        (record(OVERAGE, 7), 7),
        (record("payment:pay_1:pdt_bonus", 11 * USD), 10 * USD),
        (record("payment:pay_1:pdt_bonus", 1), 1),
        (record("payment:pay_1:pdt_calls", 1, Unit.REQUESTS), 5_000_000),
        (record("payment:pay_1:pdt_old", 9), 0),
        (record("payment:pay_1:pdt_unknown", 9), 0),
        (record("operator:gift", 9), 0),
        (record("allowance:free:2026-11", 9, plan="free"), 0),
        (record("allowance:sub_1:0", 1, Unit.REQUESTS, plan="pro"), 20_000_000),
        (record("allowance:sub_1:0", 1, Unit.REQUESTS, plan="gone"), 0),
    ],
)
def test_credit_is_worth_what_it_was_bought_for(one: UsageRecord, earned: int) -> None:
    assert WORTH.revenue(one) == earned


def report(
    records: Sequence[UsageRecord],
    before: Iterable[str] = (),
    tenants: Sequence[Tenant] = (),
    costs: Costs | None = COSTS,
) -> Report:
    seen = frozenset(TenantId(name) for name in before)
    return build(records, seen, tenants, WORTH, costs, (0, 24 * HOUR_MS), 24 * HOUR_MS - 1)


def test_report_without_records_is_zero() -> None:
    found = report([])
    assert (found.total.revenue_nanos, found.total.margin_percent, found.churn_percent) == (0, None, None)


def test_sums_stand_by_plan_adapter_and_tenant_largest_first() -> None:
    records = [
        record(OVERAGE, 10_000_000),
        record(OVERAGE, 30_000_000, tenant=TenantId("globex"), adapter="yaml@1", plan="pro"),
        record(OVERAGE, 5_000_000, adapter="pirate@newer", status=Status.CANCELLED),
    ]
    found = report(records)
    assert [(line.name, line.revenue_nanos) for line in found.by_adapter] == [
        ("yaml", 30_000_000),
        ("pirate", 15_000_000),
    ]
    assert [(line.name, line.records) for line in found.by_tenant] == [("globex", 1), ("acme", 2)]
    assert [line.name for line in found.by_plan] == ["pro", "prepaid"]
    assert found.total.revenue_nanos == 45_000_000
    assert found.by_status == {"complete": 2, "cancelled": 1, "failed": 0, "expired": 0}
    assert found.by_hour[5] == 3
    assert sum(found.by_hour) == 3


def test_margin_is_what_is_left_of_the_revenue_and_below_cost_is_marked() -> None:
    earns = record(OVERAGE, 4_000_000)
    loses = record(OVERAGE, 999_999, adapter="yaml@1")
    lines = {line.name: line for line in report([earns, loses]).by_adapter}
    assert (lines["pirate"].cost_nanos, lines["pirate"].margin_percent, lines["pirate"].is_below_cost) == (
        1_000_000,
        75,
        False,
    )
    assert (lines["yaml"].margin_percent, lines["yaml"].is_below_cost) == (-1, True)
    assert lines["pirate"].completion_per_compute_second == 50
    assert [line.cost_nanos for line in report([earns], costs=None).by_adapter] == [None]


def subscribed(name: str, status: SubscriptionStatus, ends_ms: int) -> Tenant:
    one = Subscription(id=f"sub_{name}", plan="pro", status=status, period_start_ms=0, period_end_ms=ends_ms)
    return Tenant(id=TenantId(name), email="a@example.com", plan="pro", subscription=one)


def test_recurring_revenue_counts_live_subscriptions_and_churn_those_who_stopped() -> None:
    tenants = [
        subscribed("acme", SubscriptionStatus.ACTIVE, 99 * HOUR_MS),
        subscribed("globex", SubscriptionStatus.CANCELLED, 3 * HOUR_MS),
        subscribed("initech", SubscriptionStatus.CANCELLED, 24 * HOUR_MS),
        subscribed("hooli", SubscriptionStatus.PAUSED, 99 * HOUR_MS),
    ]
    found = report([record(OVERAGE, 1)], {"acme", "globex", "hooli"}, tenants)
    assert (found.recurring_nanos, found.live_subscriptions, found.ended_subscriptions) == (100 * USD, 1, 1)
    assert (found.lost, found.churn_percent) == ({"globex", "hooli"}, 66)


def test_recurring_revenue_is_what_each_subscription_was_sold_at() -> None:
    """The plan is $100 a month; one pays what it was sold at before, one was stored before that was kept."""
    plan = Plan.model_validate({"kind": "subscription", "monthly_price": "20", "allowance": {"usd": "10"}})
    former, other = (subscribed(name, SubscriptionStatus.ACTIVE, 99 * HOUR_MS) for name in ("acme", "globex"))
    assert former.subscription is not None
    sold = former.subscription.model_copy(update={"sold": Terms.of_plan("pro", plan)})
    found = report([record(OVERAGE, 1)], tenants=[former.model_copy(update={"subscription": sold}), other])
    assert found.recurring_nanos == 120 * USD


def test_what_is_known_only_of_now_stands_in_no_past_span() -> None:
    tenants = [subscribed("acme", SubscriptionStatus.ACTIVE, 99 * HOUR_MS)]
    found = build([], frozenset(), tenants, WORTH, None, (0, 24 * HOUR_MS), 24 * HOUR_MS)
    assert (found.recurring_nanos, found.live_subscriptions, found.ended_subscriptions) == (None, None, None)


def test_cost_is_that_of_the_catalog_in_force_then() -> None:
    """An hour at 3.60, then at 7.20; where nobody said what an hour costs, the whole line's cost is unknown."""
    priced = [
        (start * HOUR_MS, CATALOG.model_copy(update={"costs": Costs.model_validate({"gpu_hour": cost})}))
        for start, cost in ((3, "3.60"), (5, "7.20"))
    ]
    worth = replace(WORTH, history=CatalogHistory.of((0, CATALOG), *priced))
    late = [record(OVERAGE, USD, occurred_at_ms=hour * HOUR_MS) for hour in (3, 4, 5)]
    early = record(OVERAGE, USD, occurred_at_ms=2 * HOUR_MS, adapter="yaml@1")
    found = build([*late, early], frozenset(), [], worth, None, (0, 24 * HOUR_MS), 0)
    assert {line.name: line.cost_nanos for line in found.by_adapter} == {"pirate": 4_000_000, "yaml": None}
    assert found.total.cost_nanos is None


def test_draw_is_worth_what_its_credit_was_sold_for_whatever_is_sold_now() -> None:
    sold = Draw(BucketId("payment:pay_1:pdt_bonus"), Unit.NANOS, 3, price=7 * 10**18, sold=10**15)
    assert WORTH.revenue(record("", 0, draws=(sold,))) == 21_000
    rounded = replace(sold, price=10, sold=9)
    assert WORTH.revenue(record("", 0, draws=(rounded,))) == 4


def test_record_of_before_is_valued_by_the_catalog_of_its_time() -> None:
    dear = CATALOG.model_validate(
        CATALOG.model_dump() | {"packs": {"bonus": {"price": "100", "grants": {"usd": "55"}}}, "plans": PLANS_LATER}
    )
    worth = replace(WORTH, history=CatalogHistory.of((0, CATALOG), (6 * HOUR_MS, dear)))
    one = record("payment:pay_1:pdt_bonus", 11 * USD)
    assert [worth.revenue(replace(one, occurred_at_ms=hour * HOUR_MS)) for hour in (5, 6)] == [10 * USD, 20 * USD]
    quota = record("allowance:sub_1:0", 1, Unit.REQUESTS, plan="pro")
    assert worth.revenue(replace(quota, occurred_at_ms=7 * HOUR_MS)) == 20_000_000, "retired, on its last terms"


def test_tenant_that_got_nothing_counts_as_lost() -> None:
    found = report([record(OVERAGE, 0, usage=NOTHING, draws=(), status=Status.FAILED)], {"acme"})
    assert (found.active, found.lost, found.churn_percent) == (set(), {"acme"}, 100)


def test_tenant_created_after_the_span_is_in_no_arm() -> None:
    experiment = {"id": "raise", "arms": [{"id": "control"}, {"id": "raised"}]}
    pricing = CATALOG.pricing.model_validate({"experiments": [experiment]})
    worth = replace(WORTH, history=CatalogHistory.of((0, CATALOG.model_copy(update={"pricing": pricing}))))
    tenants = [
        Tenant(id=TenantId(f"t{n}"), email="a@example.com", plan="pro", created_at_ms=n * HOUR_MS) for n in range(48)
    ]
    found = build([], frozenset(), tenants, worth, None, (0, 24 * HOUR_MS), 48 * HOUR_MS)
    assert sum(arm.tenants for arm in found.arms) == 24


def test_suggested_price_leaves_the_wanted_margin() -> None:
    rates = suggest(COSTS, Speeds(completion_per_s=1_000, prompt_per_s=10_000), margin_percent=60)
    assert (rates.output_per_1m, rates.input_per_1m) == (2_500_000_000, 250_000_000)
    assert rates.cached_input_per_1m == 25_000_000
    hour = Usage(completion_tokens=3_600_000, requests=0)
    assert rates.charge(hour) == 9 * USD, "an hour that costs 3.60 and leaves 60 %"
    half = suggest(COSTS, Speeds(1_000, 10_000, busy_percent=50), margin_percent=60)
    assert half.output_per_1m == 2 * rates.output_per_1m
    assert per_request(rates, 400, 200) == 600_000
    assert per_compute_second(COSTS, 60) == 2_500_000
    assert Price.model_validate_json(rates.model_dump_json()) == rates, "what is suggested can be configured"


@pytest.mark.parametrize("bad", [(0, 1, 100), (1, 0, 100), (1, 1, 0), (1, 1, 101)])
def test_absurd_speeds_are_refused(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Speeds(*bad)


@pytest.mark.parametrize("margin", [-1, 100])
def test_absurd_margin_is_refused(margin: int) -> None:
    with pytest.raises(ValueError, match="between 0 and 99"):
        suggest(COSTS, Speeds(1, 1), margin)
