"""A store belongs to one of Dodo's environments, and is not used with another."""

import pytest
from redis.asyncio import Redis

from billing.dodo.belonging import claim, refuse_other
from billing.dodo.errors import DodoMisconfigured
from billing.store.keys import CUSTOMER_TENANTS, DODO_IDS

ENVIRONMENTS = ("sandbox", "test_mode", "live_mode")


@pytest.mark.parametrize("ids", [DODO_IDS, CUSTOMER_TENANTS])
@pytest.mark.parametrize("owner", ENVIRONMENTS)
async def test_store_with_ids_is_refused_to_other_environments(store: Redis, owner: str, ids: str) -> None:
    await claim(store, owner)
    await store.hset(ids, "pack:small", "pdt_1")
    await claim(store, owner)
    for other in set(ENVIRONMENTS) - {owner}:
        for use in (claim, refuse_other):
            with pytest.raises(DodoMisconfigured, match=f"Dodo's {owner}.*says {other}.*FAREBOX_HOME"):
                await use(store, other)
    await refuse_other(store, owner)


async def test_store_without_ids_may_change_hands(store: Redis) -> None:
    await claim(store, "sandbox")
    await claim(store, "test_mode")
    with pytest.raises(DodoMisconfigured):
        await refuse_other(store, "sandbox")


async def test_store_of_an_earlier_version_belongs_to_the_first_claim(store: Redis) -> None:
    await store.hset(DODO_IDS, "pack:small", "pdt_1")
    await refuse_other(store, "live_mode")
    await claim(store, "test_mode")
    with pytest.raises(DodoMisconfigured):
        await claim(store, "sandbox")
