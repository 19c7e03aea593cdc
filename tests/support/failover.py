"""A replica that lags behind: what the store holds after a failover that lost the last movements."""

from redis.asyncio import Redis

from billing.reconcile.books import ShardReader
from billing.reconcile.fold import Fold
from billing.reconcile.proofs import Row, prove_tenant
from billing.store.keys import shard_for
from billing.usage import TenantId
from tests.support.samples import ACME

_COPY = """
local tag = string.match(KEYS[1], "{.-}")
for _, key in ipairs(redis.call("KEYS", ARGV[2] .. tag .. "*")) do redis.call("DEL", key) end
for _, key in ipairs(redis.call("KEYS", ARGV[1] .. tag .. "*")) do
  redis.call("COPY", key, ARGV[2] .. string.sub(key, #ARGV[1] + 1))
end"""


class Replica:
    """Copies every key of one shard aside, and puts the copies in their place."""

    def __init__(self, redis: Redis, tenant: TenantId = ACME) -> None:
        self._redis, self._holds = redis, shard_for(tenant).holds

    async def catch_up(self) -> None:
        """Receive everything that was written until now."""
        await self._redis.eval(_COPY, 1, self._holds, "fb:", "replica:")

    async def take_over(self) -> None:
        """Become the store: what was written since ``catch_up`` is lost."""
        await self._redis.eval(_COPY, 1, self._holds, "replica:", "fb:")


async def differences(redis: Redis, tenant: TenantId) -> list[Row]:
    """What reconciliation finds wrong with a tenant's books; empty where every proof is exact."""
    state = await ShardReader(redis, shard_for(tenant)).read([tenant])
    fold = Fold()
    for entry in state.entries:
        if entry.tenant == tenant:
            fold.add(entry)
    holds = [hold for hold in state.holds if hold.tenant == tenant]
    return [row for row in prove_tenant(tenant, state.accounts[tenant], fold, holds) if not row.is_exact]
