"""Laws of the ledger: what may be held, what is charged, and that a repeat changes nothing."""

import asyncio
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from billing.account import Bucket, Clawback, Funding, Progress, Settlement
from billing.errors import CreditOnHold, DuplicateRequest, GrantRefused, InsufficientCredits, SourceReused, UnknownHold
from billing.money import MAX_GRANT_NANOS, Nanos
from billing.prices import Price
from billing.store.holds import Ledger
from billing.store.keys import shard_for
from billing.usage import NOTHING, OVERAGE, BucketId, RequestId, Status, TenantId, Unit, Usage, UsageRecord
from tests.billing.conftest import SteppedClock
from tests.billing.samples import ACME, FREE, PER_TOKEN, calls, money, request, settlement

WORST = 50_000
"""What ``request`` holds."""


async def records(store: Redis) -> list[UsageRecord]:
    entries = await store.xrange(shard_for(ACME).stream)
    return [UsageRecord.from_json(fields["p"]) for _, fields in entries if fields["k"] == "usage"]


async def test_a_hold_takes_the_worst_case_and_a_settle_returns_the_rest(ledger: Ledger) -> None:
    await ledger.grant(money(100_000))
    hold = await ledger.hold(request())
    assert (hold.balance_nanos, hold.max_tokens, hold.is_clamped) == (50_000, 20, False)
    receipt = await ledger.settle(settlement(completion=5))
    record = receipt.record
    assert (record.charged_nanos, record.list_nanos, record.balance_nanos) == (20_000, 20_000, 80_000)
    assert (record.record_id, record.adapter, record.plan) == ("rec_req_1", "pirate@0123456789ab", "prepaid")
    assert record.price_version == PER_TOKEN.version
    account = await ledger.account(ACME)
    assert (account.balance_nanos, account.held_nanos, account.open_holds, account.seq) == (80_000, 0, 0, 2)


async def test_what_the_receipt_says_is_what_the_stream_keeps(ledger: Ledger, store: Redis) -> None:
    await ledger.grant(money(100_000))
    await ledger.hold(request(adapter="a/b@0123", model="a/b", adapter_class='q"uote'))
    receipt = await ledger.settle(settlement())
    assert await records(store) == [receipt.record]
    ((_, entry),) = await store.xrevrange(shard_for(ACME).stream, count=1)
    assert entry == {"k": "usage", "t": ACME, "p": entry["p"]}


@pytest.mark.parametrize(
    ("credit", "tokens"),
    [(WORST, 20), (WORST - 1, 19), (48_000, 19), (47_999, 18), (12_000, 1)],
)
async def test_a_hold_is_cut_to_what_the_credit_affords(ledger: Ledger, credit: int, tokens: int) -> None:
    await ledger.grant(money(credit))
    hold = await ledger.hold(request())
    assert hold.max_tokens == tokens
    assert hold.is_clamped == (tokens < 20)
    assert PER_TOKEN.at_most(10, hold.max_tokens) <= sum(d.amount for d in hold.draws) <= credit


async def test_a_nano_less_than_the_shortest_answer_is_refused(ledger: Ledger) -> None:
    await ledger.grant(money(11_999))
    with pytest.raises(InsufficientCredits) as refused:
        await ledger.hold(request())
    assert (refused.value.balance_nanos, refused.value.required_nanos) == (11_999, WORST)
    assert (refused.value.max_affordable_tokens, refused.value.limit_source) == (0, "balance")


async def test_the_least_worth_running_for_is_the_sender_s_to_say(ledger: Ledger) -> None:
    await ledger.grant(money(20_000))
    with pytest.raises(InsufficientCredits) as refused:
        await ledger.hold(request(min_tokens=6))
    assert refused.value.max_affordable_tokens == 5
    assert (await ledger.hold(request(min_tokens=5))).max_tokens == 5


async def test_credit_that_others_hold_is_worth_a_retry(ledger: Ledger) -> None:
    await ledger.grant(money(WORST))
    await ledger.hold(request())
    with pytest.raises(CreditOnHold) as refused:
        await ledger.hold(request("req_2"))
    assert (refused.value.balance_nanos, refused.value.held_nanos, refused.value.required_nanos) == (0, WORST, 12_000)
    assert refused.value.retry_after_s > 0


async def test_many_race_for_fifty_and_fifty_win(ledger: Ledger) -> None:
    price = Price.model_validate({"per_request": "0.0001"})
    await ledger.grant(money(50 * 100_000))
    held = await asyncio.gather(
        *(ledger.hold(request(f"req_{n}", price=price)) for n in range(200)), return_exceptions=True
    )
    assert sum(not isinstance(answer, BaseException) for answer in held) == 50
    assert all(isinstance(answer, CreditOnHold) for answer in held if isinstance(answer, BaseException))


