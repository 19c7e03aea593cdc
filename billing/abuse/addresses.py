"""Estimate from how many client addresses a key is used in an hour, without storing an address.

Gateways note addresses in memory and write what is new to HyperLogLog sketches every few seconds, apart from requests.
"""

import asyncio
import hashlib
import logging
from collections.abc import Mapping, Sequence

from redis.asyncio import Redis

from billing.clock import Clock, now_ms
from billing.store.connection import guarded
from billing.store.errors import StoreUnavailable
from billing.store.guard import BULK_DEADLINE_S
from billing.store.keys import shard_for
from billing.store.schema import refuse_other_schema
from billing.usage import TenantId

HOUR_MS = 3_600_000
FLUSH_S = 5.0
KEPT_S = 7_200
MAX_KNOWN = 50_000
"""Addresses that a process remembers; at more it forgets them all, and may write some again."""

log = logging.getLogger(__name__)
UsedKey = tuple[TenantId, str]
"""A tenant and the id of its key."""
KeyUse = tuple[TenantId, str, int, str]
"""Tenant, key, hour and a digest of the address."""


class AddressSketches:
    def __init__(self, redis: Redis, clock: Clock = now_ms) -> None:
        self._redis, self._clock = redis, clock
        self._known: set[KeyUse] = set()
        self._new: set[KeyUse] = set()

    def note(self, tenant: TenantId, key_id: str, address: str) -> None:
        """Note that a request came from this address. Makes no round trip."""
        digest = hashlib.blake2b(address.encode(), key=tenant.encode(), digest_size=8).hexdigest()
        use = (tenant, key_id, self._clock() // HOUR_MS, digest)
        if use in self._known:
            return
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
            self._new.clear()
        self._known.add(use)
        self._new.add(use)

    async def flush(self) -> None:
        """Write what is new. Raises StoreUnavailable; the next call then writes it."""
        writing, self._new = self._new, set()
        if not writing:
            return
        try:
            async with guarded(BULK_DEADLINE_S):
                await refuse_other_schema(self._redis)  # too many for one atomic step, and they end within two hours
                pipe = self._redis.pipeline(transaction=False)
                for tenant, key_id, hour, digest in writing:
                    name = shard_for(tenant).address_sketches(tenant, key_id, hour)
                    pipe.pfadd(name, digest)
                    pipe.expire(name, KEPT_S)
                await pipe.execute()
        except StoreUnavailable:
            self._new |= writing
            raise

    async def run(self) -> None:
        """Flush every few seconds, until cancelled. Without the store estimates are late, and requests are not."""
        while True:
            await asyncio.sleep(FLUSH_S)
            try:
                await self.flush()
            except StoreUnavailable as error:
                log.warning("client addresses are written later: %s", error)

    async def counts(self, rows: Mapping[UsedKey, Sequence[UsedKey]]) -> dict[UsedKey, int]:
        """Addresses of each row of keys, all of one tenant, in the current hour, within a percent or so."""
        hour = self._clock() // HOUR_MS
        async with guarded(BULK_DEADLINE_S):
            pipe = self._redis.pipeline(transaction=False)
            for keys in rows.values():
                pipe.pfcount(*(shard_for(tenant).address_sketches(tenant, key_id, hour) for tenant, key_id in keys))
            found = await pipe.execute() if rows else []
        return dict(zip(rows, found, strict=True))
