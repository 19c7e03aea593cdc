"""The ledger on a cluster: every node is used, and one that fails is unavailable in time and comes back."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest
from redis.asyncio import Redis
from redis.crc import key_slot

from billing.export.outbox import Outbox
from billing.ledger.errors import CreditOnHold
from billing.ledger.ledger import Ledger
from billing.pricing.prices import Price
from billing.store.cluster import Cluster
from billing.store.connection import connect, verify
from billing.store.errors import StoreRefused, StoreUnavailable
from billing.store.guard import guarded
from billing.store.keys import ALL_SHARDS, META, SCHEMA, shard_for, shard_of
from billing.store.migrations import migrate
from billing.usage import TenantId
from tests.billing.store.test_write import WRITES, fill
from tests.support import recorded
from tests.support.fleet import HOST, PROMPT_S, Fleet, answered, cluster, until_served
from tests.support.samples import money, request, settlement

pytestmark = pytest.mark.prompt
TENANTS = [TenantId(f"tenant_{n}") for n in range(24)]
"""Enough for each of three nodes to have some."""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with cluster(tmp_path_factory.mktemp("c")) as fleet:
        yield fleet


@pytest.fixture
async def store(nodes: Fleet) -> AsyncIterator[Redis]:
    redis = await connect(nodes.url)
    await redis.flushall()
    yield redis
    await redis.flushall()
    await redis.aclose()


async def test_every_movement_works_on_each_node(store: Redis) -> None:
    ledger = Ledger(store)
    for number, tenant in enumerate(TENANTS):
        await ledger.grant(replace(money(100_000, f"payment:{number}"), tenant=tenant))
        await ledger.hold(replace(request(f"req_{number}", lease_ms=1), tenant=tenant))
    assert await ledger.open_holds() == len(TENANTS)
    for number, tenant in enumerate(TENANTS[:12]):
        await ledger.settle(replace(settlement(f"req_{number}"), tenant=tenant))
    await asyncio.sleep(0.01)
    assert await ledger.expire() == 12
    assert (await Outbox(store).backlog()).unsealed_entries == 3 * len(TENANTS) - len(TENANTS)
    balances = [(await ledger.account(tenant)).balance_nanos for tenant in TENANTS]
    assert balances == [80_000] * 12 + [100_000] * 12


async def test_address_of_one_node_finds_its_cluster(nodes: Fleet, store: Redis) -> None:
    redis = await connect(f"redis://{HOST}:{nodes.servers[2].port}")
    await asyncio.gather(*(Ledger(redis).account(tenant) for tenant in TENANTS))
    await redis.aclose()


async def test_wrong_password_is_named(nodes: Fleet) -> None:
    with pytest.raises(StoreUnavailable, match="password"):
        await connect(nodes.url.replace("://", "://nobody:secret@"))


async def test_concurrent_holds_cannot_overspend(store: Redis) -> None:
    ledger = Ledger(store)
    await ledger.grant(money(50 * 100_000))
    price = Price.model_validate({"per_request": "0.0001"})
    answers = await asyncio.gather(
        *(ledger.hold(request(f"req_{n}", price=price)) for n in range(1_000)), return_exceptions=True
    )
    assert [type(answer) for answer in answers].count(CreditOnHold) == 950


async def test_hung_node_is_unavailable_to_its_own_tenants_only(nodes: Fleet, store: Redis) -> None:
    ledger = Ledger(store)
    for number, tenant in enumerate(TENANTS):
        await ledger.grant(replace(money(100_000, f"payment:{number}"), tenant=tenant))
    await asyncio.gather(*(ledger.account(tenant) for tenant in TENANTS for _ in range(5)))
    nodes.servers[0].send(signal.SIGSTOP)
    try:
        waits = await asyncio.gather(*(answered(ledger.account(tenant)) for tenant in TENANTS for _ in range(5)))
    finally:
        nodes.servers[0].send(signal.SIGCONT)
    hung = {t for t in TENANTS if key_slot(shard_for(t).tag.encode()) < 16_384 // 3}
    for (is_answered, seconds), tenant in zip(waits, [t for t in TENANTS for _ in range(5)], strict=True):
        assert is_answered == (tenant not in hung)
        assert is_answered or seconds < PROMPT_S
    await until_served(ledger, TENANTS)


async def test_moved_shard_is_followed(nodes: Fleet, store: Redis) -> None:
    ledger, tenant = Ledger(store), TENANTS[0]
    slot = key_slot(ALL_SHARDS[shard_of(tenant)].tag.encode())
    owner = next(n for n in range(3) if slot < (n + 1) * 16_384 // 3)
    source, target = nodes.servers[owner], nodes.servers[(owner + 1) % 3]
    source_id, target_id = (str(server.client.execute_command("CLUSTER", "MYID")) for server in (source, target))
    target.client.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
    source.client.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
    async with guarded():
        await store.set(shard_for(tenant).tenant(tenant), "x")
        assert await store.get(shard_for(tenant).tenant(tenant)) == "x", "asked where it is being moved to"
    with pytest.raises(StoreUnavailable, match="rehashing"):
        await ledger.grant(replace(money(100_000), tenant=tenant))
    for server in (target, source):
        server.client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", target_id)
    await ledger.grant(replace(money(100_000), tenant=tenant))
    await ledger.hold(replace(request(), tenant=tenant))
    assert await ledger.open_holds() == 1
    await store.flushall()
    for server in (source, target):
        server.client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", source_id)
    await until_served(ledger, TENANTS)


async def test_each_primary_must_be_durable(nodes: Fleet, store: Redis) -> None:
    nodes.servers[1].client.config_set("appendfsync", "everysec")
    try:
        with pytest.raises(StoreRefused, match=f"{nodes.servers[1].port}.*not on disk"):
            await verify(store)
        await verify(store, "trusted")
    finally:
        nodes.servers[1].client.config_set("appendfsync", "always")
    await verify(store)


async def test_node_without_scripts_gets_them_while_another_hangs(nodes: Fleet, store: Redis) -> None:
    ledger = Ledger(store)
    sound = next(tenant for tenant in TENANTS if key_slot(shard_for(tenant).tag.encode()) > 16_384 * 2 // 3)
    nodes.servers[2].client.script_flush()
    nodes.servers[0].send(signal.SIGSTOP)
    try:
        assert (await ledger.account(sound)).balance_nanos == 0
    finally:
        nodes.servers[0].send(signal.SIGCONT)
    await until_served(ledger, TENANTS)


async def test_recorded_store_is_migrated_on_a_cluster(nodes: Fleet, store: Redis) -> None:
    await store.flushall()
    await recorded.load(store)
    with pytest.raises(StoreRefused, match="farebox migrate"):
        await connect(nodes.url)
    migrated = await migrate(store)
    assert [change.count for change in migrated.changes] == [13, 5, 1, 4]
    assert {await store.get(shard.schema) for shard in ALL_SHARDS} == {str(SCHEMA)}
    await (await connect(nodes.url)).aclose()


async def test_migration_finds_connections_to_any_node(nodes: Fleet, store: Redis) -> None:
    await store.hset("fb:meta", "schema", "1")
    other = nodes.servers[1].client
    other.client_setname("farebox:1")
    with pytest.raises(StoreRefused, match="stop these first"):
        await migrate(store, ignore_unnamed=True)
    other.close()


@pytest.mark.parametrize("what", WRITES)
async def test_write_is_made_and_refused_on_a_cluster(store: Redis, what: str) -> None:
    await fill(store)
    before = await everything(store)
    await WRITES[what](store)
    assert await everything(store) != before
    await store.flushall()
    await fill(store)
    await store.hset(META, "schema", str(SCHEMA + 1))
    before = await everything(store)
    with pytest.raises(StoreUnavailable, match="the store has schema"):
        await WRITES[what](store)
    assert await everything(store) == before


async def everything(store: Redis) -> list[dict[str, object]]:
    assert isinstance(store, Cluster)
    return [await recorded.contents(node) for node in store.primaries.values()]
