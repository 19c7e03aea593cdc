"""80 and 100 % of an allowance or a cap, and a low balance, make notices, once for each subject."""

import pytest

from billing.catalog.plans import Plan
from billing.ledger.account import Account, Bucket
from billing.money import Nanos
from billing.notices.thresholds import notices_for
from billing.tenants.tenant import Subscription, SubscriptionStatus, Tenant
from billing.usage import BucketId, TenantId, Unit

ACME, NOW, USD = TenantId("acme"), 1_000, 1_000_000_000
PREPAID = Plan.model_validate({"kind": "prepaid", "low_balance": "2"})
PRO = Plan.model_validate({"kind": "subscription", "allowance": {"requests": 10}, "credit_limit": "10"})
SUBSCRIBED = Tenant(
    id=ACME,
    email="a@example.com",
    plan="pro",
    subscription=Subscription(
        id="sub_1", plan="pro", status=SubscriptionStatus.ACTIVE, period_start_ms=0, period_end_ms=9_000
    ),
)


def account(*buckets: Bucket, overage: int = 0) -> Account:
    balance = Nanos(sum(bucket.remaining for bucket in buckets if bucket.unit is Unit.NANOS))
    return Account(ACME, buckets, balance, balance, Nanos(0), 0, Nanos(overage), seq=1, open_holds=0)


def found(tenant: Tenant, plan: Plan, state: Account) -> list[str]:
    return [notice.once for notice in notices_for(tenant, plan, state, NOW)]


@pytest.mark.parametrize(("left", "marks"), [(10, []), (3, []), (2, [80]), (1, [80]), (0, [80, 100]), (-1, [80, 100])])
def test_allowance_is_noticed_at_80_and_100_percent(left: int, marks: list[int]) -> None:
    bucket = Bucket(BucketId("allowance:sub_1:0"), Unit.REQUESTS, left, 10, 9_000, is_allowance=True)
    assert found(SUBSCRIBED, PRO, account(bucket)) == [f"allowance:allowance:sub_1:0:{mark}" for mark in marks]


def test_allowance_of_an_ended_period_is_not_noticed() -> None:
    bucket = Bucket(BucketId("allowance:sub_1:0"), Unit.REQUESTS, 0, 10, NOW, is_allowance=True)
    assert found(SUBSCRIBED, PRO, account(bucket)) == []


@pytest.mark.parametrize(("overage", "marks"), [(0, []), (8 * USD - 1, []), (8 * USD, [80]), (10 * USD, [80, 100])])
def test_credit_limit_is_noticed_in_each_period(overage: int, marks: list[int]) -> None:
    assert found(SUBSCRIBED, PRO, account(overage=overage)) == [f"overage:sub_1:0:{mark}" for mark in marks]


def test_low_balance_is_noticed_again_after_a_purchase() -> None:
    tenant = Tenant(id=ACME, email="a@example.com", plan="prepaid")
    first = Bucket(BucketId("payment:1"), Unit.NANOS, 2 * USD, 5 * USD)
    assert found(tenant, PREPAID, account()) == [], "a tenant that never bought is not low"
    assert found(tenant, PREPAID, account(Bucket(first.id, Unit.NANOS, 2 * USD + 1, 5 * USD))) == []
    (once,) = found(tenant, PREPAID, account(first))
    lower = Bucket(first.id, Unit.NANOS, 1, 5 * USD)
    assert found(tenant, PREPAID, account(lower)) == [once]
    second = Bucket(BucketId("payment:2"), Unit.NANOS, 1, 5 * USD)
    assert found(tenant, PREPAID, account(lower, second)) not in ([], [once])
