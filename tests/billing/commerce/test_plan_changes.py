"""A change of plan: what it charges, what becomes of allowance and exposure, and that a failed one changes nothing."""

import asyncio

import pytest

from billing.catalog.catalog import Catalog
from billing.commerce.inbox import Outcome
from billing.commerce.plan_changes import ChangeState, PlanChange, PlanChangeRefused, PlanChanges, PlanPaymentFailed
from billing.commerce.sync import sync
from billing.dodo.errors import DodoRefused, DodoUnavailable
from billing.money import divide_up
from billing.notices.log import Notices
from billing.notices.notice import NoticeKind
from billing.store.keys import shard_for
from billing.tenants.tenant import Subscription
from tests.support.purchases import (
    ACME,
    AUTH,
    USD,
    account,
    items,
    patch_subscription,
    reconcile,
    refund,
    spend,
    subscribe,
)
from tests.support.world import CATALOG, DAY, HOUR, World, delivery

PLANS: dict[str, object] = {
    "prepaid": {"kind": "prepaid"},
    "payg": {"kind": "pay_as_you_go", "credit_limit": "25"},
    "pro": {"kind": "subscription", "monthly_price": "20", "allowance": {"usd": "10"}, "credit_limit": "50"},
    "team": {"kind": "subscription", "monthly_price": "50", "allowance": {"usd": "30"}, "credit_limit": "90"},
}


@pytest.fixture
async def shop(world: World) -> World:
    await sell(world, PLANS)
    await world.tenant("acme")
    return world


async def sell(world: World, plans: dict[str, object]) -> None:
    world.catalog = Catalog.model_validate(CATALOG | {"plans": plans})
    await sync(world.dodo, world.redis, world.catalog)


async def begin(world: World, plan: str) -> Subscription:
    started = await subscribe(world, plan)
    await world.webhooks().receive(*delivery("subscription.active", {"subscription_id": started}, "msg_begin"))
    return await subscription(world)


async def subscription(world: World) -> Subscription:
    stored = (await world.tenants.get(ACME)).subscription
    assert stored is not None
    return stored


async def change(world: World, plan: str) -> PlanChange:
    return await PlanChanges(world.commerce()).change(await world.tenants.get(ACME), plan)


async def bill(world: World, payment_id: str, copies: int = 1) -> dict[str, object]:
    """The payment of a change, after so many deliveries of its webhook."""
    payment: dict[str, object] = (await world.operator.get(f"/payments/{payment_id}", headers=AUTH)).json()
    for copy in range(copies):
        await world.webhooks().receive(*delivery("payment.succeeded", payment, f"msg_{payment_id}_{copy}"))
    return payment


async def pass_to(world: World, at_ms: int) -> None:
    world.clock.move(at_ms - world.clock())
    await world.operator.post("/_sandbox/clock", json={"advance_s": 0})


async def failures(world: World) -> list[dict[str, str]]:
    newest = await Notices(world.redis).newest()
    return [dict(one.facts) for one in newest if one.kind is NoticeKind.PLAN_CHANGE_FAILED]


async def test_upgrade_counts_at_once_and_bills_usage_once(shop: World) -> None:
    old = await begin(shop, "pro")
    await pass_to(shop, old.period_start_ms + 10 * DAY)
    await shop.use("acme", charged=5 * USD, overage=5 * USD)
    await shop.redis.hset(shard_for(ACME).account(ACME), "overage", str(5 * USD + 99))
    await shop.exporter().flush_once()
    shop.clock.move(HOUR)
    quote = await PlanChanges(shop.commerce()).quote(await shop.tenants.get(ACME), "team")
    made = await change(shop, "team")
    assert made.state is ChangeState.CHANGED
    payment = await bill(shop, made.payment_id, copies=3)
    unused = (2_000 * (old.period_end_ms - made.effective_at_ms)) / (old.period_end_ms - old.period_start_ms)
    assert payment["total_amount"] == quote.total == 5_000 - round(unused) + 500
    tenant, now = await shop.tenants.get(ACME), await subscription(shop)
    assert (tenant.plan, now.id, now.period_start_ms) == ("team", old.id, made.effective_at_ms)
    assert now.sold is not None
    assert now.sold.price == 50 * USD
    assert (await shop.ledger.account(ACME)).overage_nanos == 99


@pytest.mark.parametrize("spent", ["", "2", "10"])
async def test_upgrade_takes_what_was_overspent_from_the_new_allowance(shop: World, spent: str) -> None:
    """A day of the period has passed, so nearly all of the old fee is credited: what was spent beyond comes off."""
    old = await begin(shop, "pro")
    if spent:
        await spend(shop, spent)
    await pass_to(shop, old.period_start_ms + DAY)
    made = await change(shop, "team")
    await bill(shop, made.payment_id, copies=2)
    length = old.period_end_ms - old.period_start_ms
    taken = divide_up(10 * USD * (old.period_end_ms - made.effective_at_ms), length)
    debt = max(0, int(spent or "0") * USD - (10 * USD - taken))
    assert (await account(shop)).balance_nanos == 30 * USD - debt
    assert (await reconcile(shop)).is_clean


