"""A subscription is believed only from Dodo itself, and its payment repays what it invoiced."""

import pytest

from billing.commerce.decisions import Booking, Decisions, NotDecidable
from billing.commerce.inbox import Outcome
from billing.store.keys import shard_for
from billing.tenants.tenant import SubscriptionStatus
from billing.usage import Unit
from tests.support.purchases import ACME, AUTH, USD, pause, subscribe
from tests.support.world import DAY, HOUR, MINUTE, World, delivery


async def test_started_subscription_sets_plan_and_period(world: World) -> None:
    await world.tenant("acme")
    started = await subscribe(world, "pro")
    await world.webhooks().receive(*delivery("subscription.active", {"subscription_id": started}))
    tenant = await world.tenants.get(ACME)
    assert (tenant.plan, tenant.subscription and tenant.subscription.plan) == ("pro", "pro")
    assert tenant.subscription is not None
    assert (tenant.subscription.id, tenant.subscription.status) == (started, SubscriptionStatus.ACTIVE)
    assert abs(tenant.subscription.period_start_ms - world.clock()) < 2
    assert 27 * DAY < tenant.subscription.period_end_ms - world.clock() < 32 * DAY


async def test_state_in_the_webhook_is_ignored(world: World) -> None:
    await world.tenant("acme")
    started = await subscribe(world, "pro")
    stale = {"subscription_id": started, "status": "cancelled", "product_id": "prd_other"}
    await world.webhooks().receive(*delivery("subscription.cancelled", stale))
    assert (await world.tenants.get(ACME)).plan == "pro"


async def test_cancelled_subscription_restores_the_default_plan(world: World) -> None:
    await world.tenant("acme")
    started = await subscribe(world, "payg")
    await world.webhooks().receive(*delivery("subscription.active", {"subscription_id": started}))
    await world.operator.patch(f"/subscriptions/{started}", json={"status": "cancelled"}, headers=AUTH)
    await world.webhooks().receive(*delivery("subscription.cancelled", {"subscription_id": started}, "msg_2"))
    tenant = await world.tenants.get(ACME)
    assert tenant.plan == "prepaid"
    assert tenant.subscription is not None
    assert not tenant.subscription.extends_credit(world.clock())


async def test_renewal_repays_the_usage_it_invoiced(world: World) -> None:
    await world.tenant("acme", plan="payg")
    started = await subscribe(world, "payg")
    webhooks = world.webhooks()
    await webhooks.receive(*delivery("subscription.active", {"subscription_id": started}, "msg_0"))
    spent = 12_345_678_901
    await world.use("acme", charged=spent, overage=spent)
    await world.redis.hset(shard_for(ACME).account(ACME), "overage", str(spent + 99))
    await world.exporter().flush_once()
    world.clock.move(32 * DAY)
    (await world.operator.post("/_sandbox/clock", json={"advance_s": 0})).raise_for_status()
    payments = (await world.operator.get("/payments", headers=AUTH)).json()["items"]
    (renewal,) = [p for p in payments if p["charge_type"] == "renewal"]
    assert renewal["includes_usage"] is True
    for copy in range(3):
        await webhooks.receive(*delivery("payment.succeeded", renewal, f"msg_{copy + 1}"))
    assert (await world.ledger.account(ACME)).overage_nanos == 99
    stored = (await world.tenants.get(ACME)).subscription
    assert stored is not None
    assert stored.period_end_ms > world.clock(), "the payment brought the new period too"


async def test_renewal_that_waits_is_not_booked_and_repays_once_it_is_applied(world: World) -> None:
    await world.tenant("acme", plan="payg")
    started = await subscribe(world, "payg")
    await world.webhooks().receive(*delivery("subscription.active", {"subscription_id": started}, "msg_0"))
    await world.use("acme", charged=5 * USD, overage=5 * USD)
    await world.redis.hset(shard_for(ACME).account(ACME), "overage", str(5 * USD + 99))
    await world.exporter().flush_once()
    world.clock.move(32 * DAY)
    (await world.operator.post("/_sandbox/clock", json={"advance_s": 0})).raise_for_status()
    payments = (await world.operator.get("/payments", headers=AUTH)).json()["items"]
    (renewal,) = [p for p in payments if p["charge_type"] == "renewal"]
    await world.fault("status:500", path=f"/subscriptions/{started}/usage-history")
    waits = await world.webhooks().receive(*delivery("payment.succeeded", renewal, "msg_1"))
    assert waits.outcome is Outcome.WAITING
    booking = Booking(ACME, Unit.NANOS, 5 * USD)
    with pytest.raises(NotDecidable, match="farebox webhooks replay msg_1"):
        await Decisions(world.redis, world.clock).book("msg_1", booking)
    await world.heal()
    world.clock.move(HOUR)
    await world.webhooks().replay(world.sweep())
    now = await world.ledger.account(ACME)
    assert (now.balance_nanos, now.overage_nanos) == (0, 99)


