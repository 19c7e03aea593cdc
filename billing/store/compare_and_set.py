"""Changes JSON values that several processes write, each only where no other process changed it meanwhile."""

from collections.abc import Callable
from typing import TypeVar, cast

from pydantic import BaseModel
from redis.asyncio import Redis

from billing.store.errors import StoreUnavailable
from billing.store.guard import guarded
from billing.store.schema import refuse_other_schema
from billing.store.scripts import Script

TRIES = 20

M = TypeVar("M", bound=BaseModel)


async def change(
    redis: Redis, key: str, kind: type[M], update: Callable[[M], M], what: str, silence_s: float | None = None
) -> M | None:
    """Replace the value at a key by what ``update`` makes of it.

    ``update`` is called again if another process changed the value, and after a lost reply on its own result, which it
    must then leave as it is. ``what`` names the value in an error.

    Returns:
        What is stored then; None where there is no value.

    Raises:
        StoreUnavailable: the store does not answer, or others kept changing the value.
    """
    swap = Script(redis, "store/swap")
    for _ in range(TRIES):
        async with guarded(silence_s):
            await refuse_other_schema(redis)  # an API key is in no shard, so no fence is compared
            text = cast(str | None, await redis.get(key))
            if text is None:
                return None
            old = kind.model_validate_json(text)
            new = update(old)
            if new == old or await swap.number({"value": key}, {"old": text, "new": new.model_dump_json()}):
                return new
    raise StoreUnavailable(f"{what} is being changed by others: try again")