@pytest.mark.parametrize(("plan", "brings"), [("pro", 10), ("payg", 0)])
async def test_overspent_allowance_that_the_new_plan_does_not_cover_is_a_debt(
    shop: World, plan: str, brings: int
) -> None:
    """In Dodo's portal a cheaper plan may count at once, with the rest of the old fee given back."""
    old = await begin(shop, "team")
    await spend(shop, "30")
    shop.clock.move(DAY)
    asked = {
        "product_id": await shop.product(f"plan:{plan}"),
        "quantity": 1,
        "proration_billing_mode": "prorated_immediately",
    }
    (await shop.operator.post(f"/subscriptions/{old.id}/change-plan", json=asked, headers=AUTH)).raise_for_status()
    for copy in range(2):
        changed = delivery("subscription.plan_changed", {"subscription_id": old.id}, f"msg_{copy}")
        assert (await shop.webhooks().receive(*changed)).outcome is Outcome.APPLIED
    left_ms = old.period_end_ms - (await subscription(shop)).period_start_ms
    over = divide_up(30 * USD * left_ms, old.period_end_ms - old.period_start_ms)
    assert (await account(shop)).balance_nanos == brings * USD - over
    assert (await reconcile(shop)).is_clean


async def test_hopping_between_plans_gives_no_fresh_allowance(shop: World) -> None:
    """Each change takes the allowance back that it leaves, though no payment's webhook comes."""
    await sell(shop, PLANS | {"alt": PLANS["pro"]})
    await begin(shop, "pro")
    await spend(shop, "10")
    for plan in ("alt", "pro", "alt", "pro", "alt"):
        shop.clock.move(1_000)
        await change(shop, plan)
        await spend(shop, "10")
    now = await account(shop)
    assert now.balance_nanos == 0
    assert 49 * USD < now.overage_nanos <= 50 * USD
    assert (await reconcile(shop)).is_clean


async def test_change_made_elsewhere_takes_the_allowance_back_that_it_leaves(shop: World) -> None:
    """As in Dodo's portal, or on another gateway that had read the subscription before our own change."""
    best = {"kind": "subscription", "monthly_price": "90", "allowance": {"usd": "60"}, "credit_limit": "90"}
    await sell(shop, PLANS | {"max": best})
    await begin(shop, "pro")
    shop.clock.move(DAY)
    await change(shop, "team")
    left = await subscription(shop)
    await spend(shop, "30")
    shop.clock.move(HOUR)
    asked = {
        "product_id": await shop.product("plan:max"),
        "quantity": 1,
        "proration_billing_mode": "prorated_immediately",
    }
    path = f"/subscriptions/{left.id}/change-plan"
    (await shop.operator.post(path, json=asked, headers=AUTH)).raise_for_status()
    for copy in range(2):
        changed = {"subscription_id": left.id}
        await shop.webhooks().receive(*delivery("subscription.plan_changed", changed, f"msg_changed_{copy}"))
    now = await subscription(shop)
    length = left.period_end_ms - left.period_start_ms
    debt = divide_up(30 * USD * (left.period_end_ms - now.period_start_ms), length)
    assert now.plan == "max"
    assert (await account(shop)).balance_nanos == 60 * USD - debt


async def test_change_after_a_crash_of_an_earlier_one_takes_from_its_own_allowance(shop: World) -> None:
    """The earlier one took from its plan's allowance and the plan was not stored: nobody can draw on that."""
    old = await begin(shop, "payg")
    await change(shop, "pro")
    left = await subscription(shop)
    await spend(shop, "10")
    shop.clock.move(DAY)
    await change(shop, "team")
    await shop.tenants.update(ACME, lambda now: now.model_copy(update={"subscription": left, "plan": "pro"}))
    await sell(shop, PLANS | {"other": PLANS["team"]})
    shop.clock.move(DAY)
    asked = {
        "product_id": await shop.product("plan:other"),
        "quantity": 1,
        "proration_billing_mode": "prorated_immediately",
    }
    (await shop.operator.post(f"/subscriptions/{old.id}/change-plan", json=asked, headers=AUTH)).raise_for_status()
    told = await shop.webhooks().receive(*delivery("subscription.plan_changed", {"subscription_id": old.id}, "msg_o"))
    assert told.outcome is Outcome.APPLIED
    left_ms = left.period_end_ms - (await subscription(shop)).period_start_ms
    taken = divide_up(10 * USD * left_ms, left.period_end_ms - left.period_start_ms)
    assert (await account(shop)).balance_nanos == 30 * USD - taken