@pytest.mark.parametrize("bears", [{}, {"created_at": "2999-12-31T23:59:59Z"}])
@pytest.mark.parametrize("before_the_end_ms", [10 * DAY, 10 * MINUTE])
async def test_pause_repays_the_usage_it_invoiced(
    world: World, before_the_end_ms: int, bears: dict[str, object]
) -> None:
    await world.tenant("acme", plan="payg")
    started = await subscribe(world, "payg")
    webhooks = world.webhooks()
    await webhooks.receive(*delivery("subscription.active", {"subscription_id": started}, "msg_0"))
    stored = (await world.tenants.get(ACME)).subscription
    assert stored is not None
    world.clock.move(stored.period_end_ms - before_the_end_ms - world.clock())
    await world.use("acme", charged=5 * USD, overage=5 * USD, ago_ms=MINUTE)
    await world.redis.hset(shard_for(ACME).account(ACME), "overage", str(5 * USD + 99))
    await world.exporter().flush_once()
    world.clock.move(MINUTE)  # what is exported in the moment of the pause belongs to what comes after it
    await world.operator.patch(f"/subscriptions/{started}", json={"status": "paused"}, headers=AUTH)
    bill = (await world.operator.get("/payments", headers=AUTH)).json()["items"][0]
    assert (bill["total_amount"], bill["service_periods"]) == (500, [])
    await webhooks.receive(*delivery("payment.succeeded", bill | bears, "msg_1"))
    assert (await world.ledger.account(ACME)).overage_nanos == 99
    rests = (await world.tenants.get(ACME)).subscription
    assert rests is not None
    assert (rests.status, rests.is_live(world.clock())) == (SubscriptionStatus.PAUSED, False)


@pytest.mark.parametrize("is_late", [False, True])
async def test_renewal_and_pause_repay_their_own_usage(world: World, is_late: bool) -> None:
    """Also where both come only after the pause, with two periods that ended within an hour."""
    await world.tenant("acme", plan="payg")
    started = await subscribe(world, "payg")
    webhooks = world.webhooks()
    await webhooks.receive(*delivery("subscription.active", {"subscription_id": started}, "msg_0"))
    stored = (await world.tenants.get(ACME)).subscription
    assert stored is not None
    await world.redis.hset(shard_for(ACME).account(ACME), "overage", str(20 * USD))
    await world.use("acme", charged=5 * USD, overage=5 * USD)
    await world.exporter().flush_once()
    world.clock.move(stored.period_end_ms + MINUTE - world.clock())
    (await world.operator.post("/_sandbox/clock", json={"advance_s": 0})).raise_for_status()
    await webhooks.receive(*delivery("subscription.renewed", {"subscription_id": started}, "msg_1"))
    renewal = (await world.operator.get("/payments", headers=AUTH)).json()["items"][0]
    world.clock.move(10 * MINUTE)
    await world.use("acme", charged=7 * USD, overage=7 * USD)
    await world.exporter().flush_once()
    world.clock.move(10 * MINUTE)
    if not is_late:
        await webhooks.receive(*delivery("payment.succeeded", renewal, "msg_2"))
        assert (await world.ledger.account(ACME)).overage_nanos == 15 * USD
    await world.operator.patch(f"/subscriptions/{started}", json={"status": "paused"}, headers=AUTH)
    bill = (await world.operator.get("/payments", headers=AUTH)).json()["items"][0]
    assert (renewal["total_amount"], bill["total_amount"]) == (500, 700)
    for number, payment in enumerate((bill, renewal, bill)):
        await webhooks.receive(*delivery("payment.succeeded", payment, f"msg_{3 + number}"))
    assert (await world.ledger.account(ACME)).overage_nanos == 8 * USD


async def test_overdue_period_is_looked_up(world: World) -> None:
    await world.tenant("acme", plan="payg")
    started = await subscribe(world, "payg")
    webhooks = world.webhooks()
    await webhooks.receive(*delivery("subscription.active", {"subscription_id": started}))
    world.clock.move(32 * DAY)
    await world.operator.post("/_sandbox/clock", json={"advance_s": 0})
    assert await webhooks.refresh_overdue(await world.tenants.list(), world.sweep()) == 1
    assert await webhooks.refresh_overdue(await world.tenants.list(), world.sweep()) == 0


async def test_paused_subscription_is_looked_up_hourly(world: World) -> None:
    await world.tenant("acme", plan="payg")
    webhooks = world.webhooks()
    started = await pause(world, webhooks)
    assert await webhooks.refresh_overdue(await world.tenants.list(), world.sweep()) == 1
    await world.operator.patch(f"/subscriptions/{started}", json={"status": "active"}, headers=AUTH)
    assert await webhooks.refresh_overdue(await world.tenants.list(), world.sweep()) == 0, "asked about once an hour"
    world.clock.move(HOUR)
    assert await webhooks.refresh_overdue(await world.tenants.list(), world.sweep()) == 1
    tenant = await world.tenants.get(ACME)
    assert tenant.subscription is not None
    assert tenant.subscription.status is SubscriptionStatus.ACTIVE


async def test_tenant_moved_to_another_plan_stays_moved(world: World) -> None:
    await world.tenant("acme", plan="payg")
    webhooks = world.webhooks()
    await pause(world, webhooks)
    await world.tenants.update(ACME, lambda tenant: tenant.model_copy(update={"plan": "prepaid"}))
    assert await webhooks.refresh_overdue(await world.tenants.list(), world.sweep()) == 0
    assert (await world.tenants.get(ACME)).plan == "prepaid"
