"""One minute's calls to Dodo are shared by all processes: who can wait waits, who cannot is counted."""

import asyncio

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from billing.dodo.call_budget import CallBudget, SharedBudget
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.store.keys import CALL_BUDGET
from cluster.dodo_sandbox.server import SandboxServer
from tests.support.clock import SteppedClock
from tests.support.world import API_KEY, MINUTE, World


async def test_burst_is_a_sixth_of_a_minutes_calls_of_all_processes(redis: Redis) -> None:
    ours, theirs = SharedBudget(redis, 240), SharedBudget(redis)
    taken = await asyncio.gather(*(budget.take() for budget in (ours, theirs) for _ in range(40)))
    assert 40 <= sum(taken) <= 42, "what comes in meanwhile is taken too"


async def test_calls_come_back_with_the_stores_time(redis: Redis) -> None:
    budget = SharedBudget(redis, 60)
    while await budget.take():
        pass
    await redis.hincrby(CALL_BUDGET, "seen", -6 * 1_000)
    assert sum([await budget.take() for _ in range(20)]) == 5, "fifty a minute beside the burst of ten"
    await redis.hincrby(CALL_BUDGET, "seen", -60 * MINUTE)
    assert sum([await budget.take() for _ in range(20)]) == 10


async def test_counted_call_is_never_refused_and_paid_back_later(redis: Redis) -> None:
    budget = SharedBudget(redis, 12)
    for _ in range(5):
        await budget.spend()
    assert not await budget.take()
    await redis.hincrby(CALL_BUDGET, "seen", -18 * 1_000)
    assert not await budget.take(), "three calls are owed, and ten a minute pay them back"
    await redis.hincrby(CALL_BUDGET, "seen", -7 * 1_000)
    assert await budget.take()


async def test_limit_is_the_one_set_last(redis: Redis) -> None:
    assert await SharedBudget(redis, 6).take()
    assert not await SharedBudget(redis).take()


async def test_share_is_bounded_by_both(redis: Redis) -> None:
    both = CallBudget(6, within=SharedBudget(redis, 240))
    assert [await both.take(), await both.take()] == [True, False]
    other = CallBudget(240, within=SharedBudget(redis, 6))
    assert not all([await other.take() for _ in range(45)])


@settings(max_examples=30)
@given(
    per_minute=st.sampled_from([1, 5, 6, 7, 11, 30, 60]),
    pauses=st.lists(st.one_of(st.just(0), st.integers(0, 30), st.integers(0, 200)), min_size=30, max_size=60),
)
def test_store_and_process_count_by_one_rule(store_url: str, per_minute: int, pauses: list[int]) -> None:
    """``pauses``: before each call, in tenths of the time in which one call comes back."""
    asyncio.run(_compare(store_url, per_minute, [pause * MINUTE // (10 * per_minute) for pause in pauses]))


async def _compare(store_url: str, per_minute: int, pauses_ms: list[int]) -> None:
    """Let both budgets see the same moments: a pause makes the store's last moment an earlier one.

    A call that the store refuses writes nothing, so of its moment only a lower bound is known: that suffices, since the
    process then has at most as many calls.
    """
    async with Redis.from_url(store_url, decode_responses=True) as redis:
        await redis.delete(CALL_BUDGET)
        clock = SteppedClock(await _store_ms(redis))
        shared, own, passed_ms = SharedBudget(redis, per_minute), CallBudget(per_minute, clock), 0
        for pause_ms in pauses_ms:
            if await redis.exists(CALL_BUDGET):
                await redis.hincrby(CALL_BUDGET, "seen", -pause_ms)
                passed_ms += pause_ms
            before_ms = await _store_ms(redis)
            is_taken = await shared.take()
            seen = await redis.hget(CALL_BUDGET, "seen")
            clock.now_ms = passed_ms + (int(seen or 0) if is_taken else before_ms)
            assert await own.take() == is_taken


async def _store_ms(redis: Redis) -> int:
    seconds, microseconds = await redis.time()
    return int(seconds) * 1_000 + int(microseconds) // 1_000


async def test_call_without_budget_is_counted(world: World, sandbox: SandboxServer) -> None:
    budget = SharedBudget(world.redis, 6)
    dodo = Dodo(DodoSettings(API_KEY, base_url=sandbox.url), on_call=budget.spend)
    await dodo.meters()
    assert not await budget.take()
    await dodo.meters()
    await dodo.close()
    assert int(await world.redis.hget(CALL_BUDGET, "level")) < 0


async def test_given_http_client_is_used_as_it_is(sandbox: SandboxServer) -> None:
    async with httpx.AsyncClient() as client:
        assert await Dodo(DodoSettings(API_KEY, base_url=sandbox.url), client).meters() == []


@pytest.mark.parametrize("per_minute", [1, 5, 6, 7, 60, 240, 1000])
async def test_no_minute_has_more_calls_than_its_budget(per_minute: int) -> None:
    clock = SteppedClock()
    budget = CallBudget(per_minute, clock)
    taken: list[int] = []
    for _ in range(3_000):
        while await budget.take():
            taken.append(clock())
        clock.move(100)
    busiest = max(sum(start <= at < start + MINUTE for at in taken) for start in taken[:: max(1, len(taken) // 200)])
    assert 0 < busiest <= max(per_minute, 2)
    assert len(taken) >= 4 * max(1, per_minute - per_minute // 6) - 4, "five minutes' calls may nearly all be used"


async def test_reserved_share_is_left_while_page_calls_overdraw_the_budget(redis: Redis) -> None:
    pages, export = SharedBudget(redis, 240), SharedBudget(redis, 240, reserved_share=8)
    for _ in range(100):
        await pages.spend()
    assert [await export.take() for _ in range(6)] == [True] * 5 + [False], "a sixth of thirty at once"
    assert not await pages.take()
    await redis.hincrby(CALL_BUDGET, "reserved_seen", -2 * 1_000)
    assert [await export.take(), await export.take()] == [True, False], "thirty a minute"


async def test_reserved_share_adds_nothing_to_a_budget_that_nobody_overdraws(redis: Redis) -> None:
    export = SharedBudget(redis, 240, reserved_share=8)
    assert 40 <= sum([await export.take() for _ in range(60)]) <= 42
