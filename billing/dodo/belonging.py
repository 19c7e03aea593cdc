"""Which of Dodo's environments a store belongs to: the one whose ids of customers, products and events it has.

Dodo's sandbox, test mode and live mode share no id: a store that is used with another one would charge no customer.
"""

from redis.asyncio import Redis

from billing.dodo.errors import DodoMisconfigured
from billing.store.connection import guarded
from billing.store.keys import CUSTOMER_TENANTS, DODO_IDS, META
from billing.store.write import write

_FIELD = "dodo"


async def claim(redis: Redis, environment: str) -> None:
    """Note that the store belongs to ``environment``, unless it has ids of another one.

    A store that an earlier version wrote bears no note, and belongs to the first that claims it.

    Raises:
        DodoMisconfigured: it belongs to another environment.
    """
    async with guarded():
        await write(redis, ("HSETNX", META, _FIELD, environment))
        is_other = await redis.hget(META, _FIELD) != environment
        if is_other and not await redis.hlen(DODO_IDS) and not await redis.hlen(CUSTOMER_TENANTS):
            await write(redis, ("HSET", META, _FIELD, environment))
    await refuse_other(redis, environment)


async def refuse_other(redis: Redis, environment: str) -> None:
    """Raises DodoMisconfigured if the store belongs to another environment; changes nothing."""
    async with guarded():
        found = await redis.hget(META, _FIELD)
    if found and str(found) != environment:
        raise DodoMisconfigured(
            f"this store belongs to Dodo's {found!s}, but FAREBOX_DODO_ENVIRONMENT says {environment}, where its "
            f"customers and products are unknown: set FAREBOX_DODO_ENVIRONMENT={found!s}, or use another store "
            "(another folder in FAREBOX_HOME, or another REDIS_URL)"
        )
