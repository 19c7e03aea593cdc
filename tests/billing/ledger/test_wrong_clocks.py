"""A gateway whose clock is wrong moves no key's cap and no month's volume, then or later."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from billing.clock import TOLERANCE_MS, now_ms
from billing.ledger.account import HoldRequest
from billing.ledger.errors import SpendCapReached
from billing.ledger.ledger import Ledger
from billing.money import Nanos
from billing.store.errors import ClockSkewError
from billing.store.keys import shard_for
from billing.tenants.spend_caps import Window, cap_at
from billing.usage import RequestId
from tests.support.clock import SteppedClock
from tests.support.samples import ACME, MAX_COST, money, request, settlement

CHARGE = 20_000
DAY_MS = 24 * 3_600_000
DECADE_MS = 3_650 * DAY_MS
SLACK_MS = 10_000
"""That a busy machine may take between a clock's reading and the store's."""


def asked(request_id: str, at_ms: int, cap: int = 2 * CHARGE) -> HoldRequest:
    """Under a cap by day, in a month of thirty days that a volume price counts."""
    caps = (cap_at(Window.DAY, Nanos(cap), at_ms),)
    return request(request_id, caps=caps, month_start_ms=month(at_ms), max_tokens=5)


def month(at_ms: int) -> int:
    return at_ms - at_ms % (30 * DAY_MS)


async def everything(store: Redis) -> dict[str, Any]:
    names = [name for name in sorted(await store.keys()) if await store.type(name) == "hash"]
    return {name: await store.hgetall(name) for name in names}


async def counted_today(store: Redis) -> int:
    return int(str(await store.hget(shard_for(ACME).account(ACME), "cap:key_1:day")).split("|")[1])


@pytest.fixture
def clock() -> SteppedClock:
    return SteppedClock(now_ms())


@pytest.mark.parametrize("ahead_ms", [-DECADE_MS, -TOLERANCE_MS - SLACK_MS, TOLERANCE_MS + SLACK_MS, DECADE_MS])
async def test_a_clock_that_is_far_from_the_store_s_is_refused_and_writes_nothing(
    store: Redis, clock: SteppedClock, ahead_ms: int
) -> None:
    ledger = Ledger(store, clock, clocks_may_differ_ms=TOLERANCE_MS)
    await ledger.grant(money(10 * MAX_COST))
    clock.now_ms += ahead_ms
    before = await everything(store)
    for ask in (ledger.hold, ledger.preview):
        with pytest.raises(ClockSkewError, match="ahead of" if ahead_ms > 0 else "behind") as refused:
            await ask(asked("req_1", clock.now_ms))
        assert abs(refused.value.ahead_ms - ahead_ms) < SLACK_MS
        assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)
    assert await everything(store) == before


@pytest.mark.parametrize("ahead_ms", [-TOLERANCE_MS + SLACK_MS, 0, TOLERANCE_MS - SLACK_MS])
async def test_a_clock_that_is_nearly_right_is_taken(store: Redis, clock: SteppedClock, ahead_ms: int) -> None:
    ledger = Ledger(store, clock, clocks_may_differ_ms=TOLERANCE_MS)
    await ledger.grant(money(10 * MAX_COST))
    clock.now_ms += ahead_ms
    await ledger.hold(asked("req_1", clock.now_ms))


Ends = Callable[[Ledger, str], Any]


async def settled(ledger: Ledger, request_id: str) -> None:
    await ledger.settle(settlement(request_id))


async def freed(ledger: Ledger, request_id: str) -> None:
    await ledger.void(RequestId(request_id), ACME)


@pytest.mark.parametrize("end", [settled, freed])
@pytest.mark.parametrize("is_late", [False, True])
async def test_what_a_clock_that_is_put_back_has_left_ahead_gives_way(
    store: Redis, ledger: Ledger, clock: SteppedClock, end: Ends, is_late: bool
) -> None:
    """Both clocks were wrong, or were not compared; a hold from then may end after today's have begun."""
    await ledger.grant(money(10 * MAX_COST))
    today = clock.now_ms
    clock.now_ms += DECADE_MS
    await ledger.hold(asked("req_ahead", clock.now_ms))
    if not is_late:
        await end(ledger, "req_ahead")
    clock.now_ms = today
    for number in range(2):
        await ledger.hold(asked(f"req_{number}", today))
        await ledger.settle(settlement(f"req_{number}"))
        if is_late and number == 0:
            await end(ledger, "req_ahead")
    assert await counted_today(store) == 2 * CHARGE
    assert await ledger.spent(ACME, month(today)) == 2 * CHARGE
    with pytest.raises(SpendCapReached):
        await ledger.hold(asked("req_2", today))
    clock.now_ms += DAY_MS
    await ledger.hold(asked("req_3", clock.now_ms))


async def test_a_refusal_and_a_quote_put_nothing_back(store: Redis, ledger: Ledger, clock: SteppedClock) -> None:
    await ledger.grant(money(10 * MAX_COST))
    today = clock.now_ms
    clock.now_ms += DECADE_MS
    await ledger.hold(asked("req_ahead", clock.now_ms))
    clock.now_ms = today
    before = await everything(store)
    await ledger.preview(asked("req_1", today))
    with pytest.raises(SpendCapReached):
        await ledger.hold(asked("req_1", today, cap=CHARGE - 10_000))
    assert await everything(store) == before
