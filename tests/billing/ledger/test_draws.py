"""What a request draws on, in which order, and where the rest of it goes back to."""

import time

import pytest
from redis.asyncio import Redis

from billing.ledger.account import Clawback, Funding
from billing.ledger.errors import CreditOnHold, InsufficientCredits
from billing.ledger.ledger import Ledger
from billing.money import Nanos
from billing.store.keys import shard_for
from billing.usage import OVERAGE, RequestId, Unit
from tests.support.clock import SteppedClock
from tests.support.samples import ACME, MAX_COST, allowance, calls, money, request, settlement

DAY_MS = 24 * 3_600_000


class TestDrawOrder:
    async def test_allowance_then_packs_by_expiry_then_overage(self, ledger: Ledger, clock: SteppedClock) -> None:
        await ledger.grant(money(5_000, "payment:never"))
        await ledger.grant(money(5_000, "payment:late", clock.now_ms + 2_000))
        await ledger.grant(money(5_000, "payment:soon", clock.now_ms + 1_000))
        funding = Funding(allowance("allowance:1", 5_000, clock.now_ms + 9_000), Nanos(100_000))
        hold = await ledger.hold(request(funding=funding))
        assert [(d.bucket, d.amount) for d in hold.draws] == [
            ("allowance:1", 5_000),
            ("payment:soon", 5_000),
            ("payment:late", 5_000),
            ("payment:never", 5_000),
            (OVERAGE, 30_000),
        ]
        record = (await ledger.settle(settlement(completion=1))).record
        assert [(d.bucket, d.amount) for d in record.draws] == [
            ("allowance:1", 5_000),
            ("payment:soon", 5_000),
            ("payment:late", 2_000),
        ]
        account = await ledger.account(ACME)
        assert [b.remaining for b in account.buckets] == [0, 0, 3_000, 5_000]
        assert (account.overage_nanos, account.held_nanos) == (0, 0)

    async def test_an_expired_bucket_is_not_drawn(self, ledger: Ledger, clock: SteppedClock) -> None:
        await ledger.grant(money(MAX_COST, expires_at_ms=clock.now_ms + 1))
        clock.now_ms += 1
        with pytest.raises(InsufficientCredits):
            await ledger.hold(request())
        assert (await ledger.account(ACME)).buckets == ()

    async def test_an_allowance_is_filled_once_per_period_and_lapses(self, ledger: Ledger, clock: SteppedClock) -> None:
        november = Funding(allowance("allowance:free:2026-11", MAX_COST, clock.now_ms + 1_000))
        december = Funding(allowance("allowance:free:2026-12", MAX_COST, clock.now_ms + 9_000))
        await ledger.hold(request("req_1", funding=november))
        await ledger.settle(settlement("req_1", completion=20))
        with pytest.raises(InsufficientCredits):
            await ledger.hold(request("req_2", funding=november))
        clock.now_ms += 1_000
        await ledger.hold(request("req_3", funding=december))
        await ledger.settle(settlement("req_3", completion=0))
        with pytest.raises(InsufficientCredits):
            await ledger.hold(request("req_4", funding=november))
        assert [b.remaining for b in (await ledger.account(ACME)).buckets] == [MAX_COST - 10_000]

    async def test_an_allowance_that_a_change_of_plan_put_aside_comes_back_as_it_was(
        self, ledger: Ledger, clock: SteppedClock
    ) -> None:
        free = Funding(allowance("allowance:free", 2 * MAX_COST, clock.now_ms + 1_000))
        pro = Funding(allowance("allowance:pro", MAX_COST, clock.now_ms + 1_000))
        await ledger.hold(request("req_1", funding=free))
        await ledger.settle(settlement("req_1", completion=20))
        await ledger.hold(request("req_2", funding=pro))
        await ledger.settle(settlement("req_2", completion=20))
        await ledger.hold(request("req_3", funding=free))
        with pytest.raises(CreditOnHold):
            await ledger.hold(request("req_4", funding=free))

    @pytest.mark.parametrize("is_used_meanwhile", [False, True])
    async def test_an_allowance_ends_with_its_period_though_a_pause_puts_that_off(
        self, ledger: Ledger, clock: SteppedClock, is_used_meanwhile: bool
    ) -> None:
        """What is left stays, whether or not a pack's request found it ended and put it aside."""
        await ledger.grant(money(2 * MAX_COST))
        ends = clock.now_ms + 1_000
        await ledger.hold(request("req_1", funding=Funding(allowance("allowance:1", 3 * MAX_COST, ends))))
        await ledger.settle(settlement("req_1", completion=20))
        clock.now_ms = ends
        if is_used_meanwhile:
            await ledger.hold(request("req_2", funding=Funding()))
        put_off = Funding(allowance("allowance:1", 3 * MAX_COST, ends + 500))
        held = await ledger.hold(request("req_3", funding=put_off))
        assert [draw.bucket for draw in held.draws] == ["allowance:1"]
        earlier = await ledger.hold(request("req_4", funding=Funding(allowance("allowance:1", 9, ends))))
        assert earlier.draws[0].bucket == "allowance:1", "a gateway that learns of it late takes nothing away"
        clock.now_ms = ends + 500
        assert [b.id for b in (await ledger.account(ACME)).buckets] == ["payment:1"]

    async def test_what_is_shown_is_what_a_hold_finds(self, ledger: Ledger, clock: SteppedClock) -> None:
        """Of a plan that was left nothing; of one that was left and taken again, or put off, what is left of it."""
        ends = clock.now_ms + 1_000
        free, none = Funding(allowance("allowance:free", 2 * MAX_COST, ends)), Funding()
        pro = Funding(allowance("allowance:pro", 3 * MAX_COST, ends))
        await ledger.grant(money(MAX_COST))
        for number, funding in enumerate((free, none, pro, free)):
            before = (await ledger.account(ACME, funding)).balance_nanos
            hold = await ledger.hold(request(f"req_{number}", funding=funding))
            assert before == hold.balance_nanos + hold.held_nanos
            record = (await ledger.settle(settlement(f"req_{number}", completion=20))).record
            assert record.balance_nanos == (await ledger.account(ACME, funding)).balance_nanos == before - MAX_COST
        clock.now_ms = ends
        put_off = Funding(allowance("allowance:free", 2 * MAX_COST, ends + 500))
        shown = await ledger.account(ACME, put_off)
        assert [(b.id, b.remaining, b.expires_at_ms) for b in shown.buckets] == [("allowance:free", 0, ends + 500)]
        assert (await ledger.account(ACME, none)).buckets == ()

    async def test_a_late_settle_shows_what_its_plan_may_draw(
        self, ledger: Ledger, store: Redis, clock: SteppedClock
    ) -> None:
        await ledger.grant(money(2 * MAX_COST))
        await ledger.hold(request("req_0", funding=Funding(allowance("allowance:1", MAX_COST, clock.now_ms + 1_000))))
        await ledger.void(RequestId("req_0"), ACME)
        await ledger.hold(request("req_1"))
        await store.zadd(shard_for(ACME).leases, {"req_1": 1})
        assert await ledger.expire() == 1
        record = (await ledger.settle(settlement("req_1", completion=20))).record
        assert record.balance_nanos == (await ledger.account(ACME, Funding())).balance_nanos

    async def test_an_allowance_needs_its_plan(self, ledger: Ledger, clock: SteppedClock) -> None:
        funding = Funding(allowance("allowance:1", 2 * MAX_COST, clock.now_ms + 1_000))
        await ledger.hold(request("req_1", funding=funding))
        with pytest.raises(InsufficientCredits):
            await ledger.hold(request("req_2", funding=Funding()))
        await ledger.hold(request("req_3", funding=funding))

    async def test_used_up_buckets_leave_the_hot_path_and_stay_known(self, ledger: Ledger, store: Redis) -> None:
        await ledger.grant(money(MAX_COST, "payment:1"))
        await ledger.hold(request("req_1"))
        await ledger.settle(settlement("req_1", completion=20))
        await ledger.grant(money(MAX_COST, "payment:2"))
        await ledger.hold(request("req_2"))
        shard = shard_for(ACME)
        assert await store.hkeys(shard.buckets(ACME)) == ["payment:2"]
        assert await store.hkeys(shard.retired(ACME)) == ["payment:1"]
        assert await ledger.claw_back(Clawback("refund:1", ACME, "payment:1", MAX_COST)) == MAX_COST
        assert (await ledger.account(ACME)).balance_nanos == -MAX_COST
        assert await store.hkeys(shard.retired(ACME)) == []

    async def test_clock_that_ran_ahead_ends_no_credit(self, ledger: Ledger, clock: SteppedClock) -> None:
        now = int(time.time() * 1000)
        clock.now_ms = now
        await ledger.grant(money(100_000, "payment:1", expires_at_ms=now + DAY_MS))
        await ledger.grant(money(100_000, "payment:2"))
        clock.now_ms = now + 3_650 * DAY_MS
        assert [d.bucket for d in (await ledger.hold(request())).draws] == ["payment:2"]
        clock.now_ms = now
        assert [d.bucket for d in (await ledger.hold(request("req_2"))).draws] == ["payment:1"]


