"""What a key may spend in an hour, a day or a month: exact under any race, given back where it was not used."""

import asyncio
import pickle
from datetime import UTC, datetime

import pytest
from redis.asyncio import Redis

from billing.ledger.account import HoldRequest, Progress
from billing.ledger.errors import CreditOnHold, InsufficientCredits, SpendCapReached
from billing.ledger.ledger import Ledger
from billing.money import Nanos
from billing.store.keys import shard_for
from billing.tenants.spend_caps import SpendCap, Window, cap_at, end_ms
from billing.usage import RequestId, Usage
from tests.support.clock import SteppedClock
from tests.support.samples import ACME, FREE, MAX_COST, PER_TOKEN, calls, money, request, settlement

DAY_MS = 24 * 3_600_000
CHARGE = 20_000
"""What a settled request costs."""


def ms(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 1000


def capped(request_id: str, ledger_clock: SteppedClock, nanos: int, *more: SpendCap, **changes: object) -> HoldRequest:
    caps = (cap_at(Window.DAY, Nanos(nanos), ledger_clock.now_ms), *more)
    return request(request_id, caps=caps, **changes)


@pytest.mark.parametrize(
    ("window", "now", "start", "end"),
    [
        (Window.HOUR, "2026-11-26T23:59:59", "2026-11-26T23:00:00", "2026-11-27T00:00:00"),
        (Window.HOUR, "2026-11-26T23:00:00", "2026-11-26T23:00:00", "2026-11-27T00:00:00"),
        (Window.DAY, "2026-11-30T23:59:59", "2026-11-30T00:00:00", "2026-12-01T00:00:00"),
        (Window.DAY, "2026-12-01T00:00:00", "2026-12-01T00:00:00", "2026-12-02T00:00:00"),
        (Window.MONTH, "2026-12-31T23:59:59", "2026-12-01T00:00:00", "2027-01-01T00:00:00"),
        (Window.MONTH, "2028-02-29T12:00:00", "2028-02-01T00:00:00", "2028-03-01T00:00:00"),
    ],
)
def test_cap_windows_are_hours_days_and_months_in_utc(window: Window, now: str, start: str, end: str) -> None:
    assert cap_at(window, Nanos(1), ms(now)).start_ms == ms(start)
    assert end_ms(window, ms(start)) == ms(end)


async def test_what_is_held_counts_and_what_is_not_used_comes_back(ledger: Ledger, clock: SteppedClock) -> None:
    await ledger.grant(money(10 * MAX_COST))
    await ledger.hold(capped("req_1", clock, MAX_COST))
    with pytest.raises(CreditOnHold) as waiting:
        await ledger.hold(capped("req_2", clock, MAX_COST))
    assert (waiting.value.balance_nanos, waiting.value.held_nanos, waiting.value.required_nanos) == (
        0,
        MAX_COST,
        12_000,
    )
    await ledger.settle(settlement("req_1"))
    second = await ledger.hold(capped("req_2", clock, MAX_COST))
    assert second.held_nanos == MAX_COST - CHARGE, "the hold takes what the cap has left"
    assert second.max_tokens == 10, "and no more tokens than that pays for"
    assert second.clamped_by is not None
    assert second.clamped_by.spent_nanos == CHARGE


async def test_a_key_at_its_cap_is_refused_until_the_window_is_over(ledger: Ledger, clock: SteppedClock) -> None:
    await ledger.grant(money(10 * MAX_COST))
    await ledger.hold(capped("req_1", clock, CHARGE))
    await ledger.settle(settlement("req_1"))
    with pytest.raises(SpendCapReached) as refused:
        await ledger.hold(capped("req_2", clock, CHARGE))
    refusal = refused.value
    assert (refusal.window, refusal.cap_nanos, refusal.spent_nanos) == ("day", CHARGE, CHARGE)
    assert 0 < refusal.retry_after_s <= DAY_MS / 1000
    assert refusal.resets_at in str(refusal)
    assert str(pickle.loads(pickle.dumps(refusal))) == str(refusal)
    clock.now_ms += DAY_MS
    await ledger.hold(capped("req_2", clock, CHARGE))


async def test_the_narrower_of_two_caps_decides(ledger: Ledger, clock: SteppedClock) -> None:
    await ledger.grant(money(10 * MAX_COST))
    month = cap_at(Window.MONTH, Nanos(CHARGE), clock.now_ms)
    await ledger.hold(capped("req_1", clock, 10 * MAX_COST, month))
    await ledger.settle(settlement("req_1"))
    with pytest.raises(SpendCapReached, match="a month"):
        await ledger.hold(capped("req_2", clock, 10 * MAX_COST, month))


async def test_a_race_never_takes_more_than_the_cap(ledger: Ledger, clock: SteppedClock) -> None:
    await ledger.grant(money(1_000 * MAX_COST))
    cap, spent = 3 * MAX_COST + 7, 0
    for turn in range(8):
        asked = [capped(f"req_{turn}_{n}", clock, cap) for n in range(20)]
        answers = await asyncio.gather(*(ledger.hold(one) for one in asked), return_exceptions=True)
        held = [a for a in answers if not isinstance(a, BaseException)]
        assert spent + sum(hold.held_nanos for hold in held) <= cap
        for hold in held:
            most = min(5, hold.max_tokens)
            receipt = await ledger.settle(settlement(hold.request.request_id, completion=most))
            spent += receipt.record.charged_nanos
    assert cap - 12_000 < spent <= cap
    with pytest.raises(SpendCapReached):
        await ledger.hold(capped("req_last", clock, cap))


async def test_a_hold_grows_no_further_than_the_cap(ledger: Ledger, clock: SteppedClock) -> None:
    await ledger.grant(money(10 * MAX_COST))
    asked = capped("req_1", clock, 30_000, step_tokens=1)
    hold = await ledger.hold(asked)
    assert (hold.held_nanos, hold.max_tokens) == (12_000, 10)
    assert await ledger.extend(asked, Nanos(MAX_COST), Nanos(20_000)) == 30_000
    assert await ledger.extend(asked, Nanos(MAX_COST), Nanos(30_000)) == 30_000, "again changes nothing"
    with pytest.raises(SpendCapReached):
        await ledger.extend(asked, Nanos(MAX_COST), Nanos(30_001))
    with pytest.raises(CreditOnHold):
        await ledger.hold(capped("req_2", clock, 30_000))


async def test_an_ended_lease_gives_back_and_its_late_settle_counts(
    ledger: Ledger, store: Redis, clock: SteppedClock
) -> None:
    await ledger.grant(money(10 * MAX_COST))
    await ledger.hold(capped("req_1", clock, MAX_COST))
    await ledger.checkpoint([Progress(RequestId("req_1"), ACME, Usage(10), PER_TOKEN.charge(Usage(10)))])
    await store.zadd(shard_for(ACME).leases, {"req_1": 1})
    assert await ledger.expire() == 1
    assert (await ledger.hold(capped("req_2", clock, MAX_COST, max_tokens=15))).held_nanos == MAX_COST - 10_000
    await ledger.settle(settlement("req_1"))
    await ledger.void(RequestId("req_2"), ACME)
    assert (await ledger.hold(capped("req_3", clock, MAX_COST))).held_nanos == MAX_COST - CHARGE


async def test_a_hold_of_yesterday_ends_in_yesterday_s_window(ledger: Ledger, clock: SteppedClock) -> None:
    await ledger.grant(money(10 * MAX_COST))
    old = capped("req_1", clock, MAX_COST, step_tokens=1)
    await ledger.hold(old)
    clock.now_ms += DAY_MS
    await ledger.hold(capped("req_2", clock, MAX_COST))
    assert await ledger.extend(old, Nanos(MAX_COST), Nanos(MAX_COST)) == MAX_COST, "it is alone in its day"
    await ledger.settle(settlement("req_1"))
    await ledger.settle(settlement("req_2"))
    assert (await ledger.hold(capped("req_3", clock, MAX_COST))).held_nanos == MAX_COST - CHARGE


async def test_a_late_clock_counts_in_the_window_that_others_are_in(ledger: Ledger, clock: SteppedClock) -> None:
    await ledger.grant(money(10 * MAX_COST))
    late = capped("req_2", clock, CHARGE)
    clock.now_ms += DAY_MS
    await ledger.hold(capped("req_1", clock, CHARGE))
    await ledger.settle(settlement("req_1"))
    with pytest.raises(SpendCapReached):
        await ledger.hold(late)


async def test_keys_do_not_share_a_cap_but_a_rotated_key_goes_on_as_the_old(
    ledger: Ledger, clock: SteppedClock
) -> None:
    await ledger.grant(money(10 * MAX_COST))
    await ledger.hold(capped("req_1", clock, CHARGE))
    await ledger.settle(settlement("req_1"))
    await ledger.hold(capped("req_2", clock, CHARGE, key_id="key_2"))
    with pytest.raises(SpendCapReached):
        await ledger.hold(capped("req_3", clock, CHARGE, key_id="key_3", counts_as="key_1"))


async def test_what_costs_no_money_is_under_no_cap(ledger: Ledger, clock: SteppedClock) -> None:
    await ledger.hold(capped("req_1", clock, 0, price=FREE))
    await ledger.grant(calls(1))
    assert (await ledger.hold(capped("req_2", clock, 0))).covered_by_requests


async def test_short_credit_is_refused_before_the_cap(ledger: Ledger, clock: SteppedClock) -> None:
    with pytest.raises(InsufficientCredits):
        await ledger.hold(capped("req_1", clock, 0))


async def test_a_key_without_caps_leaves_nothing_behind(ledger: Ledger, store: Redis) -> None:
    await ledger.grant(money(MAX_COST))
    await ledger.hold(request())
    await ledger.settle(settlement())
    assert not [name for name in await store.hkeys(shard_for(ACME).account(ACME)) if name.startswith("cap:")]
