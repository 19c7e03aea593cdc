"""What the merchant sells besides farebox, under the same Dodo account, is set aside once, and a person may book it."""

import asyncio
from dataclasses import replace

import pytest

from billing.catalog.terms import Terms
from billing.commerce.decisions import Booking, Decisions, NotDecidable
from billing.commerce.inbox import Delivery, Inbox, Outcome
from billing.commerce.products import Products
from billing.ledger.errors import GrantRefused
from billing.notices.log import Notices
from billing.notices.notice import NoticeKind
from billing.store.errors import StoreUnavailable
from billing.tenants.errors import UnknownTenant
from billing.usage import TenantId, Unit
from tests.support.foreign import MONTHLY, pay, product, receive
from tests.support.hiccup import fail_next_notice
from tests.support.purchases import ACME, USD, balance, refund
from tests.support.world import DAY, HOUR, World

FIVE = Booking(ACME, Unit.NANOS, 5 * USD)


async def sell(world: World, product_id: str) -> None:
    """Keep a product as the one that sells the small pack, as our own sync does."""
    await Products(world.redis).add(product_id, Terms.of_pack("small", world.catalog.packs["small"]))


async def kinds(world: World) -> list[NoticeKind]:
    return [notice.kind for notice in reversed(await Notices(world.redis).newest())]


async def replay_later(world: World, webhook_id: str = "msg_1") -> Delivery:
    """What becomes of a delivery once everything that is due was tried again."""
    world.clock.move(2 * HOUR)
    await world.webhooks().replay(world.sweep())
    found = await Inbox(world.redis).get(webhook_id)
    assert found is not None
    return found


async def test_foreign_payment_is_set_aside_once(world: World) -> None:
    ebook = await product(world)
    payment = await pay(world, {ebook: 1})
    aside = await receive(world, "payment.succeeded", payment)
    assert (aside.outcome, ebook in aside.reason) == (Outcome.SET_ASIDE, True)
    inbox = Inbox(world.redis)
    assert (await inbox.parked_count(), await inbox.set_aside_count()) == (0, 1)
    assert (await replay_later(world)).attempts == 1
    assert await world.tenants.list() == []
    (notice,) = await Notices(world.redis).newest()
    assert (notice.kind, notice.facts["payment_id"]) == (NoticeKind.PAYMENT_SET_ASIDE, payment["payment_id"])


async def test_second_payment_for_the_same_foreign_product_makes_no_second_notice(world: World) -> None:
    ebook = await product(world)
    for number in range(2):
        aside = await receive(world, "payment.succeeded", await pay(world, {ebook: 1}), f"msg_{number}")
        assert aside.outcome is Outcome.SET_ASIDE
    assert await kinds(world) == [NoticeKind.PAYMENT_SET_ASIDE]


async def test_mixed_cart_grants_what_is_ours(world: World) -> None:
    tenant = await world.tenant("acme")
    ebook, small = await product(world), await world.product("pack:small")
    payment = await pay(world, {ebook: 1, small: 3}, tenant.dodo_customer_id)
    for number in range(2):
        done = await receive(world, "payment.succeeded", payment, f"msg_{number}")
        assert done.outcome is Outcome.APPLIED
        assert (ebook in done.reason, small in done.reason) == (True, False)
    assert await balance(world) == 15 * USD
    assert await kinds(world) == [NoticeKind.PAYMENT_SET_ASIDE]


@pytest.mark.parametrize("packs", [0, 1])
async def test_notice_of_a_foreign_product_survives_a_store_that_was_away(
    world: World, monkeypatch: pytest.MonkeyPatch, packs: int
) -> None:
    tenant = await world.tenant("acme")
    cart = {await product(world): 1} | ({await world.product("pack:small"): 1} if packs else {})
    payment = await pay(world, cart, tenant.dodo_customer_id)
    fail_next_notice(monkeypatch)
    with pytest.raises(StoreUnavailable):
        await receive(world, "payment.succeeded", payment)
    assert await balance(world) == packs * 5 * USD, "granted before the store was away"
    assert (await replay_later(world)).outcome is (Outcome.APPLIED if packs else Outcome.SET_ASIDE)
    assert await kinds(world) == [NoticeKind.PAYMENT_SET_ASIDE]


