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
from tests.support.movements import ACME, SANDBOX_KEY, Scenario, played


@pytest.fixture
async def scenario(redis: Redis, tmp_path: Path) -> AsyncIterator[Scenario]:
    async with played(redis, tmp_path / "dodo") as scenario:
        yield scenario


def watch(scenario: Scenario, dodo: Dodo | None = None) -> Watch:
    return Watch(scenario.redis, dodo or scenario.dodo, CallBudget(10_000))


async def test_right_books_pass_both_ways(scenario: Scenario) -> None:
    watching = watch(scenario)
    assert (await watching.reconcile_store()).faults == 0
    assert (await watching.reconcile_dodo()).faults == 0
    shown = await proof_state.shown(scenario.redis)
    assert list(shown) == ["dodo", "store"]
    assert all(state.at_ms and state.proofs and not (state.named or state.unproven) for state in shown.values())
    assert shown["dodo"].proofs > shown["store"].proofs


async def test_difference_between_two_passes_is_found(scenario: Scenario) -> None:
    watching = watch(scenario)
    await watching.reconcile_store()
    await scenario.redis.hincrby(shard_for(ACME).account(ACME), "overage", 1)
    found = await watching.reconcile_store()
    assert (found.faults, found.drift_nanos) == (1, 1)
    assert found.named == "exposure acme: field overage"
    assert (await proof_state.shown(scenario.redis))["store"] == found
    await scenario.redis.hincrby(shard_for(ACME).account(ACME), "overage", -1)
    assert (await watching.reconcile_store()).faults == 0


async def test_second_pass_reads_only_what_is_new(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = ShardReader.read

    async def counting(self: ShardReader, registered: tuple[str, ...]) -> object:
        state = await real(self, registered)  # type: ignore[arg-type]
        read.extend(entry.id for entry in state.entries)
        return state

    monkeypatch.setattr(ShardReader, "read", counting)
    watching = watch(scenario)
    assert (await watching.reconcile_store()).faults == 0
    before = len(read)
    await scenario.serve("req_new")
    assert (await watching.reconcile_store()).faults == 0
    assert len(read) == before + 1


async def test_altered_record_is_found_when_it_is_read(scenario: Scenario) -> None:
    stream = shard_for(ACME).stream
    watching = watch(scenario)
    await watching.reconcile_store()
    await scenario.serve("req_new")
    ((entry, fields),) = await scenario.redis.xrevrange(stream, count=1)
    await scenario.redis.xdel(stream, entry)
    await scenario.redis.xadd(stream, fields | {"p": fields["p"].replace('"status":"complete"', '"status":"failed"')})
    assert "rec_req_new is not as it was written" in (await watching.reconcile_store()).named


async def test_unavailable_dodo_is_unproven_and_no_fault(scenario: Scenario) -> None:
    away = Dodo(DodoSettings(SANDBOX_KEY, base_url="http://127.0.0.1:9"))
    state = await watch(scenario, away).reconcile_dodo()
    await away.close()
    assert (state.faults, state.drift_nanos) == (0, 0)
    assert state.unproven


async def test_what_is_open_is_counted_with_its_age_and_amount(scenario: Scenario) -> None:
    open_ = await unsettled(scenario.redis)
    held = sum(row.found for row in (await scenario.reconcile()).rows if row.proof == "held")
    assert (open_.open_holds, open_.held_nanos, open_.oldest_unsealed_s) == (2, held, 0)
    assert held > 0
    assert open_.oldest_hold_s <= 60
    shard = shard_for(ACME)
    hold = str(await scenario.redis.hget(shard.holds, "req_open"))
    began = hold.partition('"since":"')[2].partition('"')[0]
    await scenario.redis.hset(shard.holds, "req_open", hold.replace(began, str(int(began) - 3_600_000)))
    assert 3_600 <= (await unsettled(scenario.redis)).oldest_hold_s < 3_700


async def test_unresolved_settlements_are_counted(redis: Redis) -> None:
    await redis.hset(shard_for(ACME).unresolved, "req_1", "{}")
    assert (await unsettled(redis)).unresolved == 1


async def test_unsealed_usage_has_an_age(redis: Redis) -> None:
    assert await unsettled(redis) == Unsettled()
    await redis.xadd(shard_for(ACME).stream, {"k": "grant", "t": ACME, "p": "{}"}, id="1000-0")
    assert (await unsettled(redis)).oldest_unsealed_s > 1_000_000_000


async def test_events_left_by_a_flush_have_an_age(scenario: Scenario) -> None:
    await scenario.serve("req_late")
    tenant = await scenario.redis.get(shard_for(ACME).tenant(ACME))
    await scenario.redis.set(shard_for(ACME).tenant(ACME), _without_customer(str(tenant)))
    await scenario.flush()
    left = await Outbox(scenario.redis).shown()
    assert left.held_events == 1
    assert left.waiting_s(left.oldest_waiting_ms + 7_000) == 7
    await scenario.redis.set(shard_for(ACME).tenant(ACME), str(tenant))
    await scenario.flush()
    assert (await Outbox(scenario.redis).shown()).waiting_s(2**50) == 0


def _without_customer(tenant: str) -> str:
    before, _, rest = tenant.partition('"dodo_customer_id":"')
    return f'{before}"dodo_customer_id":"{rest[rest.index(chr(34)) :]}'
