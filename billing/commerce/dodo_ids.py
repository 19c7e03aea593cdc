"""Dodo's ids of what we made there, by our names: products by the key of their terms, the meter, the webhook."""

from collections.abc import Mapping
from typing import cast

from redis.asyncio import Redis

from billing.store.connection import guarded
from billing.store.guard import BULK_DEADLINE_S
from billing.store.keys import DODO_IDS
from billing.store.write import write


async def id_of(redis: Redis, name: str) -> str:
    """Empty while nothing of that name is known to be there."""
    async with guarded():
        return cast(str | None, await redis.hget(DODO_IDS, name)) or ""


async def all_ids(redis: Redis) -> dict[str, str]:
    async with guarded(BULK_DEADLINE_S):
        return cast(dict[str, str], await redis.hgetall(DODO_IDS))


async def keep_ids(redis: Redis, ids: Mapping[str, str]) -> None:
    """What was kept under other names stays: a late payment may still name it."""
    async with guarded(BULK_DEADLINE_S):
        await write(redis, ("HSET", DODO_IDS, *(word for pair in ids.items() for word in pair)))
