"""What a refund takes of an allowance, which no movement had filled: before its first hold, and after its last."""

import pytest
from redis.asyncio import Redis

from billing.ledger.account import Clawback, Funding, Grant
from billing.ledger.errors import InsufficientCredits
from billing.ledger.ledger import Ledger
from billing.usage import Unit
from tests.support.clock import SteppedClock
from tests.support.samples import ACME, allowance, request, settlement

NOW = 1_795_000_000_000
PERIOD = 1_000_000
GIVEN = allowance("allowance:sub:1:pro", 60_000, NOW + PERIOD)
NEXT = allowance("allowance:sub:2:pro", 60_000, NOW + 2 * PERIOD)


def clawback(amount: int, source: str = "refund:1") -> Clawback:
    return Clawback(source, ACME, GIVEN.id, amount, GIVEN)


async def test_clawback_before_the_first_hold_leaves_the_rest(ledger: Ledger) -> None:
    assert await ledger.claw_back(clawback(45_000)) == 45_000
    assert await ledger.claw_back(clawback(45_000)) == 45_000, "once"
    assert (await ledger.account(ACME, Funding(GIVEN))).balance_nanos == 15_000
    assert len((await ledger.account(ACME, Funding(GIVEN))).buckets) == 1


async def test_clawback_of_all_refuses_the_first_hold(ledger: Ledger) -> None:
    await ledger.claw_back(clawback(60_000))
    with pytest.raises(InsufficientCredits):
        await ledger.hold(request(funding=Funding(GIVEN)))


async def test_clawbacks_together_take_no_more_than_the_allowance(ledger: Ledger) -> None:
    taken = [await ledger.claw_back(clawback(45_000, source)) for source in ("refund:1", "dispute:1")]
    assert taken == [45_000, 15_000]
    assert (await ledger.account(ACME, Funding(GIVEN))).balance_nanos == 0


async def test_clawback_of_a_past_allowance_is_a_debt_of_what_was_spent(ledger: Ledger, clock: SteppedClock) -> None:
    await ledger.hold(request("req_1", funding=Funding(GIVEN)))
    await ledger.settle(settlement("req_1"))
    clock.move(PERIOD)
    await ledger.hold(request("req_2", funding=Funding(NEXT)))
    await ledger.settle(settlement("req_2"))
    await ledger.claw_back(clawback(60_000))
    assert (await ledger.account(ACME, Funding(NEXT))).balance_nanos == 60_000 - 20_000 - 20_000


async def test_restored_allowance_gives_back_to_the_pack_that_paid(ledger: Ledger, store: Redis) -> None:
    await ledger.hold(request("req_1", funding=Funding(GIVEN)))
    await ledger.settle(settlement("req_1"))
    await ledger.grant(Grant("payment:1", ACME, Unit.NANOS, 50_000))
    await ledger.claw_back(clawback(60_000))
    assert (await ledger.account(ACME, Funding(GIVEN))).balance_nanos == 30_000
    assert await ledger.restore(clawback(60_000)) == 60_000
    left = {bucket.id: bucket.remaining for bucket in (await ledger.account(ACME, Funding(GIVEN))).buckets}
    assert left == {GIVEN.id: 40_000, "payment:1": 50_000}
