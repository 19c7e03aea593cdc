"""A tenant sees its own records, all of them, once each, and their exact sums."""

import asyncio

import pytest
from redis.asyncio import Redis

from billing.reports import history
from billing.reports.counters import LiveCounters
from billing.store.keys import shard_for
from billing.usage import TenantId
from tests.support.world import DAY, World

ACME = TenantId("acme")


async def test_pages_are_newest_first_and_complete(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "READ", 3)
    monkeypatch.setattr(history, "MAX_SCANNED", 6)
    neighbour = _neighbour(ACME)
    for number in range(11):
        await world.use("acme", charged=number)
        await world.use(neighbour, charged=1000)
        await world.redis.xadd(shard_for(ACME).stream, {"k": "grant", "t": "acme", "p": "{}"})
    seen: list[int] = []
    cursor, pages = "", 0
    while True:
        page = await history.records(world.redis, ACME, cursor, limit=2)
        seen += [record.charged_nanos for record in page.records]
        cursor, pages = page.next_cursor, pages + 1
        if not cursor:
            break
    assert seen == list(range(10, -1, -1))
    assert pages >= 6


async def test_tenant_without_records_has_one_empty_page(world: World) -> None:
    assert await history.records(world.redis, ACME) == history.Page(())


@pytest.mark.parametrize("cursor", ["x", "1", "-", "1-", "+", "1-x", "1-1 2", "٣-١", "9" * 50 + "-1"])
async def test_forged_cursor_is_refused(redis: Redis, cursor: str) -> None:
    with pytest.raises(ValueError, match="no cursor"):
        await history.records(redis, ACME, cursor)


async def test_totals_group_by_model_and_by_day_and_sum_exactly(world: World) -> None:
    await world.use("acme", charged=10**15 + 1, overage=7, adapter="pirate@0123456789ab")
    await world.use("acme", charged=2, adapter="pirate@ba9876543210")
    await world.use("acme", charged=3)
    await world.use(_neighbour(ACME), charged=999)
    now = world.clock()
    by_model = await history.totals(world.redis, ACME, now - DAY, now + DAY, "model")
    assert [(t.group, t.records, t.charged_nanos) for t in by_model] == [("base", 1, 3), ("pirate", 2, 10**15 + 3)]
    (total,) = await history.totals(world.redis, ACME, now - DAY, now + DAY)
    assert (total.charged_nanos, total.overage_nanos) == (10**15 + 6, 7)
    assert (total.requests, total.prompt_tokens, total.cached_tokens, total.completion_tokens) == (3, 30, 6, 15)
    days = await history.totals(world.redis, ACME, now - DAY, now + DAY, "day")
    assert sum(day.records for day in days) == 3
    assert await history.totals(world.redis, ACME, now + DAY, now + 2 * DAY) == []
    assert await history.totals(world.redis, ACME, now, now - 1) == []


async def test_counters_follow_the_stream_and_rebuild_from_it(world: World) -> None:
    counters = LiveCounters(world.redis)
    for number in range(4):
        await world.use("acme", charged=100, overage=number)
        await counters.catch_up()
    await world.use("zeta", charged=5)
    assert await counters.catch_up() == 1
    rebuilt = LiveCounters(world.redis)
    await rebuilt.catch_up()
    assert rebuilt.by_tenant == counters.by_tenant
    acme = rebuilt.by_tenant[ACME]
    assert (acme.requests, acme.completion_tokens, acme.charged_nanos, acme.overage_nanos) == (4, 20, 400, 6)


async def test_counters_that_catch_up_twice_at_once_count_once(world: World) -> None:
    for _ in range(3):
        await world.use("acme", charged=100)
    counters = LiveCounters(world.redis)
    assert sorted(await asyncio.gather(counters.catch_up(), counters.catch_up())) == [0, 3]
    assert counters.by_tenant[ACME].charged_nanos == 300


def _neighbour(tenant: TenantId) -> str:
    """Another tenant of the same shard."""
    return next(n for n in (f"t{i}" for i in range(10_000)) if shard_for(TenantId(n)) == shard_for(tenant))
