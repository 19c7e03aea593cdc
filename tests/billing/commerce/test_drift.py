"""A value of Dodo's that is missing, null, renamed or unknown parks one delivery, and moves no money wrongly."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import pytest
from standardwebhooks import Webhook

from billing.commerce.auto_refill.refill import Refill
from billing.commerce.auto_refill.refiller import Refiller
from billing.commerce.auto_refill.store import Refills
from billing.commerce.inbox import Delivery, Inbox, Outcome
from billing.commerce.licences import ENTITLEMENT
from billing.commerce.sync import sync
from billing.dodo.errors import DodoUnreadable
from billing.sweep import FAILURES_IN_A_ROW
from billing.tenants.tenant import SubscriptionStatus
from billing.usage import TenantId
from tests.support.drifting import Drifting, drifting_dodo
from tests.support.purchases import ACME, AUTH, USD, balance, refund, subscribe
from tests.support.world import DAY, HOUR, SECRET, World, delivery

Data = dict[str, object]
Path = tuple[str | int, ...]
GONE = object()
VALUES = (GONE, None, "brand_new", [], {"brand": "new"})
"""What every field is replaced by in turn: left out, null, an unknown word, and values of another type."""
CLEAR = {"NotYet", "WireError", "DodoRefused", "DodoUnreadable"}
"""What a delivery may wait for. Anything else is an error of ours."""


def paths(value: object, at: Path = ()) -> Iterator[Path]:
    """Every field, those inside others too; of a list its first entry."""
    if at:
        yield at
    inside: list[tuple[str | int, object]] = list(value.items()) if isinstance(value, dict) else []
    if isinstance(value, list):
        inside = list(enumerate(value[:1]))
    for name, one in inside:
        yield from paths(one, (*at, name))


def changed(data: Data, path: Path, value: object) -> Data:
    made: Data = json.loads(json.dumps(data))
    place: object = made
    for name in path[:-1]:
        place = place[name]  # type: ignore[index]
    if value is GONE:
        del place[path[-1]]  # type: ignore[attr-defined]
    else:
        place[path[-1]] = value  # type: ignore[index]
    return made


Check = Callable[[Delivery], Awaitable[None]]


@dataclass
class Drift:
    world: World
    number: int = 0

    async def deliver(self, type_: str, data: Data) -> Delivery:
        """Deliver it, try it again two hours later, and end it. What became of it."""
        self.number += 1
        webhooks, name = self.world.webhooks(), f"msg_{self.number}"
        first = await webhooks.receive(*delivery(type_, data, name))
        if first.outcome is not Outcome.WAITING:
            return first
        self.world.clock.move(2 * HOUR)
        await webhooks.replay(self.world.sweep())
        last = await Inbox(self.world.redis).get(name)
        assert last is not None
        assert last.attempts == 2, "it is tried once each time that it is due"
        await Inbox(self.world.redis).finish(replace(last, outcome=Outcome.DROPPED))
        return last

    async def every(self, type_: str, sample: Data, prepare: Callable[[], Awaitable[Data]], check: Check) -> None:
        """Every field of an event replaced by every value, each in an event of its own."""
        for path in paths(sample):
            for value in VALUES:
                data = changed(await prepare(), path, value)
                done = await self.deliver(type_, data)
                where = f"{type_} with {'.'.join(map(str, path))} = {'left out' if value is GONE else value}"
                is_clear = done.outcome is not Outcome.WAITING or done.reason.partition(":")[0] in CLEAR
                assert is_clear, f"{where} -> {done.reason}"
                try:
                    await check(done)
                except AssertionError as error:
                    raise AssertionError(f"{where} -> {done.outcome} {done.reason}: {error}") from error


@pytest.fixture
def drift(world: World) -> Drift:
    return Drift(world)


@pytest.mark.slow
async def test_payment_is_granted_rightly_or_not_at_all(world: World, drift: Drift) -> None:
    await world.tenant("acme")

    async def paid() -> Data:
        return await world.buy("acme", "pack:small", 3)

    had = 0

    async def check(done: Delivery) -> None:
        nonlocal had
        moved, had = await balance(world) - had, await balance(world)
        assert moved in ((15 * USD,) if done.outcome is Outcome.APPLIED else (0, 15 * USD))

    await drift.every("payment.succeeded", await paid(), paid, check)


@pytest.mark.slow
async def test_refund_claws_back_rightly_or_not_at_all(world: World, drift: Drift) -> None:
    await world.tenant("acme")

    async def refunded() -> Data:
        payment = await world.buy("acme", "pack:small")
        assert (await drift.deliver("payment.succeeded", payment)).outcome is Outcome.APPLIED
        return await refund(world, payment, 200)

    had = 0

    async def check(done: Delivery) -> None:
        nonlocal had
        moved, had = await balance(world) - had, await balance(world)
        assert moved == (3 * USD if done.outcome is Outcome.APPLIED else 5 * USD)

    sample = await refunded()
    had = await balance(world)
    await drift.every("refund.succeeded", sample, refunded, check)


@pytest.mark.slow
async def test_dispute_claws_back_rightly_or_not_at_all(world: World, drift: Drift) -> None:
    await world.tenant("acme")

    async def disputed() -> Data:
        payment = await world.buy("acme", "pack:small")
        await drift.deliver("payment.succeeded", payment)
        made = await world.operator.post(f"/_sandbox/disputes/{payment['payment_id']}", json={"amount": 200})
        opened: Data = made.raise_for_status().json()
        return opened

    had = 0

    async def check(done: Delivery) -> None:
        nonlocal had
        moved, had = await balance(world) - had, await balance(world)
        assert moved in ((3 * USD,) if done.outcome is Outcome.APPLIED else (3 * USD, 5 * USD))

    sample = await disputed()
    had = await balance(world)
    await drift.every("dispute.opened", sample, disputed, check)


@pytest.mark.slow
async def test_subscription_carries_its_plan_or_changes_nothing(world: World, drift: Drift) -> None:
    await world.tenant("acme")
    one = await subscribe(world, "pro")
    sample: Data = (await world.operator.get(f"/subscriptions/{one}", headers=AUTH)).json()

    async def unknown_here() -> Data:
        fresh = {"plan": "prepaid", "subscription": None}
        await world.tenants.update(ACME, lambda tenant: tenant.model_copy(update=fresh))
        return sample

    async def check(done: Delivery) -> None:
        tenant = await world.tenants.get(ACME)
        known = (tenant.plan, tenant.subscription.id if tenant.subscription else "")
        assert known == (("pro", one) if done.outcome is Outcome.APPLIED else ("prepaid", ""))

    await drift.every("subscription.active", sample, unknown_here, check)


@pytest.mark.slow
async def test_licence_key_opens_or_changes_nothing(world: World, drift: Drift) -> None:
    pro = world.catalog.plans["pro"].model_copy(update={"licence_key": True})
    world.catalog = world.catalog.model_copy(update={"plans": {**world.catalog.plans, "pro": pro}})
    for product in (await world.operator.get("/products?page_size=100", headers=AUTH)).json()["items"]:
        await world.operator.delete(f"/products/{product['product_id']}", headers=AUTH)
    await world.redis.flushall()
    await sync(world.dodo, world.redis, world.catalog)
    await world.tenant("acme")
    await subscribe(world, "pro")
    listed = await world.operator.get(f"/entitlements/{await world.product(ENTITLEMENT)}/grants", headers=AUTH)
    (sample,) = listed.json()["items"]

    async def same() -> Data:
        return dict(sample)

    async def check(done: Delivery) -> None:
        keys = await world.tenants.keys(ACME)
        assert len(keys) <= 1
        assert keys or done.outcome is not Outcome.APPLIED

    await drift.every("entitlement_grant.delivered", sample, same, check)


@pytest.mark.slow
@pytest.mark.parametrize("type_", ["payment.failed", "payment.processing", "dunning.started", "subscription.made_up"])
async def test_event_that_moves_nothing_never_fails(world: World, drift: Drift, type_: str) -> None:
    await world.tenant("acme")
    await subscribe(world, "pro")
    payment = await world.buy("acme", "pack:small")
    dunning = {"subscription_id": "sub_1", "trigger_state": "on_hold", "created_at": "2026-11-26T00:00:00Z"}

    async def same() -> Data:
        return payment | dunning

    async def check(_: Delivery) -> None:
        assert await balance(world) == 0

    await drift.every(type_, await same(), same, check)


@pytest.mark.parametrize("type_", [GONE, None, "", ["payment.succeeded"]])
async def test_event_without_a_type_waits_for_a_person(world: World, type_: object) -> None:
    await world.tenant("acme")
    body, headers = delivery("payment.succeeded", await world.buy("acme", "pack:small"))
    text = json.dumps(changed(json.loads(body), ("type",), type_))
    headers["webhook-signature"] = Webhook(SECRET).sign("msg_1", datetime.now(UTC), text)
    done = await world.webhooks().receive(text.encode(), headers)
    assert (done.outcome, done.reason) == (Outcome.WAITING, "WireError: type is missing")
    assert await balance(world) == 0


@pytest.fixture
async def drifting(world: World) -> AsyncIterator[Drifting]:
    async with drifting_dodo(world) as transport:
        yield transport


@pytest.mark.parametrize("status", ["trialing", None, 7, ["active"]])
async def test_unknown_status_of_a_subscription_waits(world: World, drifting: Drifting, status: object) -> None:
    await world.tenant("acme")
    one = await subscribe(world, "pro")
    drifting.fields["/subscriptions/"] = {"status": status}
    webhooks = world.webhooks()
    waiting = await webhooks.receive(*delivery("subscription.active", {"subscription_id": one}))
    assert (waiting.outcome, "status" in waiting.reason) == (Outcome.WAITING, True)
    drifting.fields.clear()
    world.clock.move(HOUR)
    assert await webhooks.replay(world.sweep()) == 1
    assert (await world.tenants.get(ACME)).plan == "pro"


@pytest.mark.parametrize("status", ["dispute_frozen", None, 7])
async def test_unknown_status_of_a_dispute_waits(world: World, drifting: Drifting, status: object) -> None:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    await world.webhooks().receive(*delivery("payment.succeeded", payment, "msg_paid"))
    opened = (await world.operator.post(f"/_sandbox/disputes/{payment['payment_id']}", json={})).json()
    drifting.fields["/disputes/"] = {"dispute_status": status}
    waiting = await world.webhooks().receive(*delivery("dispute.opened", opened))
    assert (waiting.outcome, "dispute_status" in waiting.reason) == (Outcome.WAITING, True)
    assert await balance(world) == 5 * USD


@pytest.mark.parametrize("status", ["settled", None])
async def test_unknown_status_of_a_payment_waits(world: World, drifting: Drifting, status: object) -> None:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    drifting.fields["/payments/"] = {"status": status}
    waiting = await world.webhooks().receive(*delivery("payment.succeeded", payment | {"status": status}))
    assert (waiting.outcome, await balance(world)) == (Outcome.WAITING, 0)


async def test_unknown_total_of_a_payment_claws_nothing_back(world: World, drifting: Drifting) -> None:
    """Without it, which share a refund is cannot be told."""
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    await world.webhooks().receive(*delivery("payment.succeeded", payment, "msg_paid"))
    given_back = await refund(world, payment, 200)
    drifting.fields["/payments/"] = {"total_amount": None}
    waiting = await world.webhooks().receive(*delivery("refund.succeeded", given_back))
    assert (waiting.outcome, await balance(world)) == (Outcome.WAITING, 5 * USD)


async def test_many_deliveries_that_cannot_be_read_keep_no_other_waiting(world: World, drifting: Drifting) -> None:
    await world.tenant("acme")
    one = await subscribe(world, "pro")
    drifting.fields["/subscriptions/"] = {"status": "trialing"}
    webhooks = world.webhooks()
    for number in range(FAILURES_IN_A_ROW + 1):
        await webhooks.receive(*delivery("subscription.active", {"subscription_id": one}, f"msg_{number}"))
    late = {**await world.buy("acme", "pack:small"), "customer": {"customer_id": "cus_later"}}
    await webhooks.receive(*delivery("payment.succeeded", late, "msg_z"))
    await world.tenants.set_customer(ACME, "cus_later")
    world.clock.move(HOUR)
    assert await webhooks.replay(world.sweep()) == 1
    assert await balance(world) == 5 * USD


async def test_many_subscriptions_of_an_unknown_status_keep_no_other_waiting(world: World, drifting: Drifting) -> None:
    names = [f"a{number}" for number in range(FAILURES_IN_A_ROW + 1)]
    started = {}
    for name in (*names, "zoe"):
        await world.tenant(name, plan="payg")
        started[name] = await subscribe(world, "payg", name)
        active = delivery("subscription.active", {"subscription_id": started[name]}, f"msg_{name}")
        await world.webhooks().receive(*active)
    world.clock.move(32 * DAY)
    await world.operator.post("/_sandbox/clock", json={"advance_s": 0})
    for name in names:
        drifting.fields[f"/subscriptions/{started[name]}"] = {"status": "trialing"}
    sweep = world.sweep()
    assert await world.webhooks().refresh_overdue(await world.tenants.list(), sweep) == 1
    assert {one.error_type for one in sweep.failing} == {DodoUnreadable}
    zoe = (await world.tenants.get(TenantId("zoe"))).subscription
    assert zoe is not None
    assert (zoe.status, zoe.is_overdue(world.clock())) == (SubscriptionStatus.ACTIVE, False)


async def test_payment_that_cannot_be_read_keeps_no_refill_of_others_waiting(world: World, drifting: Drifting) -> None:
    refill = Refill(pack="small", threshold_nanos=USD, monthly_cap_cents=1_500)
    names = [f"a{number}" for number in range(FAILURES_IN_A_ROW + 1)]
    for name in (*names, "zoe"):
        await world.tenant(name)
        await world.buy(name, "pack:small")  # saves the card
        await Refills(world.redis).put(TenantId(name), refill)
    world.clock.move(1_000)
    await world.fault("drop_after", path="/checkouts", times=len(names) + 1)
    await Refiller(world.commerce()).run_once(world.sweep())
    for name in names:
        customer = (await world.tenants.get(TenantId(name))).dodo_customer_id
        drifting.fields[f"customer_id={customer}"] = {"total_amount": None}
    sweep = world.sweep()
    await Refiller(world.commerce()).run_once(sweep)
    assert {one.error_type for one in sweep.failing} == {DodoUnreadable}
    assert await balance(world, TenantId("zoe")) == 5 * USD


async def test_invoice_that_cannot_be_read_hides_no_other(world: World, drifting: Drifting) -> None:
    tenant = await world.tenant("acme")
    for _ in range(2):
        await world.buy("acme", "pack:small")
    drifting.fields["/payments"] = {"created_at": None}
    assert len(await world.dodo.invoices(tenant.dodo_customer_id, 0, 10)) == 1
