"""One tenant's trouble stops no other in the periodic tasks that talk to Dodo."""

import pytest

from billing.commerce import webhooks as webhooks_module
from billing.commerce.auto_refill.refill import AttemptState, Refill
from billing.commerce.auto_refill.refiller import Refiller
from billing.commerce.auto_refill.store import Refills
from billing.commerce.customers import create_missing_customers
from billing.commerce.inbox import Outcome
from billing.dodo.call_budget import CallBudget
from billing.store.keys import INBOX
from billing.sweep import FIRST_RETRY_MS
from billing.tenants.tenant import SubscriptionStatus, Tenant
from billing.usage import TenantId
from tests.support.purchases import ACME, AUTH, USD, balance, pause, subscribe
from tests.support.world import DAY, HOUR, World, delivery

BAD = TenantId("aaa")
"""Comes before acme in every order."""
REFILL = Refill(pack="small", threshold_nanos=USD, monthly_cap_cents=1_500)


async def test_refill_goes_on_past_a_tenant_whose_customer_is_gone(world: World) -> None:
    for name in (BAD, ACME):
        await world.tenant(name)
        await world.buy(name, "pack:small")  # saves the card; its webhook never comes, so nothing is granted
        await Refills(world.redis).put(name, REFILL)
    await world.tenants.set_customer(BAD, "cus_gone")
    world.clock.move(1_000)
    sweep = world.sweep()
    assert await Refiller(world.commerce()).run_once(sweep) == 1
    assert await balance(world) == 5 * USD
    (failing,) = sweep.failing
    assert (failing.id, failing.error.partition(":")[0]) == ("aaa", "DodoRefused")


async def test_refill_of_a_lost_charge_goes_on_past_a_tenant_that_cannot_be_read(world: World) -> None:
    for name in (BAD, ACME):
        await world.tenant(name)
        await world.buy(name, "pack:small")
        await Refills(world.redis).put(name, REFILL)
    world.clock.move(1_000)
    await world.fault("timeout_after_commit", path="/checkouts", times=2)
    assert await Refiller(world.commerce()).run_once(world.sweep()) == 2
    await world.spoil(BAD)
    await Refiller(world.commerce()).run_once(world.sweep())
    refill = await Refills(world.redis).get(ACME)
    assert refill is not None
    assert refill.attempts[0].state is AttemptState.SUCCEEDED


@pytest.mark.parametrize("kind", ["garbage", "status:500"])
async def test_unreadable_subscription_keeps_no_overdue_one_waiting(world: World, kind: str) -> None:
    webhooks, started = world.webhooks(), {}
    for name in (BAD, ACME):
        await world.tenant(name, plan="payg")
        started[name] = await subscribe(world, "payg", name)
        await webhooks.receive(*delivery("subscription.active", {"subscription_id": started[name]}, f"msg_{name}"))
    world.clock.move(32 * DAY)
    await world.operator.post("/_sandbox/clock", json={"advance_s": 0})
    await world.fault(kind, path=f"/subscriptions/{started[BAD]}")
    sweep = world.sweep()
    assert await webhooks.refresh_overdue(await world.tenants.list(), sweep) == 1
    subscription = (await world.tenants.get(ACME)).subscription
    assert subscription is not None
    assert subscription.period_end_ms > world.clock()
    assert [one.id for one in sweep.failing] == [started[BAD]]
    await world.heal()
    world.clock.move(FIRST_RETRY_MS)
    assert await webhooks.refresh_overdue(await world.tenants.list(), sweep) == 1
    assert sweep.failing == ()


async def test_unreadable_paused_subscription_keeps_no_other_waiting(world: World) -> None:
    webhooks, started = world.webhooks(), {}
    for name in (BAD, ACME):
        await world.tenant(name, plan="payg")
        started[name] = await pause(world, webhooks, name)
    await world.operator.patch(f"/subscriptions/{started[ACME]}", json={"status": "active"}, headers=AUTH)
    await world.fault("garbage", path=f"/subscriptions/{started[BAD]}")
    assert await webhooks.refresh_overdue(await world.tenants.list(), world.sweep()) == 1
    subscription = (await world.tenants.get(ACME)).subscription
    assert subscription is not None
    assert subscription.status is SubscriptionStatus.ACTIVE


