"""A refund or dispute of a subscription's fee takes the credit that the fee bought, as it does with a pack."""

from itertools import permutations

import pytest

from billing.commerce.sync import sync
from billing.ledger.errors import InsufficientCredits
from tests.support.purchases import USD, account, balance, items, reconcile, refund, spend
from tests.support.world import DAY, World, delivery

CREDIT_LIMIT = 50 * USD
"""Of the plan, whose fee of $20 buys $10 each month."""


async def subscribed(world: World) -> dict[str, object]:
    """The fee's payment."""
    await world.tenant("acme")
    payment = await world.buy("acme", "plan:pro")
    await world.webhooks().receive(*delivery("payment.succeeded", payment, "msg_0"))
    assert (await account(world)).available_nanos == 10 * USD + CREDIT_LIMIT
    return payment


async def refunded(world: World, payment: dict[str, object], cents: int | None = None) -> None:
    made = await refund(world, payment, cents)
    for copy in range(2):
        await world.webhooks().receive(*delivery("refund.succeeded", made, f"msg_{made['refund_id']}_{copy}"))


async def disputed(world: World, payment: dict[str, object], cents: int | None = None) -> str:
    asked = {} if cents is None else {"amount": cents}
    opened = (await world.operator.post(f"/_sandbox/disputes/{payment['payment_id']}", json=asked)).json()
    await world.webhooks().receive(*delivery("dispute.opened", opened, f"msg_{opened['dispute_id']}"))
    return str(opened["dispute_id"])


async def decided(world: World, dispute_id: str, ending: str) -> None:
    ended = (await world.operator.post(f"/_sandbox/disputes/{dispute_id}/{ending}")).json()
    await world.webhooks().receive(*delivery(f"dispute.{ending}", ended, f"msg_{ending}"))


async def test_refunded_fee_ends_its_credit_at_once(world: World) -> None:
    await refunded(world, await subscribed(world))
    assert (await account(world)).available_nanos == 0
    with pytest.raises(InsufficientCredits):
        await spend(world, "0.01")
    assert (await reconcile(world)).is_clean


async def test_what_was_spent_of_a_refunded_allowance_is_a_debt(world: World) -> None:
    payment = await subscribed(world)
    await spend(world, "4")
    await refunded(world, payment)
    now = await account(world)
    assert (now.balance_nanos, now.available_nanos) == (-4 * USD, -4 * USD)
    await world.webhooks().receive(*delivery("payment.succeeded", await world.buy("acme", "pack:small"), "msg_pack"))
    assert await balance(world) == USD
    assert (await reconcile(world)).is_clean


async def test_partial_refund_takes_its_share(world: World) -> None:
    """$5 of $20 are a quarter of the allowance. Credit goes on: the rest of the fee is paid."""
    payment = await subscribed(world)
    await spend(world, "4")
    await refunded(world, payment, 500)
    now = await account(world)
    assert (now.balance_nanos, now.available_nanos) == (int(3.5 * USD), int(3.5 * USD) + CREDIT_LIMIT)


async def test_partial_refunds_that_add_up_end_the_credit(world: World) -> None:
    payment = await subscribed(world)
    await refunded(world, payment, 500)
    await refunded(world, payment, 1_500)
    assert (await account(world)).available_nanos == 0


@pytest.mark.parametrize(
    ("ending", "available"),
    [("", 0), ("won", 10 * USD + CREDIT_LIMIT), ("cancelled", 10 * USD + CREDIT_LIMIT), ("lost", 0), ("accepted", 0)],
)
async def test_disputed_fee_pauses_its_credit(world: World, ending: str, available: int) -> None:
    dispute = await disputed(world, await subscribed(world))
    assert (await account(world)).available_nanos == 0
    if ending:
        await decided(world, dispute, ending)
    assert (await account(world)).available_nanos == available
    assert (await reconcile(world)).is_clean


async def test_dispute_of_a_part_pauses_credit_and_takes_its_share(world: World) -> None:
    await disputed(world, await subscribed(world), 500)
    now = await account(world)
    assert (now.balance_nanos, now.available_nanos) == (int(7.5 * USD), int(7.5 * USD))