async def test_fee_heard_of_after_a_change_bought_the_allowance_of_its_own_plan(shop: World) -> None:
    await begin(shop, "pro")
    (fee,) = await items(shop, "/payments")
    await spend(shop, "10")
    shop.clock.move(15 * DAY)
    made = await change(shop, "team")
    await bill(shop, made.payment_id)
    await bill(shop, str(fee["payment_id"]))
    back = await refund(shop, fee)
    assert (await shop.webhooks().receive(*delivery("refund.succeeded", back, "msg_r"))).outcome is Outcome.APPLIED
    # Half of pro's fee was taken off team's, and so were 5 of its 10 that were spent. Then all of pro's are refunded.
    assert (await account(shop)).balance_nanos == (30 - 5 - 10) * USD


@pytest.mark.parametrize("is_refunded_first", [True, False])
async def test_upgrade_extends_credit_after_the_fee_before_it_was_refunded(
    shop: World, is_refunded_first: bool
) -> None:
    """The refunded fee's period is over: the upgrade ended it and was paid.

    Dodo takes the share of the fee that was left off team's, though it is refunded: so much of team's allowance goes.
    """
    old = await begin(shop, "pro")
    (fee,) = await items(shop, "/payments")
    await bill(shop, str(fee["payment_id"]))
    if is_refunded_first:
        await shop.webhooks().receive(*delivery("refund.succeeded", await refund(shop, fee), "msg_r"))
        assert (await account(shop)).available_nanos == 0
    shop.clock.move(HOUR)
    await bill(shop, (await change(shop, "team")).payment_id)
    if not is_refunded_first:
        await shop.webhooks().receive(*delivery("refund.succeeded", await refund(shop, fee), "msg_r"))
    left_ms = old.period_end_ms - (await subscription(shop)).period_start_ms
    taken = divide_up(10 * USD * left_ms, old.period_end_ms - old.period_start_ms) if is_refunded_first else 0
    assert (await account(shop)).available_nanos == (30 + 90) * USD - taken


async def test_same_change_twice_at_once_is_made_once_and_is_no_failure(shop: World) -> None:
    await begin(shop, "pro")
    shop.clock.move(DAY)
    made = await asyncio.gather(*(change(shop, "team") for _ in range(2)))
    assert sorted(one.state for one in made) == [ChangeState.CHANGED, ChangeState.UNCHANGED]
    assert await failures(shop) == []
    assert len([one for one in await items(shop, "/payments") if one["charge_type"] == "plan_change"]) == 1


async def test_downgrade_counts_from_the_next_period(shop: World) -> None:
    old = await begin(shop, "team")
    quote = await PlanChanges(shop.commerce()).quote(await shop.tenants.get(ACME), "pro")
    made = await change(shop, "pro")
    assert made == PlanChange(ChangeState.SCHEDULED, old.period_end_ms)
    assert (quote.total, quote.effective_at_ms) == (0, old.period_end_ms)
    assert (await account(shop)).available_nanos == (30 + 90) * USD
    await pass_to(shop, old.period_end_ms + HOUR)
    renewal = next(one for one in await items(shop, "/payments") if one["charge_type"] == "renewal")
    assert renewal["total_amount"] == 2_000
    changed = {"subscription_id": old.id}
    await shop.webhooks().receive(*delivery("subscription.plan_changed", changed, "msg_changed"))
    assert (await shop.tenants.get(ACME)).plan == "pro"
    assert (await account(shop)).available_nanos == (10 + 50) * USD


async def test_scheduled_change_is_taken_back_by_asking_for_the_plan_of_now(shop: World) -> None:
    old = await begin(shop, "team")
    await change(shop, "pro")
    assert (await change(shop, "team")).state is ChangeState.UNCHANGED
    await pass_to(shop, old.period_end_ms + HOUR)
    renewal = next(one for one in await items(shop, "/payments") if one["charge_type"] == "renewal")
    assert renewal["total_amount"] == 5_000


async def test_scheduled_change_is_taken_back_for_nothing_at_other_terms(shop: World) -> None:
    """Team costs more since: whoever takes back the change to pro goes on paying what was agreed."""
    await begin(shop, "team")
    await change(shop, "pro")
    await sell(shop, PLANS | {"team": PLANS["team"] | {"monthly_price": "70"}})
    charged = len(await items(shop, "/payments"))
    assert (await change(shop, "team")).state is ChangeState.UNCHANGED
    assert len(await items(shop, "/payments")) == charged
    assert (await change(shop, "team")).state is ChangeState.CHANGED, "asked again, it comes to the terms of now"


