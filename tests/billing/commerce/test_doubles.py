"""Two subscriptions that one tenant paid end as one: the first that counts stays, the other is ended and refunded."""

import asyncio
import random
from itertools import permutations
from unittest.mock import AsyncMock

import pytest

from billing.commerce import payments
from billing.commerce.inbox import Outcome
from billing.notices.log import Notices
from billing.notices.notice import NoticeKind
from billing.store.keys import REFUNDING, shard_for
from tests.support.purchases import ACME, AUTH, USD, balance, buy_as_stranger, items, patch_subscription, subscribe
from tests.support.world import DAY, HOUR, MINUTE, World, delivery

FEE = 2_000


async def active(world: World) -> set[object]:
    return {one["subscription_id"] for one in await items(world, "/subscriptions") if one["status"] == "active"}


async def refunds(world: World) -> list[tuple[object, object]]:
    return [(one["payment_id"], one["amount"]) for one in await items(world, "/refunds")]


async def doubled(world: World) -> list[dict[str, str]]:
    newest = await Notices(world.redis).newest()
    return [dict(one.facts) for one in newest if one.kind is NoticeKind.SUBSCRIPTION_DOUBLED]


async def double_click(world: World) -> list[dict[str, object]]:
    """Two checkouts of the same plan, both paid; no webhook has come."""
    await world.tenant("acme")
    return [await world.buy("acme", "plan:pro") for _ in range(2)]


def events(payments: list[dict[str, object]]) -> list[tuple[bytes, dict[str, str]]]:
    signed = []
    for number, payment in enumerate(payments):
        signed.append(delivery("payment.succeeded", payment, f"msg_p{number}"))
        started = {"subscription_id": payment["subscription_id"]}
        signed.append(delivery("subscription.active", started, f"msg_s{number}"))
    return signed


@pytest.mark.parametrize("order", list(permutations(range(4)))[::3])
async def test_double_click_leaves_one_subscription(world: World, order: tuple[int, ...]) -> None:
    payments = await double_click(world)
    signed = events(payments)
    for index in order:
        assert (await world.webhooks().receive(*signed[index])).outcome is Outcome.APPLIED
    kept, ended = (payments if order[0] < 2 else payments[::-1])[:2]
    assert await active(world) == {kept["subscription_id"]}
    assert await refunds(world) == [(ended["payment_id"], FEE)]
    tenant = await world.tenants.get(ACME)
    assert tenant.plan == "pro"
    assert tenant.subscription is not None
    assert tenant.subscription.id == kept["subscription_id"]
    assert await doubled(world) == [
        {
            "kept": kept["subscription_id"],
            "ended": ended["subscription_id"],
            "payments": ended["payment_id"],
            "amount": str(FEE),
            "currency": "USD",
        }
    ]


@pytest.mark.parametrize("seed", range(3))
async def test_double_click_on_two_gateways_is_refunded_once(world: World, seed: int) -> None:
    """Each webhook five times, several at once, on two gateways; then what waits."""
    signed = events(await double_click(world)) * 5
    random.Random(seed).shuffle(signed)
    gateways = [world.webhooks(), world.webhooks()]
    for start in range(0, len(signed), 5):
        some = enumerate(signed[start : start + 5])
        await asyncio.gather(*(gateways[number % 2].receive(*one) for number, one in some))
    world.clock.move(HOUR)
    await gateways[0].replay(world.sweep())
    assert await gateways[0].inbox.parked_count() == 0
    assert len(await active(world)) == 1
    assert [amount for _, amount in await refunds(world)] == [FEE]
    assert len(await doubled(world)) == 1


@pytest.mark.parametrize("failure", ["drop_before", "drop_after", "status:503", "status_after:500"])
async def test_refund_is_made_after_a_crash(world: World, failure: str) -> None:
    """The second subscription has ended, and whether its refund was made is unknown."""
    first, second = await double_click(world)
    webhooks = world.webhooks()
    await webhooks.receive(*delivery("payment.succeeded", first, "msg_1"))
    await world.fault(failure, path="/refunds", times=1)
    parked = await webhooks.receive(*delivery("payment.succeeded", second, "msg_2"))
    assert parked.outcome is Outcome.WAITING
    assert await active(world) == {first["subscription_id"]}
    await world.redis.delete(f"{REFUNDING}{second['payment_id']}")  # as a minute later
    world.clock.move(HOUR)
    assert await webhooks.replay(world.sweep()) == 1
    assert await refunds(world) == [(second["payment_id"], FEE)]
    assert len(await doubled(world)) == 1