async def test_payment_ahead_of_our_own_sync_waits(world: World) -> None:
    tenant = await world.tenant("acme")
    made = await product(world, "Credit pack small", tag="pack:small")
    payment = await pay(world, {made: 1}, tenant.dodo_customer_id)
    waiting = await receive(world, "payment.succeeded", payment)
    assert (waiting.outcome, "farebox dodo sync" in waiting.reason) == (Outcome.WAITING, True)
    await sell(world, made)
    assert (await replay_later(world)).outcome is Outcome.APPLIED
    assert await balance(world) == 5 * USD


async def test_payment_waits_while_dodo_cannot_say_whose_product_it_is(world: World) -> None:
    payment = await pay(world, {await product(world): 1})
    await world.fault("status:500", path="/products")
    assert (await receive(world, "payment.succeeded", payment)).outcome is Outcome.WAITING
    await world.heal()
    assert (await replay_later(world)).outcome is Outcome.SET_ASIDE


async def test_foreign_subscription_ends_with_all_its_events(world: World) -> None:
    club = await product(world, "Book club", **MONTHLY)
    payment = await pay(world, {club: 1})
    subscription = {"subscription_id": payment["subscription_id"]}
    ended = [
        await receive(world, "subscription.active", subscription, "msg_s"),
        await receive(world, "payment.succeeded", payment, "msg_p"),
        await receive(world, "payment.succeeded", payment | {"product_cart": None}, "msg_p2"),
        await receive(world, "refund.succeeded", await refund(world, payment), "msg_r"),
    ]
    aside = Outcome.SET_ASIDE
    assert [one.outcome for one in ended] == [Outcome.KEPT, aside, aside, aside]
    assert await world.tenants.list() == []


@pytest.mark.parametrize("is_tenant", [True, False])
async def test_reversal_of_a_foreign_payment_ends(world: World, is_tenant: bool) -> None:
    tenant = await world.tenant("acme")
    payment = await pay(world, {await product(world): 1}, tenant.dodo_customer_id if is_tenant else "")
    opened = (await world.operator.post(f"/_sandbox/disputes/{payment['payment_id']}", json={"amount": 100})).json()
    given_back = await refund(world, payment, 400)
    for number, (type_, data) in enumerate((("dispute.opened", opened), ("refund.succeeded", given_back))):
        assert (await receive(world, type_, data, f"msg_{number}")).outcome is Outcome.SET_ASIDE
    assert await balance(world) == 0


async def test_booked_payment_is_granted_once(world: World) -> None:
    await world.tenant("acme")
    ebook = await product(world)
    payment = await pay(world, {ebook: 1})
    await receive(world, "payment.succeeded", payment)
    booking = replace(FIVE, expires_days=30)
    booked = await Decisions(world.redis, world.clock).book("msg_1", booking)
    assert booked.source == f"payment:{payment['payment_id']}:{ebook}"
    (bucket,) = (await world.ledger.account(ACME)).buckets
    assert (bucket.remaining, bucket.id) == (5 * USD, booked.source)
    found = await Inbox(world.redis).get("msg_1")
    assert found is not None
    assert found.outcome is Outcome.BOOKED
    with pytest.raises(NotDecidable, match="is booked"):
        await Decisions(world.redis, world.clock).book("msg_1", booking)
    await sell(world, ebook)  # now it is a pack of ours
    again = await receive(world, "payment.succeeded", payment, "msg_2")
    assert (again.outcome, await balance(world)) == (Outcome.APPLIED, 5 * USD)
    assert [tenant.id for tenant in await world.tenants.list()] == [ACME], "whoever paid did not become a tenant"


