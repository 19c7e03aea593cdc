"""Changes JSON values that several processes write, each only where no other process changed it meanwhile."""

from collections.abc import Callable
from typing import Generic, TypeVar, cast

from pydantic import BaseModel
from redis.asyncio import Redis

from billing.store.errors import StoreUnavailable
from billing.store.guard import guarded
from billing.store.schema import refuse_other_schema
from billing.store.scripts import Script

TRIES = 20

M = TypeVar("M", bound=BaseModel)


class CompareAndSet(Generic[M]):
    """Values of one kind, each the JSON at a key of its own."""

    def __init__(self, redis: Redis, kind: type[M], silence_s: float | None = None) -> None:
        """``silence_s``: how long the store may be silent, as ``guarded`` takes it."""
        self._redis, self._kind, self._silence_s = redis, kind, silence_s
        self._swap = Script(redis, "store/swap")

    async def change(self, key: str, update: Callable[[M], M], what: str) -> M | None:
        """Replace the value at a key by what ``update`` makes of it.

        ``update`` is called again if another process changed the value, and after a lost reply on its own result, which
        it must then leave as it is. ``what`` names the value in an error.

        Returns:
            What is stored then; None where there is no value.

        Raises:
            StoreUnavailable: the store does not answer, or others kept changing the value.
        """
        for _ in range(TRIES):
            async with guarded(self._silence_s):
                await refuse_other_schema(self._redis)  # an API key is in no shard, so no fence is compared
                text = cast(str | None, await self._redis.get(key))
                if text is None:
                    return None
                old = self._kind.model_validate_json(text)
                new = update(old)
                if new == old:
                    return new
                if await self._swap.number(keys={"value": key}, args={"old": text, "new": new.model_dump_json()}):
                    return new
        raise StoreUnavailable(f"{what} is being changed by others: try again")