async def test_refund_that_dodo_refuses_is_a_notice_and_tried_again(world: World) -> None:
    first, second = await double_click(world)
    webhooks = world.webhooks()
    await webhooks.receive(*delivery("payment.succeeded", first, "msg_1"))
    await world.fault("status:400", path="/refunds", times=1)
    await webhooks.receive(*delivery("payment.succeeded", second, "msg_2"))
    (told,) = await doubled(world)
    assert told["remedy"] == f"refund the fee in payment {second['payment_id']} at Dodo"
    await world.redis.delete(f"{REFUNDING}{second['payment_id']}")  # as a minute later
    world.clock.move(HOUR)
    assert await webhooks.replay(world.sweep()) == 1
    assert await refunds(world) == [(second["payment_id"], FEE)]


async def test_subscription_by_payment_link_beside_a_live_one_is_refunded(world: World) -> None:
    await world.tenant("acme")
    webhooks = world.webhooks()
    first = await subscribe(world, "payg")
    await webhooks.receive(*delivery("subscription.active", {"subscription_id": first}, "msg_1"))
    second = await buy_as_stranger(world, "plan:pro", "acme@example.com")
    await webhooks.receive(*delivery("payment.succeeded", second, "msg_2"))
    assert await active(world) == {first}
    assert await refunds(world) == [(second["payment_id"], FEE)]
    assert (await world.tenants.get(ACME)).plan == "payg"


async def double_with_pack(world: World) -> dict[str, object]:
    """A second subscription and a pack, paid in one checkout; its webhook has not come."""
    tenant = await world.tenant("acme")
    await world.webhooks().receive(*delivery("payment.succeeded", await world.buy("acme", "plan:pro"), "msg_first"))
    cart = [{"product_id": await world.product(name), "quantity": 1} for name in ("pack:small", "plan:pro")]
    asked = {"product_cart": cart, "customer": {"customer_id": tenant.dodo_customer_id}}
    session = (await world.operator.post("/checkouts", json=asked, headers=AUTH)).json()
    both: dict[str, object] = (await world.operator.post(f"/_sandbox/pay/{session['session_id']}")).json()
    assert both["total_amount"] == 500 + FEE
    return both


@pytest.mark.parametrize("are_lines_clear", [True, False])
async def test_pack_bought_together_with_a_second_subscription_is_kept(
    world: World, monkeypatch: pytest.MonkeyPatch, are_lines_clear: bool
) -> None:
    """Our own refund is known by its reason, also where Dodo's invoice does not say what was refunded."""
    if not are_lines_clear:
        monkeypatch.setattr(payments, "refunded_lines", AsyncMock(return_value=()))
    both = await double_with_pack(world)
    await world.webhooks().receive(*delivery("payment.succeeded", both, "msg_2"))
    assert await refunds(world) == [(both["payment_id"], FEE)]
    (made,) = await items(world, "/refunds")
    assert (await world.webhooks().receive(*delivery("refund.succeeded", made, "msg_3"))).outcome is Outcome.APPLIED
    assert await balance(world) == 5 * USD


async def test_part_of_a_payment_is_refunded_once_by_two_gateways(world: World) -> None:
    """Dodo would refuse to refund its line again, which a person would hear of in vain."""
    both = await double_with_pack(world)
    await world.fault("latency:0.5", path="/refunds")
    gateways = [world.webhooks(), world.webhooks()]
    signed = [delivery("payment.succeeded", both, f"msg_{number}") for number in range(4)]
    await asyncio.gather(*(gateways[number % 2].receive(*one) for number, one in enumerate(signed)))
    await world.heal()
    world.clock.move(HOUR)
    await gateways[0].replay(world.sweep())
    assert await gateways[0].inbox.parked_count() == 0
    assert await refunds(world) == [(both["payment_id"], FEE)]
    assert len(await doubled(world)) == 1
    assert await balance(world) == 5 * USD


async def test_new_subscription_counts_at_once_where_the_first_ended_unnoticed(world: World) -> None:
    await world.tenant("acme")
    webhooks = world.webhooks()
    first = await subscribe(world, "payg")
    await webhooks.receive(*delivery("subscription.active", {"subscription_id": first}, "msg_1"))
    await patch_subscription(world, first, status="cancelled")
    second = await world.buy("acme", "plan:pro")
    assert (await webhooks.receive(*delivery("payment.succeeded", second, "msg_2"))).outcome is Outcome.APPLIED
    tenant = await world.tenants.get(ACME)
    assert tenant.subscription is not None
    assert (tenant.plan, tenant.subscription.id) == ("pro", second["subscription_id"])
    assert await refunds(world) == []


