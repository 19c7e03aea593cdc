"""How to reach the store, for how long to wait, and whether it is fit to keep money.

Every file of ``billing/store`` talks to the store inside ``guarded``; nobody else sees its errors.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from billing.errors import StoreRefused, StoreUnavailable
from billing.store import keys

Durability = Literal["strict", "trusted"]

ANSWER_TIMEOUT_S = 0.25
"""A store that needs longer for one command is down."""
DEADLINE_S = 0.28
"""For one call altogether, waiting for a connection and one more try included."""
MAX_CONNECTIONS = 64
SCHEMA = "1"

_UNFIT = ("OOM", "MISCONF", "NOREPLICAS", "LOADING", "READONLY", "CLUSTERDOWN", "MASTERDOWN", "BUSY", "TRYAGAIN")
"""Answers of a store that is there and cannot write now."""


async def connect(url: str, *, durability: Durability = "strict") -> Redis:
    """A client with bounded waits, of a store that was verified.

    Raises:
        StoreUnavailable: it does not answer.
        StoreRefused: it would lose or evict money.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=MAX_CONNECTIONS,
        timeout=ANSWER_TIMEOUT_S,
        socket_timeout=ANSWER_TIMEOUT_S,
        socket_connect_timeout=ANSWER_TIMEOUT_S,
        retry=Retry(NoBackoff(), 1),
        decode_responses=True,
    )
    redis = Redis.from_pool(pool)
    try:
        await verify(redis, durability)
    except BaseException:
        await redis.aclose()
        raise
    return redis


async def verify(redis: Redis, durability: Durability = "strict") -> None:
    """Check, once at start, that acknowledged writes stay. ``trusted`` takes the operator's word for it.

    Raises:
        StoreUnavailable: it does not answer.
        StoreRefused: it evicts keys, writes no log, or holds data of another layout.
    """
    async with guarded():
        if durability == "strict":
            _refuse_lossy(await redis.info("memory") | await redis.info("persistence"))
        await redis.hsetnx(keys.META, "schema", SCHEMA)
        await redis.hsetnx(keys.META, "shards", str(keys.SHARDS))
        schema, shards = await redis.hmget(keys.META, ["schema", "shards"])
    found, needed = (schema, shards), (SCHEMA, str(keys.SHARDS))
    if found != needed:
        raise StoreRefused(
            f"the store's schema and shard count are {found} and this farebox needs {needed}: "
            "point REDIS_URL at a store of its own"
        )


def _refuse_lossy(info: dict[str, object]) -> None:
    policy = info.get("maxmemory_policy")
    if policy != "noeviction":
        raise StoreRefused(f"the store evicts keys (maxmemory-policy {policy}): set it to noeviction")
    if info.get("aof_enabled") != 1:
        raise StoreRefused(
            "the store writes no log and would forget money on a crash: set appendonly yes, "
            "or `durability: trusted` for a managed service that keeps its data another way"
        )


@asynccontextmanager
async def guarded(deadline_s: float = DEADLINE_S) -> AsyncIterator[None]:
    """Turn every way in which the store can fail into ``StoreUnavailable``, within the deadline.

    Whether a command took effect is then unknown: every one can be sent again.
    """
    try:
        async with asyncio.timeout(deadline_s):
            yield
    except (exceptions.ConnectionError, exceptions.TimeoutError, TimeoutError, OSError) as error:
        raise StoreUnavailable(f"the metering store does not answer: {error or 'timeout'}") from error
    except exceptions.ResponseError as error:
        if isinstance(error, exceptions.OutOfMemoryError) or str(error).startswith(_UNFIT):
            raise StoreUnavailable(f"the metering store cannot write: {error}") from error
        raise
