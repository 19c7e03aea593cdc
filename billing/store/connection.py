"""Connects to the store and verifies that it is fit to keep money.

Calls of what this returns are made inside ``guarded``, so that callers see this project's errors and not redis-py's.
"""

from collections.abc import Mapping
from typing import Any, Literal
from weakref import WeakKeyDictionary

from redis import exceptions
from redis.asyncio import Redis

from billing.store import keys
from billing.store.address import Address, Shape, parse
from billing.store.cluster import Cluster
from billing.store.errors import StoreRefused, StoreUnavailable
from billing.store.guard import guarded as guarded
from billing.store.guard import is_unfit
from billing.store.primary import Sentinels, pool
from billing.store.schema import open_schema

Durability = Literal["strict", "trusted"]
_replicas_needed: WeakKeyDictionary[Redis, int] = WeakKeyDictionary()

START_SILENCE_S = 1.0
"""The silence allowed at start, for which no request waits."""
REPLICAS_PATIENCE_MS = 150
OLDEST = {"Redis": (6, 2), "Valkey": (8, 0)}


async def connect(url: str, *, durability: Durability = "strict", min_replicas_acked: int = 0) -> Redis:
    """Return a client of a verified store: one server, the primary that sentinels name, or a cluster.

    ``min_replicas_acked``: how many replicas must have a movement of credit before it is acknowledged.

    Raises:
        StoreUnavailable: the store does not answer.
        StoreRefused: it is not fit to keep money, or has another schema.
    """
    redis = await reach(url)
    try:
        await verify(redis, durability)
        _replicas_needed[redis] = min_replicas_acked
        await replicated(redis, keys.ALL_SHARDS[0].pulse)
    except BaseException:
        await redis.aclose()
        raise
    return redis


async def reach(url: str) -> Redis:
    """Return a client of the store, of any shape, without verifying it.

    Raises:
        StoreUnavailable: the store does not answer.
        StoreRefused: the address cannot be read.
    """
    address = parse(url)
    redis = _open(address)
    try:
        if address.shape is Shape.SINGLE and address.nodes and await _is_clustered(redis):
            await redis.aclose()
            redis = Cluster(address)
        if isinstance(redis, Cluster):
            async with guarded(START_SILENCE_S):
                await redis.learn()
    except BaseException:
        await redis.aclose()
        raise
    return redis


async def replicated(redis: Redis, key: str) -> None:
    """Wait until enough replicas have what was written so far to the node of ``key``. Writes to the key.

    Raises:
        StoreUnavailable: too few have it in time. What was written stands; send it again to wait again.
    """
    needed = _replicas_needed.get(redis, 0)
    if not needed:
        return
    async with guarded():
        pipe = redis.pipeline(transaction=False)
        pipe.set(key, "")  # WAIT is about the last write of its own connection
        pipe.execute_command("WAIT", needed, REPLICAS_PATIENCE_MS)
        _, having = await pipe.execute()
    if having < needed:
        raise StoreUnavailable(f"the metering store has this on {having} of {needed} replicas")


async def identity(redis: Redis) -> frozenset[str]:
    """Identify the servers that are the store now. Changes when one was restarted or replaced.

    Raises:
        StoreUnavailable: one of them does not answer.
    """
    found = set[str]()
    async with guarded():
        for server in primaries_of(redis).values():
            pipe = server.pipeline(transaction=False)
            pipe.info("server")
            pipe.info("replication")
            process, role = await pipe.execute()
            found.add(f"{process['run_id']} {role['master_replid']}")
    return frozenset(found)


def _open(address: Address) -> Redis:
    if address.shape is Shape.CLUSTER:
        return Cluster(address)
    if address.shape is Shape.SENTINEL:
        return _Watched(address)
    where = {"host": address.nodes[0].host, "port": address.nodes[0].port} if address.nodes else {}
    return Redis.from_pool(pool({**address.options, **where}))