async def test_waiting_subscription_counts_at_once_when_the_first_ends(world: World) -> None:
    """While the first one's payment is late, a second waits: it is not refunded, and not lost."""
    await world.tenant("acme")
    webhooks = world.webhooks()
    await world.operator.post("/_sandbox/settings", json={"past_due_grace_days": 7}, headers=AUTH)
    first = await world.buy("acme", "plan:pro")
    one = str(first["subscription_id"])
    await webhooks.receive(*delivery("payment.succeeded", first, "msg_1"))
    customer = (await world.tenants.get(ACME)).dodo_customer_id
    await world.operator.post(f"/_sandbox/customers/{customer}/card", json={"declines": True})
    await world.operator.post(f"/_sandbox/subscriptions/{one}/renew")
    await webhooks.receive(*delivery("subscription.past_due", {"subscription_id": one}, "msg_2"))
    await world.operator.post(f"/_sandbox/customers/{customer}/card", json={"declines": False})
    second = await world.buy("acme", "plan:payg")
    assert (await webhooks.receive(*delivery("payment.succeeded", second, "msg_3"))).outcome is Outcome.WAITING
    await patch_subscription(world, one, status="cancelled")
    await webhooks.receive(*delivery("subscription.cancelled", {"subscription_id": one}, "msg_4"))
    tenant = await world.tenants.get(ACME)
    assert tenant.subscription is not None
    assert (tenant.plan, tenant.subscription.id) == ("payg", second["subscription_id"])
    assert await refunds(world) == []


async def test_usage_beside_two_subscriptions_is_invoiced_and_repaid_once(world: World) -> None:
    payments = await double_click(world)
    webhooks = world.webhooks()
    await webhooks.receive(*delivery("payment.succeeded", payments[0], "msg_1"))
    await world.use("acme", charged=5 * USD, overage=5 * USD)
    await world.redis.hset(shard_for(ACME).account(ACME), "overage", str(5 * USD + 99))
    await world.exporter().flush_once()
    world.clock.move(MINUTE)
    await webhooks.receive(*delivery("payment.succeeded", payments[1], "msg_2"))
    world.clock.move(32 * DAY)
    await world.operator.post("/_sandbox/clock", json={"advance_s": 0})
    (invoice,) = [one for one in await items(world, "/payments") if one["charge_type"] == "renewal"]
    assert (invoice["subscription_id"], invoice["total_amount"]) == (payments[0]["subscription_id"], FEE + 500)
    await webhooks.receive(*delivery("payment.succeeded", invoice, "msg_3"))
    assert (await world.ledger.account(ACME)).overage_nanos == 99


@pytest.mark.parametrize("first", [0, 1])
async def test_subscription_that_renewed_unnoticed_is_refunded_with_its_usage(world: World, first: int) -> None:
    """No webhook came for a month, so both invoiced the same usage: whichever is heard of first, one is given back."""
    await world.tenant("acme")
    payments = [await world.buy("acme", "plan:pro")]
    world.clock.move(2_000)
    payments.insert(first, await world.buy("acme", "plan:pro"))
    await world.use("acme", charged=5 * USD, overage=5 * USD)
    await world.redis.hset(shard_for(ACME).account(ACME), "overage", str(12 * USD))
    await world.exporter().flush_once()
    world.clock.move(32 * DAY)
    await world.operator.post("/_sandbox/clock", json={"advance_s": 0})
    bills = {str(one["subscription_id"]): one for one in await items(world, "/payments") if one["includes_usage"]}
    webhooks = world.webhooks()
    number = 0
    for payment in payments:
        for one in (payment, bills[str(payment["subscription_id"])]):
            number += 1
            assert (await webhooks.receive(*delivery("payment.succeeded", one, f"msg_{number}"))).outcome is (
                Outcome.APPLIED
            )
    assert (await world.ledger.account(ACME)).overage_nanos == 7 * USD
    assert sum(int(str(amount)) for _, amount in await refunds(world)) == FEE + FEE + 500


