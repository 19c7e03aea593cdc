"""Timestamps, periods, budgets and long outages: when usage is exported, not how much."""

from datetime import datetime

import pytest

from billing.dodo.call_budget import CallBudget
from billing.dodo.client import Event
from billing.export.exporter import Exporter
from billing.export.outbox import Outbox
from billing.tenants.tenant import Subscription, SubscriptionStatus
from billing.usage import TenantId
from tests.support.world import API_KEY, DAY, HOUR, MINUTE, SECOND, World, assert_same, delivery

AUTH = {"Authorization": f"Bearer {API_KEY}"}


@pytest.mark.parametrize(("ago_ms", "restamped"), [(55 * MINUTE - 1, False), (55 * MINUTE, True), (DAY, True)])
async def test_stale_timestamp_is_replaced_and_kept_in_metadata(world: World, ago_ms: int, restamped: bool) -> None:
    await world.tenant("acme")
    await world.use("acme", ago_ms=ago_ms)
    assert (await world.exporter().flush_once()).sent == 1
    ((event),) = await world.events()
    assert event["metadata"]["restamped"] is restamped  # type: ignore[index]
    occurred = world.clock() - ago_ms
    sent = _ms(str(event["timestamp"]))
    assert sent == (world.clock() if restamped else occurred)
    assert _ms(str(event["metadata"]["occurred_at"])) == occurred  # type: ignore[index]
    assert event["metadata"]["crosses_period"] is False  # type: ignore[index]


async def test_future_timestamp_is_replaced(world: World) -> None:
    await world.tenant("acme")
    await world.use("acme", ago_ms=-10 * MINUTE)
    assert (await world.exporter().flush_once()).sent == 1


async def test_attempt_of_more_than_an_hour_ago_is_looked_up_before_it_is_repeated(world: World) -> None:
    for name in ("taken", "lost"):
        await world.tenant(name)
    exporter = world.exporter()
    await world.use("taken")
    await world.fault("drop_after", times=1)
    await exporter.flush_once()
    await world.use("lost")
    await world.fault("drop_before", times=1)
    await exporter.flush_once(force=True)
    world.clock.move(HOUR)
    await world.fault("status:500", path="/events/ingest")
    report = await world.exporter().flush_once()
    assert report.sent == 1, "Dodo had it: acknowledged without being sent again"
    await world.heal()
    assert (await world.exporter().flush_once()).sent == 1
    assert_same(await world.exported(), world.sums)


async def test_flush_stops_at_its_budget_and_the_rest_follows(world: World) -> None:
    for number in range(6):
        await world.tenant(f"tenant-{number}")
        await world.tenants.set_customer(TenantId(f"tenant-{number}"), f"cus_unknown_{number}")
        await world.use(f"tenant-{number}")
    exporter = world.exporter(calls_per_minute=12)
    calls = 0
    real = world.dodo.ingest

    async def counting(events: list[Event]) -> int:
        nonlocal calls
        calls += 1
        return await real(events)

    world.dodo.ingest = counting  # type: ignore[method-assign, assignment]
    await exporter.flush_once()
    assert calls == 2
    for _ in range(20):
        world.clock.move(6 * SECOND)
        await exporter.flush_once()
    assert (await Outbox(world.redis).backlog()).outbox_events == 0
    assert (await Outbox(world.redis).sums()).dead_events == 6


async def test_event_not_attempted_for_want_of_calls_is_not_looked_up(world: World) -> None:
    await world.tenant("acme")
    exporter = world.exporter(calls_per_minute=1)
    await world.use("acme")
    assert (await exporter.flush_once()).sent == 1
    await world.use("acme")
    assert (await exporter.flush_once()).waiting == 1
    (event,) = await Outbox(world.redis).events()
    assert event.first_attempt_ms is None


async def test_patient_flush_waits_for_calls(world: World) -> None:
    for name in ("acme", "zeta"):
        await world.tenant(name)
        await world.tenants.set_customer(TenantId(name), f"cus_unknown_{name}")
        await world.use(name)
    budget = CallBudget(12)
    exporter = Exporter(world.redis, world.dodo, world.tenants, world.clock, budget, patience_s=30)
    assert (await exporter.flush_once()).dead_letters == 2


@pytest.mark.slow
async def test_windows_are_wide_in_a_long_outage(world: World) -> None:
    await world.tenant("acme")
    exporter = world.exporter()
    await world.fault("status:503")
    for _ in range(96):
        await world.use("acme", overage=50)
        await exporter.flush_once()
        world.clock.move(5 * MINUTE)
    waiting = await Outbox(world.redis).events()
    assert len(waiting) <= 2 * (4 * 8 + 3), "four windows an hour, two events each, and three from the start"
    assert sum(event.first_attempt_ms is not None for event in waiting) <= 10, "an outage is probed with few events"
    await world.heal()
    await exporter.flush_once(force=True)
    await exporter.flush_once(force=True)
    assert_same(await world.exported(), world.sums)


class Counted:
    """A budget that never runs out and counts."""

    def __init__(self) -> None:
        self.calls = 0

    async def take(self) -> bool:
        self.calls += 1
        return True


