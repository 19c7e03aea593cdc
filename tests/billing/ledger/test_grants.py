"""Credit comes once per payment and goes once per refund, in any order."""

import json

import pytest
from redis.asyncio import Redis

from billing.ledger.account import Adjustment, Clawback, Funding
from billing.ledger.errors import GrantRefused, InsufficientCredits, SourceReused
from billing.ledger.ledger import Ledger
from billing.money import MAX_GRANT_NANOS, Nanos
from billing.store.keys import shard_for
from billing.usage import Unit
from tests.support.clock import SteppedClock
from tests.support.samples import ACME, FREE, MAX_COST, calls, money, request, settlement


class TestGrantsAndClawbacks:
    async def test_a_source_grants_once(self, ledger: Ledger, store: Redis) -> None:
        assert [await ledger.grant(money(7)) for _ in range(5)] == [True, False, False, False, False]
        assert (await ledger.account(ACME)).balance_nanos == 7
        assert await store.xlen(shard_for(ACME).stream) == 1

    async def test_the_same_source_with_other_content_is_an_error(self, ledger: Ledger) -> None:
        await ledger.grant(money(7))
        for other in (money(8), calls(7)):
            with pytest.raises(SourceReused):
                await ledger.grant(other)
        with pytest.raises(SourceReused):
            await ledger.repay_overage("payment:1", ACME, 7)

    @pytest.mark.parametrize("amount", [0, -1, MAX_GRANT_NANOS + 1])
    async def test_an_absurd_grant_is_refused(self, ledger: Ledger, amount: int) -> None:
        with pytest.raises(GrantRefused, match=r"is nothing, or more than the \$1000000\.00"):
            await ledger.grant(money(amount))

    async def test_a_refund_may_leave_a_debt_that_stops_everything_paid_in_money(self, ledger: Ledger) -> None:
        await ledger.grant(money(MAX_COST))
        await ledger.hold(request("req_1"))
        await ledger.settle(settlement("req_1", completion=20))
        refund = Clawback("refund:1", ACME, "payment:1", MAX_COST)
        assert [await ledger.claw_back(refund) for _ in range(3)] == [MAX_COST, MAX_COST, MAX_COST]
        assert (await ledger.account(ACME)).balance_nanos == -MAX_COST
        with pytest.raises(InsufficientCredits):
            await ledger.hold(request("req_2", funding=Funding(credit_limit=Nanos(10 * MAX_COST))))
        await ledger.hold(request("req_3", price=FREE))

    async def test_a_new_grant_pays_the_debt_first_even_if_it_expires(
        self, ledger: Ledger, clock: SteppedClock
    ) -> None:
        await ledger.grant(money(MAX_COST))
        await ledger.hold(request("req_1"))
        await ledger.settle(settlement("req_1", completion=20))
        await ledger.claw_back(Clawback("refund:1", ACME, "payment:1", MAX_COST))
        await ledger.grant(money(3 * MAX_COST, "payment:2", clock.now_ms + 10))
        assert (await ledger.account(ACME)).balance_nanos == 2 * MAX_COST
        clock.now_ms += 10
        assert (await ledger.account(ACME)).balance_nanos == 0

    async def test_never_more_is_taken_than_was_granted(self, ledger: Ledger) -> None:
        await ledger.grant(money(100))
        taken = [await ledger.claw_back(Clawback(f"refund:{n}", ACME, "payment:1", 60)) for n in range(3)]
        assert taken == [60, 40, 0]
        assert (await ledger.account(ACME)).balance_nanos == 0

    async def test_a_refund_that_overtakes_its_payment_waits_for_it(self, ledger: Ledger, store: Redis) -> None:
        assert await ledger.claw_back(Clawback("refund:1", ACME, "payment:1", 60)) == 0
        assert await ledger.grant(money(100))
        assert not await ledger.grant(money(100))
        assert (await ledger.account(ACME)).balance_nanos == 40
        kinds = [fields["k"] for _, fields in await store.xrange(shard_for(ACME).stream)]
        assert kinds == ["grant", "clawback"]

    async def test_a_refund_while_the_credit_is_held_is_felt_when_it_settles(self, ledger: Ledger) -> None:
        await ledger.grant(money(MAX_COST))
        await ledger.hold(request())
        await ledger.claw_back(Clawback("refund:1", ACME, "payment:1", MAX_COST))
        record = (await ledger.settle(settlement(completion=5))).record
        assert (record.charged_nanos, record.balance_nanos) == (20_000, -20_000)

    async def test_what_is_owed_by_nothing_is_an_error(self, ledger: Ledger) -> None:
        await ledger.repay_overage("payment:1", ACME, 5)
        with pytest.raises(GrantRefused):
            await ledger.claw_back(Clawback("refund:1", ACME, "payment:1", 5))
        with pytest.raises(GrantRefused):
            await ledger.claw_back(Clawback("refund:2", ACME, "payment:1", 0))


