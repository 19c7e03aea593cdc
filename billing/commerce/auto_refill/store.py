"""Auto-refills in the store: one value per tenant, replaced only where no other process changed it meanwhile."""

from collections.abc import Callable

from redis.asyncio import Redis

from billing.commerce.auto_refill.refill import Refill
from billing.store.compare_and_set import CompareAndSet
from billing.store.connection import guarded
from billing.store.guard import BULK_DEADLINE_S
from billing.store.keys import REFILLS, shard_for
from billing.store.write import write
from billing.usage import TenantId


class Refills:
    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._refills = CompareAndSet(redis, Refill, BULK_DEADLINE_S)

    async def get(self, tenant: TenantId) -> Refill | None:
        async with guarded(BULK_DEADLINE_S):
            text = await self._redis.get(shard_for(tenant).refill(tenant))
        return Refill.model_validate_json(text) if text else None

    async def put(self, tenant: TenantId, wanted: Refill) -> Refill:
        """Set it up, or set it up anew: attempts made so far, one in flight too, are kept."""
        async with guarded(BULK_DEADLINE_S):
            _, is_new = await write(
                self._redis,
                ("SADD", REFILLS, tenant),
                ("SET", shard_for(tenant).refill(tenant), wanted.model_dump_json(), "NX"),
            )
        if is_new:
            return wanted
        return await self.change(tenant, lambda old: old.renewed(wanted))

    async def change(self, tenant: TenantId, change: Callable[[Refill], Refill]) -> Refill:
        """Replace it by what ``change`` makes of it; ``change`` may be called several times.

        Raises:
            StoreUnavailable: others kept changing it.
        """
        name = shard_for(tenant).refill(tenant)
        refill = await self._refills.change(name, change, f"the auto-refill of {tenant}")
        assert refill is not None, "it was set up before"
        return refill

    async def tenants(self) -> list[TenantId]:
        """Tenants that have set one up, on or off."""
        async with guarded(BULK_DEADLINE_S):
            return [TenantId(str(one)) for one in sorted(await self._redis.smembers(REFILLS))]