@pytest.mark.slow
async def test_outage_of_a_day_drains_in_a_few_calls(world: World) -> None:
    names = [f"tenant-{number}" for number in range(10)]
    for name in names:
        await world.tenant(name)
    budget = Counted()
    exporter = Exporter(world.redis, world.dodo, world.tenants, world.clock, budget, jitter=lambda: 0.0)
    await world.fault("status:503", "drop_before")
    for _ in range(96):
        for name in names:
            await world.use(name, overage=50)
        await exporter.flush_once()
        world.clock.move(15 * MINUTE)
    await world.heal()
    budget.calls = 0
    report = await exporter.flush_once(force=True)
    assert report.waiting == 0
    assert report.sent > 1_800
    assert budget.calls <= 40, "steps from 8 events to 1,000, and the few that were attempted are looked up"
    assert_same(await world.exported(), world.sums)
    assert {event["metadata"]["restamped"] for event in await world.events()} == {True, False}  # type: ignore[index]


async def test_charges_of_a_closed_billing_period_are_billed_in_the_next(world: World) -> None:
    await world.tenant("acme", plan="payg")
    start = world.clock()

    def subscribed(period_end_ms: int) -> Subscription:
        active = SubscriptionStatus.ACTIVE
        return Subscription(id="sub", plan="payg", status=active, period_start_ms=0, period_end_ms=period_end_ms)

    period = {"subscription": subscribed(start + 10 * SECOND)}
    await world.tenants.update(TenantId("acme"), lambda tenant: tenant.model_copy(update=period))
    await world.use("acme", charged=70, overage=70)
    exporter = world.exporter()
    assert (await exporter.flush_once()).waiting == 0
    assert await world.events() == [], "so close to the end it might arrive too late"
    world.clock.move(11 * SECOND)
    assert (await exporter.flush_once()).sent == 1
    ((event),) = await world.events()
    assert _ms(str(event["timestamp"])) == world.clock()
    assert event["metadata"]["crosses_period"] is True  # type: ignore[index]


@pytest.mark.parametrize("is_resumed", [False, True])
async def test_charges_after_a_pause_are_billed_later(world: World, is_resumed: bool) -> None:
    """Each once: five cents at the pause, seven cents exported after it with the renewal."""
    await world.tenant("acme", plan="payg")
    payment = await world.buy("acme", "plan:payg")
    path, event = f"/subscriptions/{payment['subscription_id']}", {"subscription_id": payment["subscription_id"]}
    exporter, webhooks = world.exporter(), world.webhooks()
    await webhooks.receive(*delivery("subscription.active", event, "msg_1"))
    world.clock.move(MINUTE)
    await world.use("acme", charged=50_000_000, overage=50_000_000)
    await exporter.flush_once()
    world.clock.move(MINUTE)
    await world.use("acme", charged=70_000_000, overage=70_000_000)
    world.clock.move(MINUTE)
    for status in ("paused", "active")[: 1 + is_resumed]:
        (await world.operator.patch(path, json={"status": status}, headers=AUTH)).raise_for_status()
        await webhooks.receive(*delivery(f"subscription.{status}", event, f"msg_{status}"))
        world.clock.move(MINUTE)
    assert (await exporter.flush_once(force=True)).sent == 1
    if not is_resumed:
        (await world.operator.patch(path, json={"status": "active"}, headers=AUTH)).raise_for_status()
    world.clock.move(32 * DAY)
    (await world.operator.post("/_sandbox/clock", json={"advance_s": 0})).raise_for_status()
    bills = (await world.operator.get("/payments", headers=AUTH)).json()["items"]
    assert [bill["total_amount"] for bill in bills] == [7, 5, 0]


async def test_charges_of_a_last_period_are_sent_while_it_is_open(world: World) -> None:
    await world.tenant("acme", plan="payg")
    last = Subscription(
        id="sub",
        plan="payg",
        status=SubscriptionStatus.ACTIVE,
        period_start_ms=0,
        period_end_ms=world.clock() + 10 * SECOND,
        cancel_at_period_end=True,
    )
    await world.tenants.update(TenantId("acme"), lambda t: t.model_copy(update={"subscription": last}))
    await world.use("acme", charged=70, overage=70)
    assert (await world.exporter().flush_once()).sent == 1
    ((event),) = await world.events()
    assert _ms(str(event["timestamp"])) < last.period_end_ms


def _ms(moment: str) -> int:
    return round(datetime.fromisoformat(moment).timestamp() * 1000)


async def test_charges_sent_before_a_pause_was_known_are_billed(world: World) -> None:
    await world.tenant("acme", plan="payg")
    payment = await world.buy("acme", "plan:payg")
    path, event = f"/subscriptions/{payment['subscription_id']}", {"subscription_id": payment["subscription_id"]}
    webhooks = world.webhooks()
    await webhooks.receive(*delivery("subscription.active", event, "msg_1"))
    await world.use("acme", charged=50_000_000, overage=50_000_000)
    await world.exporter().flush_once()
    world.clock.move(MINUTE)
    await world.use("acme", charged=70_000_000, overage=70_000_000)
    world.clock.move(MINUTE)
    for status in ("paused", "active"):
        (await world.operator.patch(path, json={"status": status}, headers=AUTH)).raise_for_status()
        world.clock.move(MINUTE)
        await world.exporter().flush_once(force=True)
        await webhooks.receive(*delivery(f"subscription.{status}", event, f"msg_{status}"))
    world.clock.move(32 * DAY)
    (await world.operator.post("/_sandbox/clock", json={"advance_s": 0})).raise_for_status()
    bills = (await world.operator.get("/payments", headers=AUTH)).json()["items"]
    assert [bill["total_amount"] for bill in bills] == [7, 5, 0]