def correction(amount: int, source: str = "adjustment:1", unit: Unit = Unit.NANOS) -> Adjustment:
    return Adjustment(source, ACME, unit, amount, "the 3rd was billed twice")


class TestCorrections:
    @pytest.mark.parametrize("amount", [40, -40, -1_000])
    async def test_a_correction_moves_the_balance_by_itself_and_once(
        self, ledger: Ledger, store: Redis, amount: int
    ) -> None:
        await ledger.grant(money(100))
        assert [await ledger.adjust(correction(amount)) for _ in range(3)] == [True, False, False]
        assert (await ledger.account(ACME)).balance_nanos == 100 + amount
        _, (_, entry) = await store.xrange(shard_for(ACME).stream)
        assert entry["k"] == "adjust"
        moved = json.loads(entry["p"])
        assert (moved["amount"], moved["balance_nanos"], moved["seq"]) == (amount, 100 + amount, 2)
        assert (moved["source"], moved["reason"]) == ("adjustment:1", "the 3rd was billed twice")

    async def test_the_same_source_with_another_amount_is_an_error(self, ledger: Ledger) -> None:
        await ledger.adjust(correction(5))
        for other in (correction(6), correction(-5), correction(5, unit=Unit.REQUESTS)):
            with pytest.raises(SourceReused):
                await ledger.adjust(other)
        with pytest.raises(SourceReused):
            await ledger.grant(money(5, "adjustment:1"))

    @pytest.mark.parametrize("amount", [0, MAX_GRANT_NANOS + 1, -MAX_GRANT_NANOS - 1])
    async def test_an_absurd_correction_is_refused(self, ledger: Ledger, amount: int) -> None:
        with pytest.raises(GrantRefused):
            await ledger.adjust(correction(amount))

    async def test_what_is_taken_is_taken_from_credit_and_the_rest_is_owed(self, ledger: Ledger) -> None:
        await ledger.grant(money(MAX_COST))
        await ledger.hold(request(max_tokens=10))
        await ledger.adjust(correction(-MAX_COST))
        assert (await ledger.account(ACME)).balance_nanos == -30_000
        with pytest.raises(InsufficientCredits):
            await ledger.hold(request("req_2"))
        record = (await ledger.settle(settlement(completion=10))).record
        assert (record.charged_nanos, record.balance_nanos) == (30_000, -30_000)
        await ledger.grant(money(MAX_COST, "payment:2"))
        assert (await ledger.account(ACME)).balance_nanos == MAX_COST - 30_000

    async def test_calls_can_be_corrected_too(self, ledger: Ledger) -> None:
        await ledger.grant(calls(3))
        await ledger.adjust(correction(-2, unit=Unit.REQUESTS))
        covered = [(await ledger.hold(request("req_0"))).covered_by_requests]
        await ledger.grant(money(MAX_COST, "payment:2"))
        covered.append((await ledger.hold(request("req_1"))).covered_by_requests)
        assert covered == [True, False]

    async def test_a_correction_downwards_cannot_be_refunded(self, ledger: Ledger) -> None:
        await ledger.adjust(correction(-5))
        assert await ledger.claw_back(Clawback("refund:1", ACME, "adjustment:1", 5)) == 0
        assert (await ledger.account(ACME)).balance_nanos == -5


async def test_what_paid_a_debt_comes_back_once(ledger: Ledger) -> None:
    """Pack 2 pays 40,000 for the disputed pack 1 and has them back; a later refund that is undone moves nothing."""
    await ledger.grant(money(100_000))
    await ledger.hold(request(max_tokens=15))
    await ledger.settle(settlement(completion=15))
    await ledger.grant(money(50_000, "payment:2"))
    for source, amount in (("dispute:1", 100_000), ("refund:2", 50_000)):
        clawback = Clawback(source, ACME, "payment:1", amount)
        assert await ledger.claw_back(clawback) == amount
        assert await ledger.restore(clawback) == amount
        remaining = {bucket.id: bucket.remaining for bucket in (await ledger.account(ACME)).buckets}
        assert remaining == {"payment:1": 60_000, "payment:2": 50_000}
