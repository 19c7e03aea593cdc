"""Which plan a subscription gives, and how long credit lasts when its payment is late."""

from dataclasses import replace

import pytest

from billing.catalog.catalog import Catalog
from billing.catalog.terms import Terms
from billing.commerce.subscriptions import applied, as_stored
from billing.commerce.waiting import NotYet
from billing.dodo.wire import DodoSubscription
from billing.export.events import BOUNDARY_MS
from billing.ledger.admission import funding_for
from billing.periodic import Intervals
from billing.tenants.tenant import LAST_CHARGES_MS, Subscription, SubscriptionStatus, Tenant
from billing.usage import TenantId
from tests.support.world import CATALOG, DAY, MINUTE

NOW = 1_795_000_000_000
PLAN = Catalog.model_validate(CATALOG).plans["payg"]
SOLD = Terms.of_plan("payg", PLAN)
S = SubscriptionStatus


def sub(status: SubscriptionStatus, id_: str = "sub_1", grace_ends: int | None = None) -> Subscription:
    return Subscription(
        id=id_, plan="payg", status=status, period_start_ms=0, period_end_ms=NOW, past_due_ends_at_ms=grace_ends
    )


def tenant(plan: str = "prepaid", subscription: Subscription | None = None) -> Tenant:
    return Tenant(id=TenantId("acme"), email="a@example.com", plan=plan, subscription=subscription)


@pytest.mark.parametrize(
    ("status", "plan"),
    [
        (S.PENDING, "prepaid"),
        (S.ACTIVE, "payg"),
        (S.PAST_DUE, "payg"),
        (S.ON_HOLD, "payg"),
        (S.PAUSED, "payg"),
        (S.CANCELLED, "prepaid"),
        (S.EXPIRED, "prepaid"),
        (S.FAILED, "prepaid"),
    ],
)
def test_plan_follows_the_status(status: SubscriptionStatus, plan: str) -> None:
    now = applied(tenant(), sub(status), "prepaid", NOW)
    assert (now.plan, now.subscription) == (plan, sub(status))


@pytest.mark.parametrize("status", [S.CANCELLED, S.EXPIRED, S.FAILED, S.PENDING])
def test_another_subscription_that_is_not_live_changes_nothing(status: SubscriptionStatus) -> None:
    before = tenant("payg", sub(S.ACTIVE))
    assert applied(before, sub(status, "sub_2"), "prepaid", NOW) == before


def test_only_one_subscription_may_extend_credit() -> None:
    with pytest.raises(NotYet, match="sub_1"):
        applied(tenant("payg", sub(S.ACTIVE)), sub(S.ACTIVE, "sub_2"), "prepaid", NOW)
    after_grace = tenant("payg", sub(S.PAST_DUE, grace_ends=NOW))
    replaced = applied(after_grace, sub(S.ACTIVE, "sub_2"), "prepaid", NOW).subscription
    assert replaced is not None
    assert replaced.id == "sub_2"


def test_operators_plan_outlives_an_ended_subscription() -> None:
    assert applied(tenant("pro", sub(S.ACTIVE)), sub(S.CANCELLED), "prepaid", NOW).plan == "pro"


def test_changed_and_cancelled_plan_ends() -> None:
    before = tenant("pro", sub(S.ACTIVE).model_copy(update={"plan": "pro"}))
    assert applied(before, sub(S.CANCELLED), "prepaid", NOW).plan == "prepaid"
    other = applied(tenant("pro", sub(S.EXPIRED, "sub_0")), sub(S.CANCELLED), "prepaid", NOW)
    assert other.plan == "pro", "the operator's choice"


def past_due(ends_at_ms: int | None = None) -> DodoSubscription:
    return DodoSubscription("sub_1", "cus", "prd", S.PAST_DUE, 0, NOW, False, ends_at_ms)


@pytest.mark.parametrize(
    ("before", "dodo_ms", "ends_ms"),
    [
        (None, None, NOW + 2 * DAY),
        (sub(S.ACTIVE), None, NOW + 2 * DAY),
        (sub(S.PAST_DUE, grace_ends=NOW + DAY), None, NOW + DAY),
        (sub(S.PAST_DUE, "sub_0", grace_ends=NOW + DAY), None, NOW + 2 * DAY),
        (None, NOW + MINUTE, NOW + MINUTE),
        (None, NOW + 9 * DAY, NOW + 2 * DAY),
    ],
)
def test_grace_runs_from_the_first_event_and_not_beyond_dodos(
    before: Subscription | None, dodo_ms: int | None, ends_ms: int
) -> None:
    stored = as_stored(past_due(), SOLD, PLAN, tenant("payg", before), dodo_ms, NOW)
    assert stored.past_due_ends_at_ms == ends_ms
    assert stored.extends_credit(ends_ms - 1)
    assert not stored.extends_credit(ends_ms)


@pytest.mark.parametrize(
    ("before", "now_at_dodo", "stored"),
    [
        (None, 5, 5),
        (None, None, None),
        (5, None, 5),  # it goes on, and until when usage was billed stays known
        (5, 9, 9),
    ],
)
def test_start_of_the_last_pause_is_kept(before: int | None, now_at_dodo: int | None, stored: int | None) -> None:
    found = replace(past_due(), status=S.PAUSED if now_at_dodo else S.ACTIVE, paused_at_ms=now_at_dodo)
    known = sub(S.ACTIVE).model_copy(update={"paused_at_ms": before})
    assert as_stored(found, SOLD, PLAN, tenant("payg", known), None, NOW).paused_at_ms == stored
    other = known.model_copy(update={"id": "sub_0"})
    assert as_stored(found, SOLD, PLAN, tenant("payg", other), None, NOW).paused_at_ms == now_at_dodo


def test_last_period_extends_no_credit_near_its_end() -> None:
    renewing = sub(S.ACTIVE)
    last = renewing.model_copy(update={"cancel_at_period_end": True})
    assert renewing.extends_credit(NOW - 1)
    assert last.extends_credit(NOW - LAST_CHARGES_MS - 1)
    assert not last.extends_credit(NOW - LAST_CHARGES_MS)
    assert last.is_live(NOW), "a second subscription must wait until Dodo has ended the first"
    assert Intervals().flush_s * 1_000 + BOUNDARY_MS <= LAST_CHARGES_MS


@pytest.mark.parametrize("ago_ms", [1, LAST_CHARGES_MS])
def test_allowance_of_the_last_period_lasts_to_its_end(ago_ms: int) -> None:
    last = sub(S.ACTIVE).model_copy(update={"cancel_at_period_end": True, "plan": "pro"})
    plan = Catalog.model_validate(CATALOG).plans["pro"]
    funding = funding_for(tenant("pro", last), plan, NOW - ago_ms)
    assert funding.allowance is not None
    assert funding.credit_limit == 0
    assert funding_for(tenant("pro", last), plan, NOW - LAST_CHARGES_MS - 1).credit_limit == plan.credit_limit