class _Watched(Redis):
    """A client of the primary that the sentinels name."""

    def __init__(self, address: Address) -> None:
        self._sentinels = Sentinels(address, self._drop_idle)
        super().__init__(connection_pool=pool(address.options, self._sentinels.primary))
        self.auto_close_connection_pool = True

    async def _drop_idle(self) -> None:
        await self.connection_pool.disconnect(inuse_connections=False)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await super().aclose(close_connection_pool)
        await self._sentinels.aclose()


async def _is_clustered(redis: Redis) -> bool:
    async with guarded(START_SILENCE_S):
        return (await redis.info("cluster")).get("cluster_enabled") == 1


def primaries_of(redis: Redis) -> Mapping[str, Redis]:
    """Return a client of each server that takes writes, by a name for people."""
    if isinstance(redis, Cluster):
        return {f"{node} of the cluster": client for node, client in redis.primaries.items()}
    return {"the store": redis}


async def verify(redis: Redis, durability: Durability = "strict") -> None:
    """Check that the store is fit to keep money and has this farebox's schema.

    Raises:
        StoreUnavailable: it does not answer.
        StoreRefused: ``verify_server`` refuses it, or it has another schema.
    """
    await verify_server(redis, durability)
    async with guarded(START_SILENCE_S):
        await open_schema(redis)


async def verify_server(redis: Redis, durability: Durability = "strict") -> None:
    """Check that acknowledged writes stay, whatever they are. ``trusted`` takes the operator's word for it.

    Raises:
        StoreUnavailable: it does not answer.
        StoreRefused: it evicts keys, acknowledges a write before its log is on disk, or is too old.
    """
    async with guarded(START_SILENCE_S):
        for name, server in primaries_of(redis).items():
            info = await server.info()
            _refuse_old(name, info)
            if durability == "strict":
                _refuse_lossy(name, info)
                _refuse_late(name, await _log_sync(server))


def _refuse_old(name: str, info: Mapping[str, Any]) -> None:
    """Valkey reports the version of the Redis whose protocol it speaks as well as its own."""
    product = "Valkey" if "valkey_version" in info else "Redis"
    version = str(info.get("valkey_version") or info.get("redis_version", "0"))
    found = tuple(int(part) for part in version.split(".")[:2])
    if found < OLDEST[product]:
        needed = " or ".join(f"{each} {major}.{minor}" for each, (major, minor) in OLDEST.items())
        raise StoreRefused(f"{name} is {product} {version}: {needed} or later is needed")


def _refuse_lossy(name: str, info: Mapping[str, Any]) -> None:
    policy = info.get("maxmemory_policy")
    if policy != "noeviction":
        raise StoreRefused(f"{name} evicts keys (maxmemory-policy {policy}): set it to noeviction")
    if info.get("aof_enabled") != 1:
        raise StoreRefused(
            f"{name} writes no log and would forget money on a crash: set appendonly yes, "
            "or `durability: trusted` for a managed service that keeps its data another way"
        )


async def _log_sync(redis: Redis) -> str | None:
    """The setting ``appendfsync``; None where ``CONFIG GET`` is denied."""
    try:
        found = await redis.config_get("appendfsync")
    except exceptions.ResponseError as error:
        if is_unfit(error):
            raise
        return None
    return str(found["appendfsync"]) if "appendfsync" in found else None


def _refuse_late(name: str, log_sync: str | None) -> None:
    if log_sync is None:
        raise StoreRefused(
            f"{name} does not say when its log reaches the disk (CONFIG GET appendfsync is denied): allow it, "
            "or set `durability: trusted` once its operator vouches that an acknowledged write survives a crash"
        )
    if log_sync != "always":
        raise StoreRefused(
            f"{name} acknowledges writes that are not on disk (appendfsync {log_sync}) and would forget money "
            "on a crash: set appendfsync always, or `durability: trusted` where losing the last second is your choice"
        )
