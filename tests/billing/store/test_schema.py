"""A process whose schema is not the store's is refused: when it connects, and by every script that writes."""

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from billing.ledger.ledger import Ledger
from billing.money import Nanos
from billing.notices.log import Notices
from billing.notices.notice import Notice, NoticeKind
from billing.store.connection import connect, reach, verify
from billing.store.errors import StoreRefused, StoreUnavailable
from billing.store.keys import ALL_SHARDS, META, NOTICES, SCHEMA, shard_for
from billing.store.schema import CLIENT_NAME, FENCES, fence_of
from billing.tenants.directory import Tenants
from billing.tenants.tenant import Tenant, new_key
from cluster import valkey
from tests.support import recorded
from tests.support.samples import ACME, money, request, settlement

LATER = str(SCHEMA + 1)


@pytest.fixture(autouse=True)
async def _emptied(server: valkey.Valkey) -> AsyncIterator[None]:
    """No other test finds a store of another version."""
    yield
    redis = await reach(server.url)
    await redis.flushall()
    await redis.aclose()


async def migrate_to_a_later_version(redis: Redis) -> None:
    """What a later farebox does while this process runs."""
    for fence in FENCES:
        await redis.set(fence, LATER)
    await redis.hset(META, "schema", LATER)


async def test_new_store_has_schema_and_fences(server: valkey.Valkey, store: Redis) -> None:
    await (await connect(server.url)).aclose()
    assert await store.hget(META, "schema") == str(SCHEMA)
    assert [await store.get(shard.schema) for shard in ALL_SHARDS] == [str(SCHEMA)] * len(ALL_SHARDS)


async def test_full_store_is_opened(server: valkey.Valkey, store: Redis) -> None:
    await verify(store)
    await store.config_set("maxmemory", "1")
    try:
        await (await connect(server.url)).aclose()
    finally:
        await store.config_set("maxmemory", "0")


async def test_connections_are_named(store: Redis) -> None:
    assert await store.client_getname() == CLIENT_NAME


@pytest.mark.parametrize(
    ("found", "advice"),
    [("1", "farebox migrate"), ("1>2", "run `farebox migrate` again"), (LATER, "later farebox"), ("x", "REDIS_URL")],
)
async def test_other_schema_is_refused_at_connect(server: valkey.Valkey, store: Redis, found: str, advice: str) -> None:
    await store.hset(META, mapping={"schema": found, "shards": "64"})
    with pytest.raises(StoreRefused, match=advice):
        await connect(server.url)


async def test_other_shard_count_is_refused_at_connect(server: valkey.Valkey, store: Redis) -> None:
    await store.hset(META, mapping={"schema": str(SCHEMA), "shards": "32"})
    with pytest.raises(StoreRefused, match="REDIS_URL"):
        await connect(server.url)


async def test_running_ledger_is_refused_by_a_migrated_store(store: Redis, ledger: Ledger) -> None:
    """Nothing is admitted, and settlements wait in the spool."""
    await ledger.grant(money(1_000_000))
    await ledger.hold(request())
    await migrate_to_a_later_version(store)
    before = await recorded.contents(store)
    for call in (
        ledger.hold(request("req_2")),
        ledger.extend(request(), Nanos(60_000), Nanos(0)),
        ledger.settle(settlement()),
        ledger.grant(money(1, "payment:2")),
    ):
        with pytest.raises(StoreUnavailable, match=f"SCHEMA the store has schema {LATER}"):
            await call
    assert await recorded.contents(store) == before


async def test_running_process_writes_no_notice_and_no_key_to_a_migrated_store(store: Redis) -> None:
    tenants, notices = Tenants(store), Notices(store)
    await tenants.create(Tenant(id=ACME, email="acme@example.com", plan="prepaid"))
    _, key = new_key(ACME, 1)
    await tenants.add_key(key)
    await migrate_to_a_later_version(store)
    before = await recorded.contents(store)
    for call in (
        tenants.update(ACME, lambda tenant: tenant.model_copy(update={"suspended": True})),
        tenants.revoke_key(ACME, key.id),
        notices.record(Notice(NoticeKind.BALANCE_LOW, ACME, "low:1", 1)),
    ):
        with pytest.raises(StoreUnavailable, match=f"schema {LATER}"):
            await call
    assert await recorded.contents(store) == before


async def test_store_that_lost_everything_takes_movements_before_it_is_verified(store: Redis, ledger: Ledger) -> None:
    await verify(store)
    await store.flushall()
    await ledger.grant(money(100_000))
    await verify(store)
    assert (await ledger.account(ACME)).balance_nanos == 100_000


def test_fence_is_beside_its_key() -> None:
    shard = shard_for(ACME)
    assert [fence_of(key) for key in (shard.stream, shard.account(ACME), NOTICES)] == [
        shard.schema,
        shard.schema,
        "fb:{notices}:schema",
    ]
    assert fence_of("fb:key:abc") is None