async def test_webhook_that_meets_an_error_of_ours_is_parked_with_its_reason(world: World) -> None:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    await world.spoil(ACME)
    parked = await world.webhooks().receive(*delivery("payment.succeeded", payment))
    assert (parked.outcome, parked.attempts) == (Outcome.WAITING, 1)
    assert parked.reason.startswith("ValidationError")


async def test_parked_webhooks_that_fail_unexpectedly_do_not_stay_first_in_line(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks_module, "REPLAYED_AT_ONCE", 2)
    webhooks = world.webhooks()
    for name in (BAD, ACME):
        await world.tenant(name)
    await world.fault("status:500", path="/payments")
    for number, name in enumerate((BAD, BAD, ACME)):
        payment = await world.buy(name, "pack:small")
        await webhooks.receive(*delivery("payment.succeeded", payment | {"product_cart": None}, f"msg_{number}"))
        world.clock.move(1)
    await world.heal()
    await world.spoil(BAD)
    world.clock.move(HOUR)
    sweep = world.sweep()
    assert await webhooks.replay(sweep) == 0
    assert await webhooks.replay(sweep) == 1
    assert await balance(world) == 5 * USD
    assert await webhooks.inbox.parked_count() == 2, "they wait for their next try"


async def test_stored_webhook_that_cannot_be_read_keeps_no_other_waiting(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks_module, "REPLAYED_AT_ONCE", 1)
    webhooks = world.webhooks()
    await world.tenant("acme")
    await world.fault("status:500", path="/payments")
    for number in range(2):
        payment = await world.buy("acme", "pack:small")
        await webhooks.receive(*delivery("payment.succeeded", payment | {"product_cart": None}, f"msg_{number}"))
        world.clock.move(1)
    await world.heal()
    await world.redis.hset(INBOX, "msg_0", "{}")
    world.clock.move(HOUR)
    sweep = world.sweep()
    assert [await webhooks.replay(sweep), await webhooks.replay(sweep)] == [0, 1]
    assert [one.id for one in sweep.failing] == ["msg_0"]


async def test_webhooks_that_the_sweep_leaves_out_take_no_place_of_those_tried(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks_module, "REPLAYED_AT_ONCE", 2)
    webhooks, sweep = world.webhooks(), world.sweep()
    await world.tenant("acme")
    await world.fault("status:500", path="/payments")
    payment = await world.buy("acme", "pack:small") | {"product_cart": None}
    for webhook_id in ("msg_bad_0", "msg_bad_1"):
        await webhooks.receive(*delivery("payment.succeeded", payment, webhook_id))
        await world.redis.hset(INBOX, webhook_id, "{}")
    for _ in range(6):  # so often that the sweep leaves them out for longer than the inbox does
        world.clock.move(HOUR)
        await webhooks.replay(sweep)
    world.clock.move(webhooks_module.FIRST_RETRY_MS)
    await webhooks.receive(*delivery("payment.succeeded", payment, "msg_good"))
    await world.heal()
    world.clock.move(webhooks_module.FIRST_RETRY_MS)
    assert await webhooks.replay(sweep) == 1
    assert await balance(world) == 5 * USD


async def test_customers_are_created_past_a_tenant_that_cannot_be_read(world: World) -> None:
    for name in (BAD, ACME):
        await world.tenant(name, has_customer=False)
    await world.spoil(BAD)
    assert await create_missing_customers(world.dodo, world.tenants, CallBudget(60), world.sweep()) == 1
    assert (await world.tenants.get(ACME)).dodo_customer_id


async def test_customer_that_dodo_refuses_is_not_asked_for_at_every_run(world: World) -> None:
    await world.tenants.create(Tenant(id=BAD, email="no address", plan="prepaid"))
    sweep, budget = world.sweep(), CallBudget(6)
    for _ in range(5):
        assert await create_missing_customers(world.dodo, world.tenants, budget, sweep) == 0
    world.clock.move(FIRST_RETRY_MS)
    await create_missing_customers(world.dodo, world.tenants, budget, sweep)
    assert sweep.failing[0].failures == 1, "the second try had to wait for its call"
