"""A cart of ours and of the merchant's other products: ours counts, the rest moves nothing, the cash is booked once."""

from collections.abc import Mapping

import pytest

from billing.commerce.cash import CashBook
from billing.commerce.decisions import Booking, Decisions
from billing.commerce.inbox import Inbox, Outcome
from billing.money import NANOS_PER_CENT
from billing.usage import Unit
from tests.support.foreign import MONTHLY, pay, product, receive
from tests.support.purchases import ACME, USD, account, balance, refund
from tests.support.world import HOUR, World

CREDIT_OF_PRO = 50 * USD


async def cash(world: World) -> list[tuple[str, str, int, Mapping[str, int] | None]]:
    """Kind, tenant, cents and parts of everything that is booked."""
    booked = await CashBook(world.redis).until(2**50)
    return [(str(entry.kind), str(entry.tenant), entry.settled, entry.parts) for entry in booked]


async def sweep(world: World) -> None:
    """Try what is due, hour by hour."""
    for _ in range(3):
        world.clock.move(HOUR)
        await world.webhooks().replay(world.sweep())


async def attempts(world: World, webhook_id: str) -> int:
    found = await Inbox(world.redis).get(webhook_id)
    assert found is not None
    return found.attempts


@pytest.mark.parametrize("is_plan_first", [True, False])
async def test_fee_beside_a_foreign_product_counts_and_its_refund_takes_it_back(
    world: World, is_plan_first: bool
) -> None:
    tenant = await world.tenant("acme")
    ebook, plan = await product(world), await world.product("plan:pro")
    payment = await pay(world, {ebook: 1, plan: 1}, tenant.dodo_customer_id)
    subscription = {"subscription_id": payment["subscription_id"]}
    events = [("payment.succeeded", payment), ("subscription.active", subscription)]
    for number, (type_, data) in enumerate(events[::-1] if is_plan_first else events):
        assert (await receive(world, type_, data, f"msg_{number}")).outcome is Outcome.APPLIED
    assert (await account(world)).available_nanos == 10 * USD + CREDIT_OF_PRO
    parts = {"fee": 20 * USD, "foreign": 9 * USD}
    assert await cash(world) == [("payment", ACME, 2_900, parts)]
    given_back = await receive(world, "refund.succeeded", await refund(world, payment), "msg_refund")
    assert given_back.outcome is Outcome.APPLIED
    found = await account(world)
    assert (found.balance_nanos, found.available_nanos) == (0, 0), "no allowance, and no credit in a refunded period"
    assert await cash(world) == [("payment", ACME, 2_900, parts), ("refund", ACME, -2_900, None)]


async def test_plan_without_allowance_beside_a_foreign_subscription_counts(world: World) -> None:
    tenant = await world.tenant("acme")
    club, plan = await product(world, "Book club", **MONTHLY), await world.product("plan:payg")
    payment = await pay(world, {club: 1, plan: 1}, tenant.dodo_customer_id)
    done = await receive(world, "payment.succeeded", payment)
    assert (done.outcome, club in done.reason) == (Outcome.APPLIED, True)
    assert (await world.tenants.get(ACME)).plan == "payg"


@pytest.mark.parametrize("is_new_buyer", [True, False])
async def test_pack_beside_a_foreign_subscription_is_applied_once(world: World, is_new_buyer: bool) -> None:
    tenant = await world.tenant("acme")
    club, small = await product(world, "Book club", **MONTHLY), await world.product("pack:small")
    payment = await pay(world, {small: 1, club: 1}, "" if is_new_buyer else tenant.dodo_customer_id)
    done = await receive(world, "payment.succeeded", payment)
    assert (done.outcome, club in done.reason) == (Outcome.APPLIED, True)
    await sweep(world)
    assert await attempts(world, "msg_1") == 1
    (buyer,) = [one.id for one in await world.tenants.list() if is_new_buyer == (one.id != ACME)]
    assert await balance(world, buyer) == 5 * USD
    parts = {"pack": 5 * USD, "foreign": 9 * USD}
    assert await cash(world) == [("payment", buyer, 1_400, parts)]
    given_back = await receive(world, "refund.succeeded", await refund(world, payment), "msg_2")
    assert (given_back.outcome, await balance(world, buyer)) == (Outcome.APPLIED, 0)
    assert await cash(world) == [("payment", buyer, 1_400, parts), ("refund", buyer, -1_400, None)]


@pytest.mark.parametrize("reversal", ["refund", "dispute"])
async def test_reversal_of_a_booked_foreign_subscription_is_applied_once(world: World, reversal: str) -> None:
    await world.tenant("acme")
    payment = await pay(world, {await product(world, "Book club", **MONTHLY): 1})
    await receive(world, "payment.succeeded", payment)
    await Decisions(world.redis, world.clock).book("msg_1", Booking(ACME, Unit.NANOS, 5 * USD))
    if reversal == "refund":
        type_, data = "refund.succeeded", await refund(world, payment)
    else:
        opened = await world.operator.post(f"/_sandbox/disputes/{payment['payment_id']}")
        type_, data = "dispute.opened", opened.json()
    done = await receive(world, type_, data, "msg_2")
    assert (done.outcome, await balance(world)) == (Outcome.APPLIED, 0)
    await sweep(world)
    assert await attempts(world, "msg_2") == 1
    taken = [entry for entry in await cash(world) if entry[2] < 0]
    assert [cents * NANOS_PER_CENT for _, _, cents, _ in taken] == [-9 * USD]
