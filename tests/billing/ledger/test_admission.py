"""From a plan, a price and a clock to a hold."""

from datetime import UTC, datetime
from decimal import Decimal

import pytest
from redis.asyncio import Redis

from billing.catalog.catalog import Catalog, Model
from billing.catalog.plans import Plan
from billing.ledger.account import Funding
from billing.ledger.admission import Admission, funding_for, plan_of
from billing.ledger.errors import InsufficientCredits, RateLimited
from billing.ledger.ledger import Ledger
from billing.tenants.tenant import Principal, Subscription, SubscriptionStatus, Tenant, new_key
from billing.usage import RequestId, Unit
from tests.support.clock import SteppedClock
from tests.support.samples import ACME, PER_TOKEN, money, settlement

FREE = Plan.model_validate({"kind": "free", "allowance": {"requests": 2}})
PREPAID = Plan.model_validate({"kind": "prepaid", "limits": {"requests_per_minute": 5}})
PAYG = Plan.model_validate({"kind": "pay_as_you_go", "credit_limit": "0.001"})
PRO = Plan.model_validate({"kind": "subscription", "allowance": {"usd": "0.00003"}, "credit_limit": "0.001"})
PIRATE = Model(id="pirate", price=PER_TOKEN, path="/a/pirate", digest="0123456789abcdef" * 4)
CATALOG = Catalog(
    models=(PIRATE,), plans={"free": FREE, "prepaid": PREPAID, "payg": PAYG, "pro": PRO}, default_plan="prepaid"
)


