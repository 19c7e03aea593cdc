"""Rules that stand in Lua and in Python, held together on random values."""

import asyncio
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from billing.clock import TOLERANCE_MS
from billing.dodo.call_budget import BURST_SHARE, CallBudget
from billing.ledger.account import Bucket
from billing.ledger.codec import letter_of, pack_bucket, pack_usage, unpack_bucket
from billing.ledger.journal import CHAIN_DIGITS, Entry
from billing.money import MAX_BALANCE_NANOS
from billing.store.keys import SETTLED_WINDOWS
from billing.store.scripts import path, source
from billing.usage import OVERAGE, BucketId, TenantId, Unit, Usage
from cluster import valkey
from tests.support.clock import SteppedClock

AMOUNTS = st.integers(0, MAX_BALANCE_NANOS)
WORDS = st.text(
    st.characters(codec="ascii", exclude_characters="|,", categories=["L", "N", "P"]), min_size=1, max_size=12
)


class Lua:
    """A store that runs parts of the scripts."""

    def __init__(self, url: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._redis = Redis.from_url(url, decode_responses=True)

    def run(self, parts: Sequence[str], body: str, *args: object) -> list[str]:
        text = "\n".join([*(path(part).read_text() for part in parts), body])
        reply = self._redis.eval(text, 0, *(str(arg) for arg in args))
        return [str(word) for word in self._loop.run_until_complete(cast("asyncio.Future[list[str]]", reply))]

    def spend(self, per_minute: int, now_ms: int) -> bool:
        text = source("dodo/spend_call").replace("local now = store_ms()", "local now = tonumber(ARGV[5])")
        reply = self._redis.eval(text, 1, "budget", str(per_minute), str(BURST_SHARE), "0", "0", str(now_ms))
        return bool(self._loop.run_until_complete(cast("asyncio.Future[int]", reply)))

    def empty(self) -> None:
        self._loop.run_until_complete(self._redis.flushall())

    def close(self) -> None:
        self._loop.run_until_complete(self._redis.aclose())
        self._loop.close()


@pytest.fixture(scope="module")
def lua(server: valkey.Valkey) -> Iterator[Lua]:
    found = Lua(server.url)
    yield found
    found.close()


@st.composite
def buckets(draw: st.DrawFn) -> Bucket:
    amount = draw(st.integers(-MAX_BALANCE_NANOS, MAX_BALANCE_NANOS))
    return Bucket(
        id=BucketId(draw(WORDS)),
        unit=draw(st.sampled_from(Unit)),
        remaining=amount,
        granted=amount,
        expires_at_ms=draw(st.none() | st.integers(1, 2**53)),
        adapters=tuple(draw(st.lists(WORDS, max_size=3))),
        is_allowance=draw(st.booleans()),
    )


@given(bucket=buckets(), held=AMOUNTS)
@settings(max_examples=200, deadline=None)
def test_a_bucket_is_one_text(lua: Lua, bucket: Bucket, held: int) -> None:
    body = """
    local b = parse_bucket("id", ARGV[1])
    b.held = tonumber(ARGV[2])
    local ends, covered = b.expires ~= 0 and text(b.expires) or "", b.is_allowance and "1" or "0"
    return { b.unit, text(b.remaining), text(b.granted), ends, b.adapters, covered, format_bucket(b) }
    """
    *fields, text = lua.run(("store/numbers", "ledger/buckets"), body, pack_bucket(bucket), held)
    ends = str(bucket.expires_at_ms or "")
    amounts = [str(bucket.remaining), str(bucket.granted)]
    assert fields == [letter_of(bucket.unit), *amounts, ends, ",".join(bucket.adapters), str(int(bucket.is_allowance))]
    assert unpack_bucket(bucket.id, text) == (bucket, held)


@given(counts=st.tuples(*(st.integers(0, 2**53) for _ in range(5))))
@settings(max_examples=50, deadline=None)
def test_a_usage_is_one_text(lua: Lua, counts: tuple[int, ...]) -> None:
    cached, prompt = sorted(counts[:2])
    usage = Usage(prompt, cached, *counts[2:])
    body = "local found = numbers(ARGV[1]) for i = 1, 5 do found[i] = text(found[i]) end return found"
    parts = ("store/numbers", "ledger/clock_skew", "ledger/bill")
    assert lua.run(parts, body, pack_usage(usage)) == [str(count) for count in (prompt, cached, *counts[2:])]


@given(kind=WORDS, before=WORDS, payload=st.text(max_size=40))
@settings(max_examples=50, deadline=None)
def test_an_entry_has_one_digest(lua: Lua, kind: str, before: str, payload: str) -> None:
    lua.empty()
    body = """
    local keys = { account = "account", stream = "stream" }
    redis.call("HSET", keys.account, "chain", ARGV[2])
    append(keys, ARGV[1], "acme", function() return ARGV[3] end)
    return { redis.call("HGET", keys.account, "chain") }
    """
    (chain,) = lua.run(("store/numbers", "ledger/entries"), body, kind, before, payload)
    assert len(chain) == CHAIN_DIGITS
    assert Entry("1-1", kind, TenantId("acme"), payload, chain).follows(before)


def test_numbers_that_both_languages_know_are_equal(lua: Lua) -> None:
    body = "return { CLOCK_SKEW_MS, WINDOWS_REMEMBERED, LINE }"
    parts = ("store/numbers", "ledger/clock_skew", "ledger/markers", "ledger/buckets")
    assert lua.run(parts, body) == [str(TOLERANCE_MS), str(SETTLED_WINDOWS - 2), OVERAGE]


@given(per_minute=st.integers(1, 600), pauses=st.lists(st.integers(0, 5_000), min_size=1, max_size=60))
@settings(max_examples=30, deadline=None)
def test_a_process_and_the_store_count_calls_alike(lua: Lua, per_minute: int, pauses: list[int]) -> None:
    lua.empty()
    moments = list(accumulate(pauses, initial=1_795_000_000_000))
    clock = SteppedClock(moments[0])
    own = CallBudget(per_minute, clock)
    for clock.now_ms in moments:
        assert asyncio.run(own.take()) == lua.spend(per_minute, clock.now_ms)
