"""Credit comes once per payment and goes once per refund, in any order."""

import pytest
from redis.asyncio import Redis

from billing.account import Clawback, Funding
from billing.errors import GrantRefused, InsufficientCredits, SourceReused
from billing.money import MAX_GRANT_NANOS, Nanos
from billing.store.holds import Ledger
from billing.store.keys import shard_for
from tests.billing.conftest import SteppedClock
from tests.billing.samples import ACME, FREE, WORST, calls, money, request, settlement


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
        with pytest.raises(GrantRefused):
            await ledger.grant(money(amount))

    async def test_a_refund_may_leave_a_debt_that_stops_everything_paid_in_money(self, ledger: Ledger) -> None:
        await ledger.grant(money(WORST))
        await ledger.hold(request("req_1"))
        await ledger.settle(settlement("req_1", completion=20))
        refund = Clawback("refund:1", ACME, "payment:1", WORST)
        assert [await ledger.claw_back(refund) for _ in range(3)] == [WORST, WORST, WORST]
        assert (await ledger.account(ACME)).balance_nanos == -WORST
        with pytest.raises(InsufficientCredits):
            await ledger.hold(request("req_2", funding=Funding(overage_cap=Nanos(10 * WORST))))
        await ledger.hold(request("req_3", price=FREE))

    async def test_a_new_grant_pays_the_debt_first_even_if_it_expires(
        self, ledger: Ledger, clock: SteppedClock
    ) -> None:
        await ledger.grant(money(WORST))
        await ledger.hold(request("req_1"))
        await ledger.settle(settlement("req_1", completion=20))
        await ledger.claw_back(Clawback("refund:1", ACME, "payment:1", WORST))
        await ledger.grant(money(3 * WORST, "payment:2", clock.now_ms + 10))
        assert (await ledger.account(ACME)).balance_nanos == 2 * WORST
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
        await ledger.grant(money(WORST))
        await ledger.hold(request())
        await ledger.claw_back(Clawback("refund:1", ACME, "payment:1", WORST))
        record = (await ledger.settle(settlement(completion=5))).record
        assert (record.charged_nanos, record.balance_nanos) == (20_000, -20_000)

    async def test_what_is_owed_by_nothing_is_an_error(self, ledger: Ledger) -> None:
        await ledger.repay_overage("payment:1", ACME, 5)
        with pytest.raises(GrantRefused):
            await ledger.claw_back(Clawback("refund:1", ACME, "payment:1", 5))
        with pytest.raises(GrantRefused):
            await ledger.claw_back(Clawback("refund:2", ACME, "payment:1", 0))