@pytest.mark.parametrize("step", ["grant", "finish"])
async def test_booking_that_was_cut_off_is_given_again(
    world: World, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    await world.tenant("acme")
    await receive(world, "payment.succeeded", await pay(world, {await product(world): 1}))
    decisions = Decisions(world.redis, world.clock)

    async def dies(*_: object) -> None:
        raise asyncio.CancelledError

    cut = decisions._ledger if step == "grant" else decisions._inbox
    with monkeypatch.context() as patched:
        patched.setattr(cut, step, dies)
        with pytest.raises(asyncio.CancelledError):
            await decisions.book("msg_1", FIVE)
    world.clock.move(HOUR)
    await decisions.book("msg_1", FIVE)
    assert await balance(world) == 5 * USD


@pytest.mark.parametrize("is_refunded_first", [True, False])
async def test_refund_of_a_booked_payment_claws_back(world: World, is_refunded_first: bool) -> None:
    await world.tenant("acme")
    payment = await pay(world, {await product(world): 1})
    await receive(world, "payment.succeeded", payment)
    given_back = await refund(world, payment, 450)  # half of it
    decisions = Decisions(world.redis, world.clock)
    if is_refunded_first:
        await receive(world, "refund.succeeded", given_back, "msg_2")
        await decisions.book("msg_1", FIVE)
        await world.webhooks().replay(world.sweep())
    else:
        await decisions.book("msg_1", FIVE)
        await receive(world, "refund.succeeded", given_back, "msg_2")
    assert await balance(world) == 2_500_000_000
    assert await Inbox(world.redis).unfinished() == []


async def test_only_an_open_payment_of_a_known_amount_is_booked(world: World) -> None:
    tenant = await world.tenant("acme")
    decisions = Decisions(world.redis, world.clock)
    payment = await pay(world, {await product(world): 1})
    await receive(world, "payment.succeeded", payment)
    await receive(world, "refund.succeeded", await refund(world, payment), "msg_refund")
    with pytest.raises(UnknownTenant):
        await decisions.book("msg_1", replace(FIVE, tenant=TenantId("nobody")))
    with pytest.raises(GrantRefused):
        await decisions.book("msg_1", replace(FIVE, amount=0))
    with pytest.raises(NotDecidable, match="drop it instead"):
        await decisions.book("msg_refund", FIVE)
    with pytest.raises(NotDecidable, match="unknown"):
        await decisions.book("msg_other", FIVE)
    ours = await pay(world, {await world.product("pack:small"): 1}, tenant.dodo_customer_id)
    await receive(world, "payment.succeeded", ours, "msg_ours")
    with pytest.raises(NotDecidable, match="is applied"):
        await decisions.book("msg_ours", FIVE)
    assert await balance(world) == 5 * USD


async def test_payment_that_buys_something_is_not_booked_over(world: World) -> None:
    """Its purchase is fixed, and what follows it waits: here, because the subscription cannot be asked for."""
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    with_subscription = payment | {"subscription_ids": ["sub_unknown"]}
    assert (await receive(world, "payment.succeeded", with_subscription)).outcome is Outcome.WAITING
    with pytest.raises(NotDecidable, match="buys something already"):
        await Decisions(world.redis, world.clock).book("msg_1", replace(FIVE, amount=USD))
    assert await balance(world) == 5 * USD


@pytest.mark.parametrize("is_foreign", [True, False])
async def test_dropped_delivery_stays_dropped(world: World, is_foreign: bool) -> None:
    cart = {await product(world, tag="" if is_foreign else "pack:other"): 1}
    await receive(world, "payment.succeeded", await pay(world, cart))
    webhooks, decisions = world.webhooks(), Decisions(world.redis, world.clock)
    read_before = await webhooks.inbox.get("msg_1")
    await decisions.drop("msg_1", "sold by hand")
    assert read_before is not None
    assert not await webhooks.inbox.park(read_before, world.clock()), "a try that began before does not bring it back"
    assert (await replay_later(world)).outcome is Outcome.DROPPED
    assert await webhooks.inbox.unfinished() == []
    notice = (await Notices(world.redis).newest(1))[0]
    assert (notice.kind, notice.facts["reason"]) == (NoticeKind.WEBHOOK_DROPPED, "sold by hand")
    with pytest.raises(NotDecidable, match="is dropped"):
        await decisions.drop("msg_1", "again")


async def test_set_aside_delivery_is_pruned_after_a_month(world: World) -> None:
    await receive(world, "payment.succeeded", await pay(world, {await product(world): 1}))
    assert await world.webhooks().prune() == 0
    world.clock.move(31 * DAY)
    assert await world.webhooks().prune() == 1
    assert await Inbox(world.redis).set_aside_count() == 0
