"""This minute's calls to Dodo, counted in the store: gateways, the billing actor and the command line share one limit.

Knows the count; who waits for it and who calls anyway is decided by who asks.
"""

from redis.asyncio import Redis

from billing.dodo.budget import BURST_SHARE
from billing.store.connection import guarded
from billing.store.guard import BULK_DEADLINE_S
from billing.store.keys import CALL_BUDGET
from billing.store.scripts import Script


class SharedBudget:
    """At most ``per_minute`` calls of all processes in any minute; 0 goes by what the billing actor last said."""

    def __init__(self, redis: Redis, per_minute: int = 0) -> None:
        self._per_minute = per_minute
        self._spend = Script(redis, "dodo/spend_call")

    async def take(self) -> bool:
        """Spend one call, if there is one: for everything that can wait."""
        return await self._ask(must=False)

    async def spend(self) -> None:
        """A buyer waits for this call: it is made in any case, and others wait the longer."""
        await self._ask(must=True)

    async def _ask(self, must: bool) -> bool:
        async with guarded(BULK_DEADLINE_S):
            asked = {"asked_per_minute": self._per_minute, "burst_share": BURST_SHARE, "must": must}
            return bool(await self._spend.number(keys={"budget": CALL_BUDGET}, args=asked))