class TestRequestsBuckets:
    async def test_a_call_covers_a_request_whole_whatever_it_costs(self, ledger: Ledger) -> None:
        await ledger.grant(calls(2))
        await ledger.grant(money(100_000, "payment:2"))
        hold = await ledger.hold(request())
        assert (hold.covered_by_requests, hold.max_tokens, hold.balance_nanos) == (True, 20, 100_000)
        assert (await ledger.account(ACME)).held_requests == 1
        record = (await ledger.settle(settlement())).record
        assert (record.charged_nanos, record.list_nanos) == (0, 20_000)
        assert [(d.bucket, d.unit, d.amount) for d in record.draws] == [("payment:1", Unit.REQUESTS, 1)]

    async def test_a_voided_call_comes_back(self, ledger: Ledger) -> None:
        await ledger.grant(calls(1))
        await ledger.hold(request())
        await ledger.void(RequestId("req_1"), ACME)
        assert [b.remaining for b in (await ledger.account(ACME)).buckets] == [1]

    @pytest.mark.parametrize(("model", "covered"), [("pirate", True), ("yaml", True), ("pir", False), ("a.ml", False)])
    async def test_calls_for_named_models_cover_those_only(self, ledger: Ledger, model: str, covered: bool) -> None:
        await ledger.grant(calls(5, adapters=("pirate", "yaml")))
        await ledger.grant(money(100_000, "payment:2"))
        assert (await ledger.hold(request(model=model))).covered_by_requests is covered

    async def test_the_last_call_is_followed_by_money(self, ledger: Ledger) -> None:
        await ledger.grant(calls(1))
        await ledger.grant(money(100_000, "payment:2"))
        covered = [(await ledger.hold(request(f"req_{n}"))).covered_by_requests for n in range(2)]
        assert covered == [True, False]

    async def test_a_call_that_only_others_hold_is_worth_a_retry(self, ledger: Ledger) -> None:
        await ledger.grant(calls(1))
        await ledger.hold(request("req_1"))
        with pytest.raises(CreditOnHold, match="what would pay for it is held by requests still running"):
            await ledger.hold(request("req_2"))
        await ledger.settle(settlement("req_1"))
        with pytest.raises(InsufficientCredits):
            await ledger.hold(request("req_2"))


