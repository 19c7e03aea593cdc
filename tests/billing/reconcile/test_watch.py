"""The books are proved all the time, cheaply, and what was found is there for people to see."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from billing.dodo.call_budget import CallBudget
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.export.outbox import Outbox
from billing.reconcile import proof_state
from billing.reconcile.books import ShardReader
from billing.reconcile.watch import Watch
from billing.reports.unsettled import Unsettled, unsettled
from billing.store.keys import shard_for
from tests.support.movements import ACME, SANDBOX_KEY, House, lived_in


@pytest.fixture
async def house(redis: Redis, tmp_path: Path) -> AsyncIterator[House]:
    async with lived_in(redis, tmp_path / "dodo") as house:
        yield house


def watch(house: House, dodo: Dodo | None = None) -> Watch:
    return Watch(house.redis, dodo or house.dodo, CallBudget(10_000))


async def test_right_books_pass_both_ways(house: House) -> None:
    watching = watch(house)
    assert (await watching.reconcile_store()).faults == 0
    assert (await watching.reconcile_dodo()).faults == 0
    shown = await proof_state.shown(house.redis)
    assert list(shown) == ["dodo", "store"]
    assert all(state.at_ms and state.proofs and not (state.named or state.unproven) for state in shown.values())
    assert shown["dodo"].proofs > shown["store"].proofs


async def test_difference_between_two_passes_is_found(house: House) -> None:
    watching = watch(house)
    await watching.reconcile_store()
    await house.redis.hincrby(shard_for(ACME).account(ACME), "overage", 1)
    found = await watching.reconcile_store()
    assert (found.faults, found.drift_nanos) == (1, 1)
    assert found.named == "exposure acme: field overage"
    assert (await proof_state.shown(house.redis))["store"] == found
    await house.redis.hincrby(shard_for(ACME).account(ACME), "overage", -1)
    assert (await watching.reconcile_store()).faults == 0


async def test_second_pass_reads_only_what_is_new(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = ShardReader.read

    async def counting(self: ShardReader, registered: tuple[str, ...]) -> object:
        state = await real(self, registered)  # type: ignore[arg-type]
        read.extend(entry.id for entry in state.entries)
        return state

    monkeypatch.setattr(ShardReader, "read", counting)
    watching = watch(house)
    assert (await watching.reconcile_store()).faults == 0
    before = len(read)
    await house.serve("req_new")
    assert (await watching.reconcile_store()).faults == 0
    assert len(read) == before + 1


async def test_altered_record_is_found_when_it_is_read(house: House) -> None:
    stream = shard_for(ACME).stream
    watching = watch(house)
    await watching.reconcile_store()
    await house.serve("req_new")
    ((entry, fields),) = await house.redis.xrevrange(stream, count=1)
    await house.redis.xdel(stream, entry)
    await house.redis.xadd(stream, fields | {"p": fields["p"].replace('"status":"complete"', '"status":"failed"')})
    assert "rec_req_new is not as it was written" in (await watching.reconcile_store()).named


async def test_unavailable_dodo_is_unproven_and_no_fault(house: House) -> None:
    away = Dodo(DodoSettings(SANDBOX_KEY, base_url="http://127.0.0.1:9"))
    state = await watch(house, away).reconcile_dodo()
    await away.close()
    assert (state.faults, state.drift_nanos) == (0, 0)
    assert state.unproven


async def test_what_is_open_is_counted_with_its_age_and_amount(house: House) -> None:
    open_ = await unsettled(house.redis)
    held = sum(row.found for row in (await house.reconcile()).rows if row.proof == "held")
    assert (open_.open_holds, open_.held_nanos, open_.oldest_unsealed_s) == (2, held, 0)
    assert held > 0
    assert open_.oldest_hold_s <= 60
    shard = shard_for(ACME)
    hold = str(await house.redis.hget(shard.holds, "req_open"))
    began = hold.partition('"since":"')[2].partition('"')[0]
    await house.redis.hset(shard.holds, "req_open", hold.replace(began, str(int(began) - 3_600_000)))
    assert 3_600 <= (await unsettled(house.redis)).oldest_hold_s < 3_700


async def test_unresolved_settlements_are_counted(redis: Redis) -> None:
    await redis.hset(shard_for(ACME).unresolved, "req_1", "{}")
    assert (await unsettled(redis)).unresolved == 1


async def test_unsealed_usage_has_an_age(redis: Redis) -> None:
    assert await unsettled(redis) == Unsettled()
    await redis.xadd(shard_for(ACME).stream, {"k": "grant", "t": ACME, "p": "{}"}, id="1000-0")
    assert (await unsettled(redis)).oldest_unsealed_s > 1_000_000_000


async def test_events_left_by_a_flush_have_an_age(house: House) -> None:
    await house.serve("req_late")
    tenant = await house.redis.get(shard_for(ACME).tenant(ACME))
    await house.redis.set(shard_for(ACME).tenant(ACME), _without_customer(str(tenant)))
    await house.flush()
    left = await Outbox(house.redis).shown()
    assert left.held_events == 1
    assert left.waiting_s(left.oldest_waiting_ms + 7_000) == 7
    await house.redis.set(shard_for(ACME).tenant(ACME), str(tenant))
    await house.flush()
    assert (await Outbox(house.redis).shown()).waiting_s(2**50) == 0


def _without_customer(tenant: str) -> str:
    before, _, rest = tenant.partition('"dodo_customer_id":"')
    return f'{before}"dodo_customer_id":"{rest[rest.index(chr(34)) :]}'
