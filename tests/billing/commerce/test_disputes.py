"""A dispute takes its share back while it stands, and gives it back where it was won; in any order, beside refunds."""

from itertools import permutations

import pytest

from billing.commerce.inbox import Outcome
from billing.dodo.wire import Dispute
from billing.usage import TenantId
from tests.support.purchases import AUTH, USD, balance, refund
from tests.support.world import World, delivery

ACME = TenantId("acme")


async def dispute(world: World, payment: dict[str, object], cents: int | None = None) -> dict[str, object]:
    asked = {} if cents is None else {"amount": cents}
    made = await world.operator.post(f"/_sandbox/disputes/{payment['payment_id']}", json=asked)
    made.raise_for_status()
    value: dict[str, object] = made.json()
    return value


async def end(world: World, opened: dict[str, object], ending: str) -> dict[str, object]:
    ended = await world.operator.post(f"/_sandbox/disputes/{opened['dispute_id']}/{ending}")
    ended.raise_for_status()
    value: dict[str, object] = ended.json()
    return value


async def paid(world: World) -> dict[str, object]:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    await world.webhooks().receive(*delivery("payment.succeeded", payment, "msg_paid"))
    return payment


async def test_dispute_claws_back_its_share_once(world: World) -> None:
    payment = await paid(world)
    opened = await dispute(world, payment, 250)
    for copy in range(3):
        done = await world.webhooks().receive(*delivery("dispute.opened", opened, f"msg_{copy}"))
        assert done.outcome is Outcome.APPLIED
    assert await balance(world) == 2_500_000_000


@pytest.mark.parametrize(("ending", "left"), [("won", 5 * USD), ("cancelled", 5 * USD), ("lost", 0), ("accepted", 0)])
async def test_only_a_won_or_dropped_dispute_restores(world: World, ending: str, left: int) -> None:
    payment = await paid(world)
    opened = await dispute(world, payment)
    await world.webhooks().receive(*delivery("dispute.opened", opened, "msg_1"))
    assert await balance(world) == 0
    ended = await end(world, opened, ending)
    for copy in range(2):
        await world.webhooks().receive(*delivery(f"dispute.{ending}", ended, f"msg_end_{copy}"))
    assert await balance(world) == left


async def test_challenged_or_expired_dispute_still_stands(world: World) -> None:
    payment = await paid(world)
    opened = await dispute(world, payment)
    for number, ending in enumerate(("challenged", "expired")):
        await world.webhooks().receive(
            *delivery(f"dispute.{ending}", await end(world, opened, ending), f"msg_{number}")
        )
        assert await balance(world) == 0


async def test_dispute_state_comes_from_dodo(world: World) -> None:
    payment = await paid(world)
    opened = await dispute(world, payment)
    await end(world, opened, "won")
    await world.webhooks().receive(*delivery("dispute.opened", opened | {"dispute_status": "dispute_opened"}))
    assert await balance(world) == 5 * USD


async def test_unreadable_dispute_amount_claws_back_everything(world: World) -> None:
    """Its amount is text of an undocumented unit: what is no whole number is taken for the whole payment."""
    wire = {"dispute_id": "dp_1", "payment_id": "pay_1", "dispute_status": "dispute_opened"}
    assert [Dispute.read(wire | {"amount": text}).amount for text in ("250", "2.50", "", None)] == [
        250,
        None,
        None,
        None,
    ]


@pytest.mark.parametrize("order", list(permutations(range(4))))
async def test_refund_and_dispute_together_claw_back_the_grant(world: World, order: tuple[int, ...]) -> None:
    """The refund's share stays taken when the dispute, which had all of it, is won."""
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    opened = await dispute(world, payment)
    given_back = await refund(world, payment, 200)
    won = await end(world, opened, "won")
    signed = [
        delivery("payment.succeeded", payment, "msg_a"),
        delivery("dispute.opened", opened, "msg_b"),
        delivery("refund.succeeded", given_back, "msg_c"),
        delivery("dispute.won", won, "msg_d"),
    ]
    for index in order:
        await world.webhooks().receive(*signed[index])
    assert await balance(world) == 3 * USD


async def test_refund_without_credit_left_is_taken_from_a_won_dispute(world: World) -> None:
    payment = await paid(world)
    opened = await dispute(world, payment)
    await world.webhooks().receive(*delivery("dispute.opened", opened, "msg_1"))
    await world.webhooks().receive(*delivery("refund.succeeded", await refund(world, payment, 200), "msg_2"))
    assert await balance(world) == 0
    await world.webhooks().receive(*delivery("dispute.won", await end(world, opened, "won"), "msg_3"))
    assert await balance(world) == 3 * USD


async def test_sandbox_shows_disputes_as_dodo_does(world: World) -> None:
    payment = await paid(world)
    opened = await dispute(world, payment, 100)
    listed = (await world.operator.get("/disputes", headers=AUTH)).json()["items"]
    assert [one["dispute_id"] for one in listed] == [opened["dispute_id"]]
    twice = await world.operator.post(f"/_sandbox/disputes/{payment['payment_id']}", json={"amount": 501})
    assert twice.status_code == 400
    await end(world, opened, "lost")
    assert (await world.operator.post(f"/_sandbox/disputes/{opened['dispute_id']}/won")).status_code == 400
