"""From how many client addresses a key is used: an estimate by the hour, without keeping one address.

Gateways note in memory and write what is new every few seconds, away from every request.
"""

import asyncio
import hashlib
import logging
from collections.abc import Sequence

from redis.asyncio import Redis

from billing.clock import Clock, now_ms
from billing.store.connection import guarded
from billing.store.errors import StoreUnavailable
from billing.store.guard import BULK_DEADLINE_S
from billing.store.keys import shard_for
from billing.usage import TenantId

HOUR_MS = 3_600_000
FLUSH_S = 5.0
KEPT_S = 7_200
MAX_KNOWN = 50_000
"""Addresses that a process remembers to have written; then it forgets them all, and may write some again."""

log = logging.getLogger(__name__)
Sighting = tuple[TenantId, str, int, str]
"""Tenant, key, hour and a digest of the address."""


class AddressSketches:
    def __init__(self, redis: Redis, clock: Clock = now_ms) -> None:
        self._redis, self._clock = redis, clock
        self._known: set[Sighting] = set()
        self._new: set[Sighting] = set()

    def note(self, tenant: TenantId, key_id: str, address: str) -> None:
        """A request came from there. Costs no round trip."""
        digest = hashlib.blake2b(address.encode(), key=tenant.encode(), digest_size=8).hexdigest()
        sighting = (tenant, key_id, self._clock() // HOUR_MS, digest)
        if sighting in self._known:
            return
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
            self._new.clear()
        self._known.add(sighting)
        self._new.add(sighting)

    async def flush(self) -> None:
        """Raises StoreUnavailable; what was to be written is then written later."""
        writing, self._new = self._new, set()
        if not writing:
            return
        try:
            async with guarded(BULK_DEADLINE_S):
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
        """For ever; a store that is away costs estimates, not requests."""
        while True:
            await asyncio.sleep(FLUSH_S)
            try:
                await self.flush()
            except StoreUnavailable as error:
                log.warning("client addresses are written later: %s", error)

    async def counts(self, keys: Sequence[tuple[TenantId, str]]) -> dict[tuple[TenantId, str], int]:
        """Addresses of each key in the hour that runs, within a percent or so."""
        hour = self._clock() // HOUR_MS
        async with guarded(BULK_DEADLINE_S):
            pipe = self._redis.pipeline(transaction=False)
            for tenant, key_id in keys:
                pipe.pfcount(shard_for(tenant).address_sketches(tenant, key_id, hour))
            found = await pipe.execute() if keys else []
        return dict(zip(keys, found, strict=True))