class TestRepeats:
    async def test_a_hold_whose_reply_was_lost_is_the_same_hold(self, ledger: Ledger) -> None:
        await ledger.grant(money(100_000))
        first, second = await ledger.hold(request()), await ledger.hold(request())
        assert (first.draws, first.lease_ends_at_ms) == (second.draws, second.lease_ends_at_ms)
        assert (await ledger.account(ACME)).held_nanos == WORST

    async def test_an_id_used_for_something_else_is_refused(self, ledger: Ledger) -> None:
        await ledger.grant(money(100_000))
        await ledger.hold(request())
        for other in (request(max_tokens=19), request(key_id="key_2"), request(price=FREE)):
            with pytest.raises(DuplicateRequest):
                await ledger.hold(other)

    async def test_a_settled_id_cannot_be_held_again(self, ledger: Ledger) -> None:
        await ledger.grant(money(100_000))
        await ledger.hold(request())
        await ledger.settle(settlement())
        with pytest.raises(DuplicateRequest):
            await ledger.hold(request())

    async def test_a_second_settle_returns_the_first_record(self, ledger: Ledger, store: Redis) -> None:
        await ledger.grant(money(100_000))
        await ledger.hold(request())
        first = await ledger.settle(settlement(completion=5))
        second = await ledger.settle(settlement(completion=20, status=Status.CANCELLED))
        assert (second.record, first.is_repeat, second.is_repeat) == (first.record, False, True)
        assert len(await records(store)) == 1

    async def test_what_was_never_held_is_never_charged(self, ledger: Ledger) -> None:
        await ledger.grant(money(100_000))
        with pytest.raises(UnknownHold):
            await ledger.settle(settlement())

    async def test_another_tenant_of_the_shard_cannot_settle_it(self, ledger: Ledger) -> None:
        shard, others = shard_for(ACME), (TenantId(f"t{n}") for n in range(10_000))
        neighbour = next(t for t in others if shard_for(t) == shard)
        await ledger.grant(money(100_000))
        await ledger.hold(request())
        with pytest.raises(UnknownHold):
            await ledger.settle(replace(settlement(), tenant=neighbour))
        await ledger.settle(settlement())
        with pytest.raises(UnknownHold):
            await ledger.settle(replace(settlement(), tenant=neighbour))

    async def test_a_settled_id_is_known_for_two_stretches_and_then_refused(
        self, store: Redis, clock: SteppedClock
    ) -> None:
        stretch_ms = 400
        ledger = Ledger(store, clock, stretch_ms)
        await ledger.grant(money(100_000))
        await _start_of_a_stretch(store, stretch_ms)
        await ledger.hold(request())
        await ledger.settle(settlement())
        await _start_of_a_stretch(store, stretch_ms)
        assert (await ledger.settle(settlement())).is_repeat
        await asyncio.sleep(stretch_ms / 1000)
        assert (await ledger.settle(settlement())).is_repeat
        await asyncio.sleep(stretch_ms / 1000)
        with pytest.raises(UnknownHold):
            await ledger.settle(settlement())
        await asyncio.sleep(stretch_ms / 1000)
        assert not await store.exists(*shard_for(ACME).settled)