async def test_later_change_takes_the_place_of_a_scheduled_one(shop: World) -> None:
    await begin(shop, "pro")
    await change(shop, "payg")
    assert (await change(shop, "team")).state is ChangeState.CHANGED
    assert (await shop.tenants.get(ACME)).plan == "team"


async def test_pay_as_you_go_becomes_a_subscription_and_back(shop: World) -> None:
    old = await begin(shop, "payg")
    made = await change(shop, "pro")
    assert (await bill(shop, made.payment_id))["total_amount"] == 2_000
    assert (await account(shop)).available_nanos == (10 + 50) * USD
    now = await subscription(shop)
    assert (now.id, now.plan) == (old.id, "pro")
    assert (await change(shop, "payg")).state is ChangeState.SCHEDULED
    await pass_to(shop, now.period_end_ms + HOUR)
    await shop.webhooks().receive(*delivery("subscription.plan_changed", {"subscription_id": old.id}, "msg_back"))
    assert (await account(shop)).available_nanos == 25 * USD


async def test_subscriber_of_old_terms_changes_to_those_of_now(shop: World) -> None:
    old = await begin(shop, "pro")
    pro = {"kind": "subscription", "monthly_price": "25", "allowance": {"usd": "15"}, "credit_limit": "50"}
    await sell(shop, PLANS | {"pro": pro})
    assert (await account(shop)).balance_nanos == 10 * USD
    made = await change(shop, "pro")
    assert made.state is ChangeState.CHANGED
    now = await subscription(shop)
    assert now.product_id != old.product_id
    assert (await account(shop)).balance_nanos == 15 * USD
    assert (await change(shop, "pro")).state is ChangeState.UNCHANGED


async def test_declined_card_changes_nothing(shop: World) -> None:
    old = await begin(shop, "pro")
    customer = (await shop.tenants.get(ACME)).dodo_customer_id
    await shop.operator.post(f"/_sandbox/customers/{customer}/card", json={"declines": True})
    with pytest.raises(PlanPaymentFailed, match="stays on 'pro'"):
        await change(shop, "team")
    assert await subscription(shop) == old
    assert (await account(shop)).available_nanos == (10 + 50) * USD
    (told,) = await failures(shop)
    assert (told["plan"], told["kept"], told["reason"]) == ("team", "pro", "its payment failed")


async def test_change_that_dodo_refuses_changes_nothing(shop: World) -> None:
    old = await begin(shop, "pro")
    await shop.fault("status:400", path=f"/subscriptions/{old.id}/change-plan")
    with pytest.raises(DodoRefused):
        await change(shop, "team")
    assert await subscription(shop) == old
    (told,) = await failures(shop)
    assert (told["plan"], told["kept"]) == ("team", "pro")


async def test_change_whose_reply_was_lost_is_made_once(shop: World) -> None:
    old = await begin(shop, "pro")
    await shop.fault("status_after:500", path=f"/subscriptions/{old.id}/change-plan", times=1)
    with pytest.raises(DodoUnavailable):
        await change(shop, "team")
    assert (await change(shop, "team")).state is ChangeState.UNCHANGED
    assert (await shop.tenants.get(ACME)).plan == "team"
    assert len([one for one in await items(shop, "/payments") if one["charge_type"] == "plan_change"]) == 1


async def test_refund_of_a_changes_fee_takes_the_new_allowance(shop: World) -> None:
    await begin(shop, "payg")
    made = await change(shop, "pro")
    payment = await bill(shop, made.payment_id)
    back = await refund(shop, payment)
    assert (await shop.webhooks().receive(*delivery("refund.succeeded", back, "msg_r"))).outcome is Outcome.APPLIED
    assert (await account(shop)).available_nanos == 0


@pytest.mark.parametrize(
    ("before", "plan", "message"),
    [
        ({}, "prepaid", "no subscription is sold to plan 'prepaid'"),
        ({"cancel_at_next_billing_date": True}, "team", "take that back first"),
    ],
)
async def test_impossible_change_says_what_to_do(
    shop: World, before: dict[str, object], plan: str, message: str
) -> None:
    one = await begin(shop, "pro")
    if before:
        await patch_subscription(shop, one.id, **before)
    with pytest.raises(PlanChangeRefused, match=message):
        await change(shop, plan)


async def test_change_needs_an_active_subscription(shop: World) -> None:
    with pytest.raises(PlanChangeRefused, match="POST /v1/checkout"):
        await change(shop, "pro")
    one = await begin(shop, "pro")
    await patch_subscription(shop, one.id, status="paused")
    with pytest.raises(PlanChangeRefused, match="the subscription is paused"):
        await change(shop, "team")