class TestOverage:
    async def test_exposure_ends_at_the_cap_and_falls_when_paid(self, ledger: Ledger) -> None:
        postpaid = Funding(credit_limit=Nanos(MAX_COST))
        hold = await ledger.hold(request("req_1", funding=postpaid))
        assert [(d.bucket, d.amount) for d in hold.draws] == [(OVERAGE, MAX_COST)]
        with pytest.raises(CreditOnHold):
            await ledger.hold(request("req_2", funding=postpaid))
        record = (await ledger.settle(settlement("req_1", completion=20))).record
        assert (record.overage_nanos, record.charged_nanos) == (MAX_COST, MAX_COST)
        with pytest.raises(InsufficientCredits) as refused:
            await ledger.hold(request("req_2", funding=postpaid))
        assert refused.value.limit_source == "overage_cap"
        assert await ledger.repay_overage("payment:9", ACME, MAX_COST)
        assert not await ledger.repay_overage("payment:9", ACME, MAX_COST)
        assert (await ledger.account(ACME)).overage_nanos == 0
        await ledger.hold(request("req_2", funding=postpaid))

    async def test_unused_exposure_goes_back(self, ledger: Ledger) -> None:
        await ledger.hold(request(funding=Funding(credit_limit=Nanos(MAX_COST))))
        assert (await ledger.account(ACME)).held_nanos == MAX_COST
        await ledger.settle(settlement(completion=5))
        account = await ledger.account(ACME)
        assert (account.overage_nanos, account.held_nanos) == (20_000, 0)

    async def test_a_payment_lowers_exposure_to_nothing_and_no_further(self, ledger: Ledger) -> None:
        await ledger.hold(request(funding=Funding(credit_limit=Nanos(MAX_COST))))
        await ledger.settle(settlement(completion=5))
        await ledger.repay_overage("payment:9", ACME, 10**12)
        assert (await ledger.account(ACME)).overage_nanos == 0
