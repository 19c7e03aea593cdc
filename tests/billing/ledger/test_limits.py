"""Limits of a key: exact across processes, and never kept by what is dead."""

import asyncio
from dataclasses import replace

import pytest
from pydantic import ValidationError
from redis.asyncio import Redis

from billing.catalog.plans import Limits
from billing.ledger.account import HoldRequest
from billing.ledger.errors import InsufficientCredits, RateLimited
from billing.ledger.ledger import Ledger
from billing.store.keys import shard_for
from tests.support.samples import ACME, FREE, money, request, settlement


def limited(request_id: str, limits: Limits, **changes: object) -> HoldRequest:
    return request(request_id, limits=limits, price=FREE, **changes)


@pytest.mark.parametrize(
    ("per_minute", "burst", "at_once"),
    [
        (None, None, 0),
        (1, None, 1),
        (9, None, 9),
        (60, None, 10),
        (101, None, 10),
        (600, None, 60),
        (60, 6, 6),
        (60, 60, 60),
    ],
)
def test_a_tenth_of_a_minute_but_ten_may_come_at_once_unless_burst_says_otherwise(
    per_minute: int | None, burst: int | None, at_once: int
) -> None:
    assert Limits(requests_per_minute=per_minute, burst=burst).requests_at_once == at_once


@pytest.mark.parametrize(
    "given", [{"burst": 1}, {"requests_per_minute": 5, "burst": 6}, {"requests_per_minute": 5, "burst": 0}]
)
def test_a_burst_is_of_a_limit_and_not_above_it(given: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match="burst"):
        Limits.model_validate(given)


SIX_AT_ONCE = Limits(requests_per_minute=60, burst=6)
SLACK_S = 0.4
"""That a busy machine may take between two commands."""


async def use(store: Redis, ahead_s: float) -> None:
    """As if what was used until now were worn off after so long."""
    seconds, microseconds = await store.time()
    due = seconds * 1000 + microseconds // 1000 + int(ahead_s * 1000)
    await store.hset(shard_for(ACME).limits(ACME), "r:key_1", str(due))


@pytest.mark.parametrize(("ahead_s", "rest", "reset_s"), [(-90, 5, 1), (0, 5, 1), (1, 4, 2), (4, 1, 5), (4.9, 0, 5.9)])
async def test_what_is_left_after_each_of_six_requests_at_once(
    ledger: Ledger, store: Redis, ahead_s: float, rest: int, reset_s: float
) -> None:
    await use(store, ahead_s)
    left = (await ledger.hold(limited("req_1", SIX_AT_ONCE))).limits_left
    assert left.requests == rest
    assert reset_s - SLACK_S <= left.requests_reset_s <= reset_s


@pytest.mark.parametrize(("ahead_s", "wait_s"), [(5.5, 0.5), (6, 1), (60, 55)])
async def test_seventh_request_learns_when_to_retry(
    ledger: Ledger, store: Redis, ahead_s: float, wait_s: float
) -> None:
    await use(store, ahead_s)
    with pytest.raises(RateLimited) as refused:
        await ledger.hold(limited("req_1", SIX_AT_ONCE))
    assert (refused.value.limit, refused.value.at_once) == (60, 6)
    assert wait_s - SLACK_S <= refused.value.retry_after_s <= wait_s
    assert ahead_s - SLACK_S <= refused.value.reset_s <= ahead_s


