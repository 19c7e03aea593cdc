"""How to reach the store, for how long to wait, and whether it is fit to keep money.

Every file of ``billing/store`` talks to the store inside ``guarded``; nobody else sees its errors.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import ClassVar, Literal

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from billing.errors import StoreRefused, StoreUnavailable
from billing.store import keys

Durability = Literal["strict", "trusted"]

TICK_S = 0.04
SILENCE_S = 0.24
"""A store that answers nobody for so long is down: with the tick before it, 503 within 300 ms."""
QUEUE_S = 5.0
"""The longest that a call waits for its turn while the store answers others."""
MAX_CONNECTIONS = 64
SCHEMA = "1"

_UNFIT = ("OOM", "MISCONF", "NOREPLICAS", "LOADING", "READONLY", "CLUSTERDOWN", "MASTERDOWN", "BUSY", "TRYAGAIN")
"""Answers of a store that is there and cannot write now."""


async def connect(url: str, *, durability: Durability = "strict") -> Redis:
    """A client of a store that was verified. Every wait for it is bounded by ``guarded``, and only there.

    The client's own timeouts stay off: before Python 3.12 they may swallow a task's cancellation.

    Raises:
        StoreUnavailable: it does not answer.
        StoreRefused: it would lose or evict money.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=MAX_CONNECTIONS,
        timeout=None,
        socket_timeout=None,
        socket_connect_timeout=None,
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
        StoreRefused: it evicts keys, acknowledges before its log is on disk, or holds data of another layout.
    """
    async with guarded():
        if durability == "strict":
            _refuse_lossy(await redis.info("memory") | await redis.info("persistence"))
            _refuse_late(await _log_sync(redis))
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


async def _log_sync(redis: Redis) -> str | None:
    """When the store's log reaches the disk, in its own word; ``None`` where it may not be asked."""
    try:
        found = await redis.config_get("appendfsync")
    except exceptions.ResponseError as error:
        if str(error).startswith(_UNFIT):
            raise
        return None
    return str(found["appendfsync"]) if "appendfsync" in found else None


def _refuse_late(log_sync: str | None) -> None:
    if log_sync is None:
        raise StoreRefused(
            "the store does not tell when its log reaches the disk (CONFIG GET appendfsync is denied): allow it, "
            "or set `durability: trusted` once its operator vouches that an acknowledged write survives a crash"
        )
    if log_sync != "always":
        raise StoreRefused(
            f"the store acknowledges writes that are not on disk (appendfsync {log_sync}) and would forget money "
            "on a crash: set appendfsync always, or `durability: trusted` where losing the last second is your choice"
        )


@asynccontextmanager
async def guarded(silence_s: float = SILENCE_S) -> AsyncIterator[None]:
    """Turn every way in which the store can fail into ``StoreUnavailable``, in time.

    Whether a command took effect is then unknown: every one can be sent again.
    """
    try:
        async with asyncio.timeout(None) as timeout:
            watch = _Watch(timeout, silence_s)
            try:
                yield
            finally:
                watch.end()
            _Watch.answered_at = watch.loop.time()
    except (exceptions.ConnectionError, exceptions.TimeoutError, TimeoutError, OSError) as error:
        raise StoreUnavailable(f"the metering store does not answer: {str(error) or 'timeout'}") from error
    except exceptions.ResponseError as error:
        if isinstance(error, exceptions.OutOfMemoryError) or str(error).startswith(_UNFIT):
            raise StoreUnavailable(f"the metering store cannot write: {error}") from error
        raise


class _Watch:
    """Ends a call when the store has been silent towards this whole process for too long.

    Silence is counted in ticks of the event loop, so that a process which was itself kept from
    running, or which sent more than the store can answer at once, does not take the store for dead.
    """

    answered_at: ClassVar[float] = 0.0
    """When any call of this process was last answered, by the loop's clock."""

    def __init__(self, timeout: asyncio.Timeout, silence_s: float) -> None:
        self.loop = asyncio.get_running_loop()
        self._timeout, self._silence_s = timeout, silence_s
        self._silent_s = self._waited_s = 0.0
        self._ticked_at = self.loop.time()
        self._timer = self.loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._waited_s += TICK_S
        self._silent_s = 0.0 if _Watch.answered_at > self._ticked_at else self._silent_s + TICK_S
        self._ticked_at = now = self.loop.time()
        if self._silent_s >= self._silence_s - TICK_S / 2 or self._waited_s >= max(QUEUE_S, self._silence_s):
            self._timeout.reschedule(now)
        else:
            self._timer = self.loop.call_later(TICK_S, self._tick)

    def end(self) -> None:
        self._timer.cancel()