async def _start_of_a_stretch(store: Redis, stretch_ms: int) -> None:
    seconds, microseconds = await store.time()
    await asyncio.sleep((stretch_ms - (seconds * 1000 + microseconds // 1000) % stretch_ms + 5) / 1000)


class TestCharges:
    async def test_never_above_the_hold(self, ledger: Ledger) -> None:
        await ledger.grant(money(100_000))
        await ledger.hold(request())
        record = (await ledger.settle(settlement(completion=500))).record
        assert (record.list_nanos, record.charged_nanos, record.balance_nanos) == (1_010_000, WORST, 50_000)

    async def test_a_settle_of_nothing_frees_everything_and_leaves_a_record(self, ledger: Ledger, store: Redis) -> None:
        await ledger.grant(money(100_000))
        await ledger.hold(request())
        await ledger.void(RequestId("req_1"), ACME)
        (record,) = await records(store)
        assert (record.usage, record.charged_nanos, record.draws, record.status) == (NOTHING, 0, (), Status.FAILED)
        assert (await ledger.account(ACME)).balance_nanos == 100_000

    async def test_a_free_model_needs_no_credit_and_touches_none(self, ledger: Ledger) -> None:
        await ledger.grant(calls(3))
        hold = await ledger.hold(request(price=FREE))
        assert (hold.draws, hold.max_tokens, hold.covered_by_requests) == ((), 20, False)
        record = (await ledger.settle(replace(settlement(), list_nanos=Nanos(0)))).record
        assert (record.charged_nanos, record.draws) == (0, ())

    async def test_large_amounts_stay_exact(self, ledger: Ledger) -> None:
        for n in range(9):
            await ledger.grant(money(MAX_GRANT_NANOS, f"payment:{n}"))
        with pytest.raises(GrantRefused):
            await ledger.grant(money(MAX_GRANT_NANOS, "payment:9"))
        await ledger.grant(money(7_199_254_740_991 - 1_000, "payment:10"))
        price = Price.model_validate({"per_request": "999999.999999999"})
        hold = await ledger.hold(request(price=price))
        assert sum(d.amount for d in hold.draws) == 999_999_999_999_999
        usage = Usage(prompt_tokens=1)
        record = (
            await ledger.settle(Settlement(RequestId("req_1"), ACME, usage, price.charge(usage), Status.COMPLETE))
        ).record
        assert record.charged_nanos == 999_999_999_999_999
        assert record.balance_nanos == 9 * MAX_GRANT_NANOS + 7_199_254_739_991 - 999_999_999_999_999
        assert (await ledger.account(ACME)).balance_nanos == record.balance_nanos


class TestDrawOrder:
    async def test_allowance_then_packs_by_expiry_then_overage(self, ledger: Ledger, clock: SteppedClock) -> None:
        await ledger.grant(money(5_000, "payment:never"))
        await ledger.grant(money(5_000, "payment:late", clock.now_ms + 2_000))
        await ledger.grant(money(5_000, "payment:soon", clock.now_ms + 1_000))
        funding = Funding(_allowance("allowance:1", 5_000, clock.now_ms + 9_000), Nanos(100_000))
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
        await ledger.grant(money(WORST, expires_at_ms=clock.now_ms + 1))
        clock.now_ms += 1
        with pytest.raises(InsufficientCredits):
            await ledger.hold(request())
        assert (await ledger.account(ACME)).buckets == ()

    async def test_an_allowance_is_filled_once_per_period_and_lapses(self, ledger: Ledger, clock: SteppedClock) -> None:
        november = Funding(_allowance("allowance:free:2026-11", WORST, clock.now_ms + 1_000))
        december = Funding(_allowance("allowance:free:2026-12", WORST, clock.now_ms + 9_000))
        await ledger.hold(request("req_1", funding=november))
        await ledger.settle(settlement("req_1", completion=20))
        with pytest.raises(InsufficientCredits):
            await ledger.hold(request("req_2", funding=november))
        clock.now_ms += 1_000
        await ledger.hold(request("req_3", funding=december))
        await ledger.settle(settlement("req_3", completion=0))
        with pytest.raises(InsufficientCredits):
            await ledger.hold(request("req_4", funding=november))
        assert [b.remaining for b in (await ledger.account(ACME)).buckets] == [WORST - 10_000]

    async def test_an_allowance_that_a_change_of_plan_put_aside_comes_back_as_it_was(
        self, ledger: Ledger, clock: SteppedClock
    ) -> None:
        free = Funding(_allowance("allowance:free", 2 * WORST, clock.now_ms + 1_000))
        pro = Funding(_allowance("allowance:pro", WORST, clock.now_ms + 1_000))
        await ledger.hold(request("req_1", funding=free))
        await ledger.settle(settlement("req_1", completion=20))
        await ledger.hold(request("req_2", funding=pro))
        await ledger.settle(settlement("req_2", completion=20))
        await ledger.hold(request("req_3", funding=free))
        with pytest.raises(CreditOnHold):
            await ledger.hold(request("req_4", funding=free))

    async def test_an_allowance_needs_its_plan(self, ledger: Ledger, clock: SteppedClock) -> None:
        funding = Funding(_allowance("allowance:1", 2 * WORST, clock.now_ms + 1_000))
        await ledger.hold(request("req_1", funding=funding))
        with pytest.raises(InsufficientCredits):
            await ledger.hold(request("req_2", funding=Funding()))
        await ledger.hold(request("req_3", funding=funding))

    async def test_used_up_buckets_leave_the_hot_path_and_stay_known(self, ledger: Ledger, store: Redis) -> None:
        await ledger.grant(money(WORST, "payment:1"))
        await ledger.hold(request("req_1"))
        await ledger.settle(settlement("req_1", completion=20))
        await ledger.grant(money(WORST, "payment:2"))
        await ledger.hold(request("req_2"))
        shard = shard_for(ACME)
        assert await store.hkeys(shard.buckets(ACME)) == ["payment:2"]
        assert await store.hkeys(shard.retired(ACME)) == ["payment:1"]
        assert await ledger.claw_back(Clawback("refund:1", ACME, "payment:1", WORST)) == WORST
        assert (await ledger.account(ACME)).balance_nanos == -WORST
        assert await store.hkeys(shard.retired(ACME)) == []


def _allowance(bucket_id: str, amount: int, ends_at_ms: int) -> Bucket:
    return Bucket(BucketId(bucket_id), Unit.NANOS, amount, amount, ends_at_ms, is_allowance=True)


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


class TestOverage:
    async def test_exposure_ends_at_the_cap_and_falls_when_paid(self, ledger: Ledger) -> None:
        postpaid = Funding(overage_cap=Nanos(WORST))
        hold = await ledger.hold(request("req_1", funding=postpaid))
        assert [(d.bucket, d.amount) for d in hold.draws] == [(OVERAGE, WORST)]
        with pytest.raises(CreditOnHold):
            await ledger.hold(request("req_2", funding=postpaid))
        record = (await ledger.settle(settlement("req_1", completion=20))).record
        assert (record.overage_nanos, record.charged_nanos) == (WORST, WORST)
        with pytest.raises(InsufficientCredits) as refused:
            await ledger.hold(request("req_2", funding=postpaid))
        assert refused.value.limit_source == "overage_cap"
        assert await ledger.repay_overage("payment:9", ACME, WORST)
        assert not await ledger.repay_overage("payment:9", ACME, WORST)
        assert (await ledger.account(ACME)).overage_nanos == 0
        await ledger.hold(request("req_2", funding=postpaid))

    async def test_unused_exposure_goes_back(self, ledger: Ledger) -> None:
        await ledger.hold(request(funding=Funding(overage_cap=Nanos(WORST))))
        assert (await ledger.account(ACME)).held_nanos == WORST
        await ledger.settle(settlement(completion=5))
        account = await ledger.account(ACME)
        assert (account.overage_nanos, account.held_nanos) == (20_000, 0)

    async def test_a_payment_lowers_exposure_to_nothing_and_no_further(self, ledger: Ledger) -> None:
        await ledger.hold(request(funding=Funding(overage_cap=Nanos(WORST))))
        await ledger.settle(settlement(completion=5))
        await ledger.repay_overage("payment:9", ACME, 10**12)
        assert (await ledger.account(ACME)).overage_nanos == 0


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


class TestLeases:
    SHORT_MS = 30

    async def _held(self, ledger: Ledger, **changes: object) -> None:
        await ledger.grant(money(100_000))
        await ledger.hold(request(lease_ms=self.SHORT_MS, **changes))

    def _progress(self, completion: int) -> Progress:
        done = settlement(completion=completion)
        return Progress(done.request_id, done.tenant, done.usage, done.list_nanos)

    async def test_the_last_checkpoint_is_billed_when_the_lease_ends(self, ledger: Ledger, store: Redis) -> None:
        await self._held(ledger)
        assert await ledger.expire() == 0
        assert await ledger.checkpoint([self._progress(5)]) == frozenset()
        await asyncio.sleep(2 * self.SHORT_MS / 1000)
        assert [await ledger.expire(), await ledger.expire()] == [1, 0]
        (record,) = await records(store)
        assert (record.status, record.charged_nanos, record.usage.completion_tokens) == (Status.EXPIRED, 20_000, 5)
        assert (await ledger.account(ACME)).open_holds == 0

    async def test_without_a_checkpoint_nothing_is_billed(self, ledger: Ledger, store: Redis) -> None:
        await self._held(ledger)
        await asyncio.sleep(2 * self.SHORT_MS / 1000)
        await ledger.expire()
        (record,) = await records(store)
        assert (record.charged_nanos, record.usage) == (0, NOTHING)

    async def test_a_checkpoint_renews_the_lease_and_tells_which_are_gone(self, ledger: Ledger) -> None:
        await self._held(ledger)
        for _ in range(4):
            await asyncio.sleep(self.SHORT_MS / 2000)
            assert await ledger.checkpoint([self._progress(1)]) == frozenset()
            assert await ledger.expire() == 0
        await ledger.settle(settlement())
        assert await ledger.checkpoint([self._progress(2)]) == {"req_1"}

    async def test_a_checkpoint_that_arrives_late_takes_nothing_back(self, ledger: Ledger, store: Redis) -> None:
        await self._held(ledger)
        await ledger.checkpoint([self._progress(5)])
        await ledger.checkpoint([self._progress(3)])
        await asyncio.sleep(2 * self.SHORT_MS / 1000)
        await ledger.expire()
        assert (await records(store))[0].usage.completion_tokens == 5

    async def test_a_late_settle_tops_up_what_the_checkpoint_missed(self, ledger: Ledger, store: Redis) -> None:
        await self._held(ledger)
        await ledger.checkpoint([self._progress(5)])
        await asyncio.sleep(2 * self.SHORT_MS / 1000)
        await ledger.expire()
        late = (await ledger.settle(settlement(completion=8))).record
        assert (late.record_id, late.charged_nanos, late.list_nanos) == ("rec_req_1_late", 6_000, 6_000)
        assert late.usage == Usage(completion_tokens=3, requests=0)
        again = await ledger.settle(settlement(completion=8))
        assert (again.is_repeat, again.record) == (True, late)
        assert sum(r.charged_nanos for r in await records(store)) == settlement(completion=8).list_nanos

    async def test_a_late_settle_takes_no_more_than_is_there(self, ledger: Ledger) -> None:
        await self._held(ledger)
        await asyncio.sleep(2 * self.SHORT_MS / 1000)
        await ledger.expire()
        await ledger.hold(request("req_2", max_tokens=42))  # leaves 6,000 of 100,000
        record = (await ledger.settle(settlement(completion=8))).record
        assert (record.charged_nanos, record.list_nanos, record.balance_nanos) == (6_000, 26_000, 0)

    async def test_a_late_settle_leaves_what_pays_a_debt(self, ledger: Ledger, clock: SteppedClock) -> None:
        await ledger.grant(money(WORST))
        await ledger.hold(request("req_0"))
        await ledger.settle(settlement("req_0", completion=20))
        await ledger.claw_back(Clawback("refund:1", ACME, "payment:1", WORST))
        funding = Funding(_allowance("allowance:1", WORST + 30_000, clock.now_ms + 1_000))
        await ledger.hold(request(lease_ms=self.SHORT_MS, funding=funding))
        await asyncio.sleep(2 * self.SHORT_MS / 1000)
        await ledger.expire()
        await ledger.hold(request("req_2", funding=funding, max_tokens=5))
        record = (await ledger.settle(settlement(completion=20))).record
        assert (record.charged_nanos, record.balance_nanos) == (10_000, 0)

    async def test_a_hold_renewed_between_being_found_and_billed_is_left_alone(
        self, ledger: Ledger, store: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await ledger.grant(money(100_000))
        await ledger.hold(request())

        async def overdue(_: int) -> list[object]:
            return [(shard_for(ACME), "req_1", ACME)]

        monkeypatch.setattr(ledger, "_overdue", overdue)
        assert await ledger.expire() == 0
        assert (await ledger.account(ACME)).open_holds == 1

    async def test_a_late_settle_of_a_covered_request_takes_its_call(self, ledger: Ledger) -> None:
        await ledger.grant(calls(1, "payment:2"))
        await self._held(ledger)
        await asyncio.sleep(2 * self.SHORT_MS / 1000)
        await ledger.expire()
        record = (await ledger.settle(settlement())).record
        assert [(d.bucket, d.amount) for d in record.draws] == [("payment:2", 1)]
        assert record.charged_nanos == 0

    async def test_a_late_settle_of_postpaid_use_stays_under_its_cap(self, ledger: Ledger) -> None:
        funding = Funding(overage_cap=Nanos(WORST))
        await ledger.hold(request(lease_ms=self.SHORT_MS, funding=funding))
        await asyncio.sleep(2 * self.SHORT_MS / 1000)
        await ledger.expire()
        await ledger.hold(request("req_2", funding=funding, max_tokens=18))
        record = (await ledger.settle(settlement(completion=20))).record
        assert (record.charged_nanos, record.overage_nanos) == (4_000, 4_000)

    async def test_a_hold_that_ran_over_is_settled_as_usual_until_somebody_expires_it(self, ledger: Ledger) -> None:
        await self._held(ledger)
        await asyncio.sleep(2 * self.SHORT_MS / 1000)
        assert (await ledger.settle(settlement())).record.record_id == "rec_req_1"


async def test_a_preview_answers_like_a_hold_and_changes_nothing(ledger: Ledger, store: Redis) -> None:
    with pytest.raises(InsufficientCredits):
        await ledger.preview(request())
    await ledger.grant(money(48_000))
    before = {key: await store.dump(key) for key in await store.keys()}
    assert (await ledger.preview(request())).max_tokens == 19
    assert {key: await store.dump(key) for key in await store.keys()} == before
    assert (await ledger.hold(request())).max_tokens == 19