async def test_a_burst_may_come_at_once_and_the_next_waits(ledger: Ledger) -> None:
    limits = Limits(requests_per_minute=600)
    holds = [await ledger.hold(limited(f"req_{n}", limits)) for n in range(600 // 100)]
    assert [h.limits_left.requests for h in holds][:2] == [59, 58]
    assert holds[0].limits_left.requests_reset_s == pytest.approx(0.1, abs=0.01)
    few = Limits(requests_per_minute=2)
    for n in range(2):
        await ledger.hold(limited(f"few_{n}", few, key_id="key_2"))
    with pytest.raises(RateLimited) as refused:
        await ledger.hold(limited("few_2", few, key_id="key_2"))
    assert (refused.value.kind, refused.value.limit) == ("requests", 2)
    assert 29 < refused.value.retry_after_s <= 30


async def test_a_place_is_free_again_when_its_time_has_come(ledger: Ledger) -> None:
    limits = Limits(requests_per_minute=240, burst=240)  # one each 250 ms
    answers = await asyncio.gather(
        *(ledger.hold(limited(f"req_{n}", limits)) for n in range(300)), return_exceptions=True
    )
    refused = [a for a in answers if isinstance(a, RateLimited)]
    assert 30 <= len(refused) <= 60
    await asyncio.sleep(refused[-1].retry_after_s + 0.05)
    await ledger.hold(limited("req_again", limits))


async def test_keys_do_not_share_a_limit(ledger: Ledger) -> None:
    limits = Limits(requests_per_minute=1)
    await ledger.hold(limited("req_1", limits, key_id="key_1"))
    await ledger.hold(limited("req_2", limits, key_id="key_2"))


async def test_tokens_are_reserved_and_what_was_not_used_comes_back(ledger: Ledger) -> None:
    limits = Limits(tokens_per_minute=60)
    first = await ledger.hold(limited("req_1", limits))
    assert first.limits_left.tokens == 30
    await ledger.hold(limited("req_2", limits))
    with pytest.raises(RateLimited) as refused:
        await ledger.hold(limited("req_3", limits))
    assert (refused.value.kind, refused.value.limit) == ("tokens", 60)
    for n in (1, 2):
        await ledger.settle(settlement(f"req_{n}", completion=5))
    left = (await ledger.hold(limited("req_3", limits))).limits_left.tokens
    assert left is not None
    assert left < 10, "only what time itself gave back"


async def test_one_request_larger_than_the_limit_passes_when_nothing_else_was_used(ledger: Ledger) -> None:
    limits = Limits(tokens_per_minute=10)
    await ledger.hold(limited("req_1", limits))
    with pytest.raises(RateLimited):
        await ledger.hold(limited("req_2", limits))


async def test_a_refusal_for_want_of_credit_uses_no_place(ledger: Ledger) -> None:
    limits = Limits(requests_per_minute=1, concurrent_requests=1)
    for n in range(3):
        with pytest.raises(InsufficientCredits):
            await ledger.hold(request(f"req_{n}", limits=limits))
    await ledger.grant(money(100_000))
    await ledger.hold(request("req_9", limits=limits))


async def test_no_more_run_at_once_than_may(ledger: Ledger) -> None:
    limits = Limits(concurrent_requests=2)
    answers = await asyncio.gather(
        *(ledger.hold(limited(f"req_{n}", limits)) for n in range(20)), return_exceptions=True
    )
    refused = [a for a in answers if isinstance(a, RateLimited)]
    assert (len(refused), refused[0].kind) == (18, "concurrency")
    running = next(a for a in answers if not isinstance(a, BaseException))
    await ledger.settle(replace(settlement(), request_id=running.request.request_id))
    await ledger.hold(limited("req_again", limits))
    with pytest.raises(RateLimited):
        await ledger.hold(limited("req_more", limits))


async def test_a_dead_gateway_s_requests_stop_counting_with_their_leases(ledger: Ledger, store: Redis) -> None:
    limits = Limits(concurrent_requests=2)
    for n in range(2):
        await ledger.hold(limited(f"req_{n}", limits, lease_ms=30))
    await asyncio.sleep(0.06)
    await ledger.hold(limited("req_2", limits))
    assert await store.smembers(shard_for(ACME).slots(ACME, "key_1")) == {"req_2"}


async def test_a_repeat_counts_once(ledger: Ledger) -> None:
    limits = Limits(requests_per_minute=1, tokens_per_minute=30, concurrent_requests=1)
    for _ in range(3):
        await ledger.hold(limited("req_1", limits))


async def test_what_a_large_request_owes_is_not_forgotten_before_it_is_due(ledger: Ledger, store: Redis) -> None:
    """30 tokens where 3 a minute may pass: ten minutes' worth, whatever other keys do."""
    await ledger.hold(limited("req_1", Limits(tokens_per_minute=3)))
    await ledger.hold(limited("req_2", Limits(requests_per_minute=5), key_id="key_2"))
    assert 590_000 < await store.pttl(shard_for(ACME).limits(ACME)) <= 720_000


async def test_limits_forget_a_key_that_is_not_used(ledger: Ledger, store: Redis) -> None:
    await ledger.hold(limited("req_1", Limits(requests_per_minute=5)))
    assert 0 < await store.pttl(shard_for(ACME).limits(ACME)) <= 180_000
