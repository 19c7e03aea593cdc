"""A stored value is replaced only where no other process changed it meanwhile."""

import asyncio

import pytest
from redis.asyncio import Redis

from billing.store.compare_and_set import CompareAndSet
from billing.store.errors import StoreUnavailable
from billing.store.keys import shard_for
from billing.tenants.tenant import Tenant
from tests.support.samples import ACME

KEY = shard_for(ACME).tenant(ACME)
STORED = Tenant(id=ACME, email="acme@example.com", plan="prepaid", created_at_ms=0)


def grown(tenant: Tenant) -> Tenant:
    return tenant.model_copy(update={"created_at_ms": tenant.created_at_ms + 1})


async def test_concurrent_equal_changes_all_count(store: Redis) -> None:
    await store.set(KEY, STORED.model_dump_json())
    await asyncio.gather(*(CompareAndSet(store, Tenant).change(KEY, grown, "it") for _ in range(8)))
    found = await CompareAndSet(store, Tenant).change(KEY, lambda tenant: tenant, "it")
    assert found == STORED.model_copy(update={"created_at_ms": 8})


async def test_absent_value_is_not_made(store: Redis) -> None:
    assert await CompareAndSet(store, Tenant).change(KEY, grown, "it") is None
    assert await store.exists(KEY) == 0


async def test_change_without_effect_writes_nothing(store: Redis) -> None:
    text = STORED.model_dump_json(exclude={"name"})
    await store.set(KEY, text)
    await CompareAndSet(store, Tenant).change(KEY, lambda tenant: tenant, "it")
    assert await store.get(KEY) == text


async def test_value_that_never_stands_still_is_unavailable(store: Redis) -> None:
    await store.set(KEY, STORED.model_dump_json())
    other = iter(range(1_000))

    async def set_by_another() -> None:
        await store.set(KEY, STORED.model_copy(update={"name": str(next(other))}).model_dump_json())

    class Busy:
        """Each read is followed by another process's write."""

        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        async def get(self, key: str) -> object:
            text = await store.get(key)
            await set_by_another()
            return text

    with pytest.raises(StoreUnavailable, match="the tenant is being changed by others"):
        await CompareAndSet(Busy(), Tenant).change(KEY, grown, "the tenant")  # type: ignore[arg-type]
