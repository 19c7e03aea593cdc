"""A sweep goes on past an item that fails, leaves that item out for a while, and gives up where all fail."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from billing import sweep as sweeps
from billing.sweep import FAILURES_IN_A_ROW, FIRST_RETRY_MS, MAX_RETRY_MS, STUCK_FAILURES, EndOfRun, Sweep
from tests.support.clock import SteppedClock


@pytest.fixture
def clock() -> SteppedClock:
    return SteppedClock(0)


@pytest.fixture
def sweep(clock: SteppedClock) -> Sweep:
    return Sweep("refills", clock)


def failing(*bad: str, tried: list[str] | None = None) -> Callable[[str], Awaitable[str]]:
    """An action that fails for these items, and notes every item that it is called with."""

    async def act(item: str) -> str:
        if tried is not None:
            tried.append(item)
        if item in bad:
            raise ValueError(f"{item} is broken")
        return item.upper()

    return act


async def test_failing_item_stops_no_other(sweep: Sweep, caplog: pytest.LogCaptureFixture) -> None:
    assert await sweep.run("abc", failing("b")) == ["A", "C"]
    (found,) = sweep.failing
    assert (found.id, found.failures, found.error) == ("b", 1, "ValueError: b is broken")
    assert "refills: b failed 1 times in a row, next try in 5 s: ValueError: b is broken" in caplog.text


async def test_failing_item_is_left_out_for_a_pause_that_doubles(sweep: Sweep, clock: SteppedClock) -> None:
    tried: list[str] = []
    act = failing("a", tried=tried)
    for pause_ms in (FIRST_RETRY_MS, 2 * FIRST_RETRY_MS, 4 * FIRST_RETRY_MS):
        await sweep.run("a", act)
        clock.move(pause_ms - 1)
        await sweep.run("a", act)
        clock.move(1)
    assert len(tried) == 3
    for _ in range(30):
        clock.now_ms = sweep.failing[0].retry_at_ms
        await sweep.run("a", act)
    assert sweep.failing[0].retry_at_ms == clock() + MAX_RETRY_MS


async def test_forced_run_tries_failing_item_at_once(sweep: Sweep) -> None:
    await sweep.run("a", failing("a"))
    assert await sweep.run("a", failing(), is_forced=True) == ["A"]


async def test_success_ends_failures(sweep: Sweep, clock: SteppedClock) -> None:
    await sweep.run("a", failing("a"))
    clock.move(FIRST_RETRY_MS)
    await sweep.run("a", failing())
    assert sweep.failing == ()


async def test_item_is_stuck_after_several_failures(sweep: Sweep, clock: SteppedClock) -> None:
    for number in range(STUCK_FAILURES):
        assert not any(one.is_stuck for one in sweep.failing), number
        await sweep.run("a", failing("a"))
        clock.move(MAX_RETRY_MS)
    assert sweep.failing[0].is_stuck


async def test_failures_in_a_row_end_the_run(sweep: Sweep) -> None:
    items = [f"item-{number:02d}" for number in range(20)]
    tried: list[str] = []
    with pytest.raises(ValueError, match="item-04 is broken"):
        await sweep.run(items, failing(*items, tried=tried))
    assert tried == items[:FAILURES_IN_A_ROW]
    assert await sweep.run(items, failing()) == [item.upper() for item in items[FAILURES_IN_A_ROW:]]


async def test_success_between_failures_keeps_the_run_going(sweep: Sweep) -> None:
    items = [f"{number}{kind}" for number in range(10) for kind in ("-bad", "-good")]
    assert len(await sweep.run(items, failing(*items[::2]))) == 10


async def test_run_without_limit_of_failures_tries_every_item(clock: SteppedClock) -> None:
    sweep = Sweep("shards", clock, ends_after=None)
    assert await sweep.run("abcdefgh", failing(*"abcdefg")) == ["H"]


async def test_error_that_ends_the_run_counts_for_no_item(clock: SteppedClock) -> None:
    sweep = Sweep("shards", clock, ends_on=(ValueError,))
    with pytest.raises(ValueError, match="b is broken"):
        await sweep.run("abc", failing("b"))
    assert sweep.failing == ()


async def test_run_after_end_of_run_begins_at_that_item(sweep: Sweep) -> None:
    calls: list[str] = []

    async def act(item: str) -> str:
        if len(calls) == 2:
            raise EndOfRun
        calls.append(item)
        return item

    assert await sweep.run("abcd", act) == ["a", "b"]
    assert sweep.failing == ()
    calls.clear()
    assert await sweep.run("abcd", act) == ["c", "d"]


async def test_run_after_a_cut_off_begins_behind_that_item(sweep: Sweep) -> None:
    async def hang(item: str) -> str:
        if item == "b":
            await asyncio.sleep(60)
        return item

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await sweep.run("abc", hang)
    assert await sweep.run("abc", failing()) == ["C", "A", "B"]


async def test_item_is_reached_although_those_before_it_fail_and_change(sweep: Sweep) -> None:
    tried: list[str] = []
    for number in range(3):
        new = [f"{number}-{place}" for place in range(FAILURES_IN_A_ROW)]
        with pytest.raises(ValueError, match="is broken"):
            await sweep.run([*new, "old"], failing(*new, tried=tried))
    assert "old" in tried


async def test_run_after_end_of_run_begins_behind_items_that_are_gone(sweep: Sweep) -> None:
    async def act(item: str) -> str:
        if item == "c":
            raise EndOfRun
        return item

    assert await sweep.run("abcde", act) == ["a", "b"]
    assert await sweep.run("xyde", failing()) == ["D", "E", "X", "Y"]


async def test_item_that_hangs_fails_alone(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "ITEM_LIMIT_S", 0.02)

    async def hang(item: str) -> str:
        if item == "a":
            await asyncio.sleep(60)
        return item

    assert await sweep.run("ab", hang) == ["b"]
    assert sweep.failing[0].error_type is TimeoutError


async def test_item_that_is_gone_is_forgotten(sweep: Sweep, clock: SteppedClock) -> None:
    await sweep.run("ab", failing("a"))
    clock.move(FIRST_RETRY_MS + MAX_RETRY_MS)
    await sweep.run("b", failing())
    assert sweep.failing == ()


async def test_remembered_failures_are_bounded(clock: SteppedClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "MAX_REMEMBERED", 3)
    sweep = Sweep("refills", clock, ends_after=None)
    await sweep.run("abcde", failing(*"abcde"))
    assert [one.id for one in sweep.failing] == ["c", "d", "e"]