async def test_won_dispute_gives_back_to_the_pack_that_had_paid(world: World) -> None:
    payment = await subscribed(world)
    await spend(world, "10")
    await world.webhooks().receive(*delivery("payment.succeeded", await world.buy("acme", "pack:small", 3), "msg_pack"))
    dispute = await disputed(world, payment)
    assert await balance(world) == 5 * USD
    await decided(world, dispute, "won")
    (pack,) = [bucket for bucket in (await account(world)).buckets if not bucket.is_allowance]
    assert pack.remaining == 15 * USD
    assert (await reconcile(world)).is_clean


@pytest.mark.parametrize("order", list(permutations(range(4)))[::2])
async def test_events_of_a_fee_in_any_order_leave_one_state(world: World, order: tuple[int, ...]) -> None:
    """Paid; $5 refunded; all of it disputed; the dispute won. A quarter stays taken."""
    await world.tenant("acme")
    payment = await world.buy("acme", "plan:pro")
    opened = (await world.operator.post(f"/_sandbox/disputes/{payment['payment_id']}")).json()
    made = await refund(world, payment, 500)
    won = (await world.operator.post(f"/_sandbox/disputes/{opened['dispute_id']}/won")).json()
    signed = [
        delivery("payment.succeeded", payment, "msg_a"),
        delivery("refund.succeeded", made, "msg_b"),
        delivery("dispute.opened", opened, "msg_c"),
        delivery("dispute.won", won, "msg_d"),
    ]
    for index in (*order, *order):
        await world.webhooks().receive(*signed[index])
    assert (await account(world)).available_nanos == int(7.5 * USD) + CREDIT_LIMIT
    assert (await reconcile(world)).is_clean


async def renewed(world: World) -> dict[str, object]:
    world.clock.move(32 * DAY)
    await world.operator.post("/_sandbox/clock", json={"advance_s": 0})
    renewal = next(one for one in await items(world, "/payments") if one["charge_type"] == "renewal")
    await world.webhooks().receive(*delivery("payment.succeeded", renewal, "msg_renewal"))
    return renewal


async def test_refunded_renewal_ends_the_new_periods_credit(world: World) -> None:
    await subscribed(world)
    await spend(world, "4")
    renewal = await renewed(world)
    await spend(world, "1")
    await refunded(world, renewal)
    now = await account(world)
    assert (now.balance_nanos, now.available_nanos) == (-USD, -USD)


async def test_refund_of_a_past_fee_is_a_debt_of_what_was_spent(world: World) -> None:
    payment = await subscribed(world)
    await spend(world, "4")
    await renewed(world)
    await spend(world, "1")
    await refunded(world, payment)
    assert (await account(world)).available_nanos == (9 - 4) * USD + CREDIT_LIMIT
    assert (await reconcile(world)).is_clean


async def test_open_dispute_of_a_past_fee_pauses_credit(world: World) -> None:
    dispute = await disputed(world, await subscribed(world))
    await renewed(world)
    assert (await account(world)).available_nanos == 10 * USD
    await decided(world, dispute, "lost")
    assert (await account(world)).available_nanos == 10 * USD + CREDIT_LIMIT


async def test_fee_paid_late_opens_credit_again(world: World) -> None:
    """The period after a refunded one is paid: it brings its allowance and credit."""
    await refunded(world, await subscribed(world))
    await renewed(world)
    assert (await account(world)).available_nanos == 10 * USD + CREDIT_LIMIT


async def test_refunded_fee_of_a_plan_without_allowance_pauses_credit(world: World) -> None:
    """A plan may cost a fee and bring only the right to credit."""
    plan = world.catalog.plans["pro"].model_copy(update={"allowance": None})
    world.catalog = world.catalog.model_copy(update={"plans": {**world.catalog.plans, "pro": plan}})
    await sync(world.dodo, world.redis, world.catalog)
    await world.tenant("acme")
    payment = await world.buy("acme", "plan:pro")
    await world.webhooks().receive(*delivery("payment.succeeded", payment, "msg_0"))
    assert (await account(world)).available_nanos == CREDIT_LIMIT
    await refunded(world, payment)
    assert (await account(world)).available_nanos == 0