async def on_hold(world: World) -> str:
    """The tenant's first subscription, whose renewal was declined and is tried again; the tenant has another card."""
    await world.operator.post("/_sandbox/settings", json={"payment_retries": True}, headers=AUTH)
    customer = (await world.tenants.get(ACME)).dodo_customer_id
    await world.operator.post(f"/_sandbox/customers/{customer}/card", json={"declines": True})
    one = (await world.tenants.get(ACME)).subscription
    assert one is not None
    world.clock.move(one.period_end_ms - world.clock() + HOUR)
    await world.operator.post("/_sandbox/clock", json={"advance_s": 0})
    await world.webhooks().receive(*delivery("subscription.on_hold", {"subscription_id": one.id}, "msg_hold"))
    await world.operator.post(f"/_sandbox/customers/{customer}/card", json={"declines": False})
    return one.id


async def use_on_credit(world: World) -> None:
    await world.use("acme", charged=5 * USD, overage=5 * USD)
    await world.redis.hset(shard_for(ACME).account(ACME), "overage", str(5 * USD))
    await world.exporter().flush_once()


async def test_late_renewal_beside_a_newer_subscription_pays_its_usage(world: World) -> None:
    """Usage from before the newer one began is invoiced by the older one alone: only the fee is given back."""
    await world.tenant("acme")
    webhooks = world.webhooks()
    await webhooks.receive(*delivery("payment.succeeded", await world.buy("acme", "plan:pro"), "msg_1"))
    world.clock.move(DAY)
    await use_on_credit(world)
    await on_hold(world)
    new = await world.buy("acme", "plan:payg")
    await webhooks.receive(*delivery("payment.succeeded", new, "msg_2"))
    world.clock.move(DAY)
    await world.operator.post("/_sandbox/clock", json={"advance_s": 0})
    (late,) = [one for one in await items(world, "/payments") if one["includes_usage"] and one["status"] == "succeeded"]
    assert late["total_amount"] == FEE + 500
    assert (await webhooks.receive(*delivery("payment.succeeded", late, "msg_3"))).outcome is Outcome.APPLIED
    assert await active(world) == {new["subscription_id"]}
    assert await refunds(world) == [(late["payment_id"], FEE)]
    assert (await world.ledger.account(ACME)).overage_nanos == 0


async def test_usage_invoiced_by_a_renewed_older_subscription_too_is_refunded(world: World) -> None:
    """The older one recovered beside the newer one, and no webhook told of it for a month."""
    await world.tenant("acme")
    webhooks = world.webhooks()
    await webhooks.receive(*delivery("payment.succeeded", await world.buy("acme", "plan:pro"), "msg_1"))
    await on_hold(world)
    await webhooks.receive(*delivery("payment.succeeded", await world.buy("acme", "plan:pro"), "msg_2"))
    await use_on_credit(world)
    world.clock.move(40 * DAY)
    await world.operator.post("/_sandbox/clock", json={"advance_s": 0})
    for number, one in enumerate(reversed(await items(world, "/payments"))):
        if one["status"] == "succeeded":
            heard = await webhooks.receive(*delivery("payment.succeeded", one, f"msg_p{number}"))
            assert heard.outcome is Outcome.APPLIED
    assert sorted(int(str(amount)) for _, amount in await refunds(world)) == [FEE, FEE + 500]
    assert (await world.ledger.account(ACME)).overage_nanos == 0


@pytest.mark.parametrize("is_renewed", [False, True])
async def test_replaced_subscription_that_comes_back_is_ended(world: World, is_renewed: bool) -> None:
    """It had been paused, and another was bought: of it the period that reaches beyond that is refunded, no usage."""
    await world.tenant("acme")
    webhooks = world.webhooks()
    last = await world.buy("acme", "plan:pro")
    one = str(last["subscription_id"])
    await webhooks.receive(*delivery("payment.succeeded", last, "msg_1"))
    if is_renewed:
        world.clock.move(32 * DAY)
        await world.operator.post("/_sandbox/clock", json={"advance_s": 0})
        (last,) = [payment for payment in await items(world, "/payments") if payment["charge_type"] == "renewal"]
        await webhooks.receive(*delivery("payment.succeeded", last, "msg_renewal"))
    world.clock.move(10 * DAY)
    await patch_subscription(world, one, status="paused")
    await webhooks.receive(*delivery("subscription.paused", {"subscription_id": one}, "msg_2"))
    new = await world.buy("acme", "plan:payg")
    await webhooks.receive(*delivery("payment.succeeded", new, "msg_3"))
    assert (await world.tenants.get(ACME)).plan == "payg"
    await patch_subscription(world, one, status="active")
    await webhooks.receive(*delivery("subscription.unpaused", {"subscription_id": one}, "msg_4"))
    assert await active(world) == {new["subscription_id"]}
    assert await refunds(world) == [(last["payment_id"], FEE)]
    assert (await world.tenants.get(ACME)).plan == "payg"