def ms(text: str) -> int:
    return int(Decimal(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 1000)


def tenant(of_plan: str, **subscription: object) -> Tenant:
    carried = None
    if subscription:
        defaults = {"id": "sub_1", "plan": of_plan, "period_start_ms": 1_000, "period_end_ms": 2_000}
        carried = Subscription.model_validate(defaults | subscription)
    return Tenant(id=ACME, email="ops@acme.test", plan=of_plan, subscription=carried)


def principal(of_plan: str, **subscription: object) -> Principal:
    return Principal(new_key(ACME, 0)[1], tenant(of_plan, **subscription))


@pytest.mark.parametrize(
    ("now", "month", "ends"),
    [
        ("2026-11-30T23:59:59.999", "2026-11", "2026-12-01T00:00:00"),
        ("2026-12-01T00:00:00", "2026-12", "2027-01-01T00:00:00"),
        ("2028-02-29T12:00:00", "2028-02", "2028-03-01T00:00:00"),
    ],
)
def test_a_free_allowance_is_one_calendar_month_s(now: str, month: str, ends: str) -> None:
    allowance = funding_for(tenant("free"), FREE, ms(now)).allowance
    assert allowance is not None
    assert (allowance.id, allowance.expires_at_ms) == (f"allowance:free:{month}:free", ms(ends))
    assert (allowance.unit, allowance.remaining, allowance.is_allowance) == (Unit.REQUESTS, 2, True)


def test_a_subscription_brings_its_period_s_allowance_and_credit() -> None:
    funding = funding_for(tenant("pro", status="active"), PRO, 1_500)
    assert funding.allowance is not None
    assert (funding.allowance.id, funding.allowance.expires_at_ms) == ("allowance:sub_1:1000:pro", 2_000)
    assert funding.credit_limit == 1_000_000


@pytest.mark.parametrize(
    ("subscription", "now", "cap", "has_allowance"),
    [
        ({"status": "active"}, 1_999, 1_000_000, True),
        ({"status": "active"}, 2_000, 1_000_000, False),
        ({"status": "past_due", "past_due_ends_at_ms": 1_600}, 1_599, 1_000_000, True),
        ({"status": "past_due", "past_due_ends_at_ms": 1_600}, 1_600, 0, False),
        ({"status": "cancelled"}, 1_500, 0, False),
        ({"status": "on_hold"}, 1_500, 0, False),
        ({"status": "paused"}, 1_500, 0, False),
        ({"status": "active", "plan": "payg"}, 1_500, 0, False),
        ({}, 1_500, 0, False),
    ],
)
def test_credit_is_extended_only_while_a_subscription_carries_it(
    subscription: dict[str, object], now: int, cap: int, has_allowance: bool
) -> None:
    funding = funding_for(tenant("pro", **subscription), PRO, now)
    assert (funding.credit_limit, funding.allowance is not None) == (cap, has_allowance)


def test_pay_as_you_go_has_no_allowance_and_prepaid_nothing() -> None:
    assert funding_for(tenant("payg", status="active"), PAYG, 1_500) == Funding(credit_limit=PAYG.credit_limit)
    assert funding_for(tenant("payg"), PAYG, 1_500) == Funding()
    assert funding_for(tenant("prepaid", status="active"), PREPAID, 1_500) == Funding()


def test_a_plan_that_is_no_longer_offered_gives_way_to_the_default() -> None:
    assert plan_of(tenant("gone"), CATALOG) == PREPAID


async def test_all_four_plans_are_admitted_each_by_its_own_money(ledger: Ledger, clock: SteppedClock) -> None:
    admission, clock.now_ms = Admission(ledger, clock), 1_500
    await ledger.grant(money(50_000))
    drawn = {}
    for plan in ("free", "pro", "prepaid", "payg"):
        who = principal(plan, **({"status": SubscriptionStatus.ACTIVE} if plan in ("pro", "payg") else {}))
        hold = await admission.admit(who, PIRATE, CATALOG, RequestId(f"req_{plan}"), 10, 20)
        drawn[plan] = [d.bucket for d in hold.draws]
        assert hold.request.adapter == "pirate@0123456789ab"
    assert drawn == {
        "free": ["allowance:free:1970-01:free"],
        "pro": ["allowance:sub_1:1000:pro", "payment:1"],
        "prepaid": ["payment:1"],
        "payg": ["overage"],
    }


@pytest.mark.parametrize(
    ("plan", "subscription", "source"),
    [
        ("prepaid", {}, "balance"),
        ("payg", {}, "subscription"),
        ("payg", {"status": "cancelled"}, "subscription"),
        ("payg", {"status": "active"}, "overage_cap"),
    ],
)
async def test_a_refusal_says_what_is_short(
    ledger: Ledger, clock: SteppedClock, plan: str, subscription: dict[str, object], source: str
) -> None:
    admission, clock.now_ms = Admission(ledger, clock), 1_500
    with pytest.raises(InsufficientCredits) as refused:
        await admission.admit(principal(plan, **subscription), PIRATE, CATALOG, RequestId("r"), 5_000, 20)
    assert refused.value.limit_source == source


@pytest.mark.parametrize(
    ("paused", "why"),
    [
        ({"dispute:dp_1": 0, "refund:ref_1": 1_000}, "its fee is disputed (dp_1), until that is decided"),
        ({"refund:ref_1": 1_000}, "its fee was refunded (ref_1), until 1970-01-01T00:00:02Z"),
        ({"dispute:dp_1": 1_000}, "its fee was lost in a dispute (dp_1), until 1970-01-01T00:00:02Z"),
    ],
)
async def test_a_refusal_says_why_credit_is_paused_and_until_when(
    ledger: Ledger, clock: SteppedClock, paused: dict[str, int], why: str
) -> None:
    admission, clock.now_ms = Admission(ledger, clock), 1_500
    who = principal("payg", status="active", credit_paused=paused)
    with pytest.raises(InsufficientCredits, match="buy a pack") as refused:
        await admission.admit(who, PIRATE, CATALOG, RequestId("r"), 10, 20)
    quoted = (await admission.quote(who, PIRATE, CATALOG, 10, 20)).refusal
    for refusal in (refused.value, quoted):
        assert isinstance(refusal, InsufficientCredits)
        assert refusal.limit_source == "subscription_fee"
        assert why in str(refusal)
        assert "invoice" not in str(refusal)


async def test_a_plan_s_limits_reach_the_hold(ledger: Ledger) -> None:
    admission, who = Admission(ledger), principal("prepaid")
    await ledger.grant(money(1_000_000))
    for n in range(5):
        await admission.admit(who, PIRATE, CATALOG, RequestId(f"req_{n}"), 10, 20)
    with pytest.raises(RateLimited):
        await admission.admit(who, PIRATE, CATALOG, RequestId("req_5"), 10, 20)


async def test_a_quote_says_the_cost_and_the_fate_and_changes_nothing(ledger: Ledger, store: Redis) -> None:
    admission, who = Admission(ledger), principal("prepaid")
    refused = await admission.quote(who, PIRATE, CATALOG, 10, 20)
    assert (refused.cost_nanos, refused.is_admitted, refused.max_tokens) == (50_000, False, 0)
    assert isinstance(refused.refusal, InsufficientCredits)
    await ledger.grant(money(40_000))
    before = await store.dbsize()
    for _ in range(10):
        clamped = await admission.quote(who, PIRATE, CATALOG, 10, 20)
    assert (clamped.is_admitted, clamped.max_tokens, clamped.cost_nanos) == (True, 15, 50_000)
    assert await store.dbsize() == before
    hold = await admission.admit(who, PIRATE, CATALOG, RequestId("req_1"), 10, 20)
    assert hold.max_tokens == clamped.max_tokens


async def test_compute_is_held_where_a_price_counts_it(ledger: Ledger) -> None:
    admission = Admission(ledger, max_compute_ms=2_000)
    timed = PIRATE.model_copy(update={"price": PER_TOKEN.model_copy(update={"per_compute_second": 1_000_000})})
    await ledger.grant(money(10_000_000))
    hold = await admission.admit(principal("prepaid"), timed, CATALOG, RequestId("req_1"), 10, 20)
    assert sum(d.amount for d in hold.draws) == 50_000 + 2_000_000
    assert (await ledger.settle(settlement("req_1"))).record.charged_nanos == 20_000
