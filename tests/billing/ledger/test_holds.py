"""Laws of the ledger: what may be held, what is charged, and that a repeat changes nothing."""

import asyncio
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from billing.ledger.account import Settlement
from billing.ledger.errors import CreditOnHold, DuplicateRequest, GrantRefused, InsufficientCredits, UnknownHold
from billing.ledger.ledger import Ledger
from billing.money import MAX_GRANT_NANOS, Nanos
from billing.pricing.prices import Price
from billing.store.keys import shard_for
from billing.usage import NOTHING, RequestId, Status, TenantId, Usage
from tests.support.clock import SteppedClock
from tests.support.samples import ACME, FREE, MAX_COST, PER_TOKEN, calls, money, records, request, settlement


async def test_hold_takes_max_cost_and_settle_returns_the_rest(ledger: Ledger) -> None:
    await ledger.grant(money(100_000))
    hold = await ledger.hold(request())
    assert (hold.balance_nanos, hold.max_tokens) == (50_000, 20)
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
    assert entry == {"k": "usage", "t": ACME, "p": entry["p"], "c": entry["c"]}


@pytest.mark.parametrize(
    ("credit", "tokens"),
    [(MAX_COST, 20), (MAX_COST - 1, 19), (48_000, 19), (47_999, 18), (12_000, 1)],
)
async def test_a_hold_is_cut_to_what_the_credit_affords(ledger: Ledger, credit: int, tokens: int) -> None:
    await ledger.grant(money(credit))
    hold = await ledger.hold(request())
    assert hold.max_tokens == tokens
    assert PER_TOKEN.at_most(10, hold.max_tokens) <= sum(d.amount for d in hold.draws) <= credit


async def test_a_nano_less_than_the_shortest_answer_is_refused(ledger: Ledger) -> None:
    await ledger.grant(money(11_999))
    with pytest.raises(InsufficientCredits) as refused:
        await ledger.hold(request())
    assert (refused.value.balance_nanos, refused.value.required_nanos) == (11_999, MAX_COST)
    assert (refused.value.max_affordable_tokens, refused.value.limit_source) == (0, "balance")


async def test_credit_that_others_hold_is_worth_a_retry(ledger: Ledger) -> None:
    await ledger.grant(money(MAX_COST))
    await ledger.hold(request())
    with pytest.raises(CreditOnHold) as refused:
        await ledger.hold(request("req_2"))
    assert (refused.value.balance_nanos, refused.value.held_nanos, refused.value.required_nanos) == (
        0,
        MAX_COST,
        12_000,
    )
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
        assert (await ledger.account(ACME)).held_nanos == MAX_COST

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

    async def test_settled_id_is_known_for_two_windows_and_then_refused(
        self, store: Redis, clock: SteppedClock
    ) -> None:
        window_ms = 400
        ledger = Ledger(store, clock, window_ms)
        await ledger.grant(money(100_000))
        await _start_of_a_window(store, window_ms)
        await ledger.hold(request())
        await ledger.settle(settlement())
        await _start_of_a_window(store, window_ms)
        assert (await ledger.settle(settlement())).is_repeat
        await asyncio.sleep(window_ms / 1000)
        assert (await ledger.settle(settlement())).is_repeat
        await asyncio.sleep(1.1 * window_ms / 1000)
        with pytest.raises(UnknownHold):
            await ledger.settle(settlement())
        await asyncio.sleep(window_ms / 1000)
        assert not await store.exists(*shard_for(ACME).settled)


async def _start_of_a_window(store: Redis, window_ms: int) -> None:
    seconds, microseconds = await store.time()
    await asyncio.sleep((window_ms - (seconds * 1000 + microseconds // 1000) % window_ms + 5) / 1000)


class TestCharges:
    async def test_never_above_the_hold(self, ledger: Ledger) -> None:
        await ledger.grant(money(100_000))
        await ledger.hold(request())
        record = (await ledger.settle(settlement(completion=500))).record
        assert (record.list_nanos, record.charged_nanos, record.balance_nanos) == (1_010_000, MAX_COST, 50_000)

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


async def test_a_preview_answers_like_a_hold_and_changes_nothing(ledger: Ledger, store: Redis) -> None:
    with pytest.raises(InsufficientCredits):
        await ledger.preview(request())
    await ledger.grant(money(48_000))
    before = {key: await store.dump(key) for key in await store.keys()}
    assert (await ledger.preview(request())).max_tokens == 19
    assert {key: await store.dump(key) for key in await store.keys()} == before
    assert (await ledger.hold(request())).max_tokens == 19
