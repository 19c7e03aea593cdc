"""Which version of the stored forms the store has, and whether this process may write to it.

``META`` has the version. Each shard has it again, as a fence: every writing script compares it in the same atomic
step, so that a process of another version that still runs is refused once the store was migrated. A shard without a
fence takes every version, because gateways send their last movements again to a store that lost everything, and then
verify it.
"""

import re
from dataclasses import dataclass
from typing import cast

from redis.asyncio import Redis

from billing.store.errors import StoreRefused, StoreUnavailable
from billing.store.keys import ALL_SHARDS, CASH, META, NOTICES, SCHEMA, SHARDS

CLIENT_NAME = f"farebox:{SCHEMA}"
"""The name of each connection, by which ``CLIENT LIST`` shows who must be stopped before a migration."""

FENCE = f"""\
do -- the fence is the last key
  local schema = redis.call("GET", table.remove(KEYS))
  if schema and schema ~= "{SCHEMA}" then
    return redis.error_reply("SCHEMA the store has schema " .. schema .. " and this farebox writes {SCHEMA}")
  end
end
"""
"""The beginning of each script that writes to keys which have a fence."""


def fence_of(key: str) -> str | None:
    """The fence that is on the same cluster node as a script's key; None for a key without a hash tag."""
    end = key.find("}")
    return f"{key[: end + 1]}:schema" if end > 0 else None


_APART = tuple(key.rpartition(":")[0] for key in (NOTICES, CASH))
FENCES = tuple(f"{tag}:schema" for tag in (*(shard.tag for shard in ALL_SHARDS), *_APART))
"""Of each shard, and of the notices and the cash book, which are in none."""


@dataclass(frozen=True, slots=True)
class Version:
    """The version that a store has. ``target`` is another one while a migration is under way, or was killed."""

    schema: int
    target: int

    @property
    def is_migrating(self) -> bool:
        return self.schema != self.target

    @classmethod
    def parse(cls, text: str) -> "Version":
        """Reads ``1``, or ``1>2`` for a store that is being migrated. Raises StoreRefused for anything else."""
        found = re.fullmatch(r"(\d+)(?:>(\d+))?", text)
        if found is None:
            raise StoreRefused(f"the store's schema is {text!r}, which is no version: is REDIS_URL a farebox's store?")
        return cls(int(found[1]), int(found[2] or found[1]))

    def __str__(self) -> str:
        return f"{self.schema}>{self.target}" if self.is_migrating else str(self.schema)


async def read_version(redis: Redis) -> Version | None:
    """The version in the store; None for a store that no farebox has opened.

    Raises:
        StoreRefused: it is not a farebox's store, or has another number of shards.
    """
    schema, shards = cast(list[str | None], await redis.hmget(META, ["schema", "shards"]))
    if shards not in (None, str(SHARDS)):
        raise StoreRefused(
            f"the store has {shards} shards and this farebox needs {SHARDS}: point REDIS_URL at a store of its own"
        )
    return Version.parse(schema) if schema else None


async def open_schema(redis: Redis) -> None:
    """Check the store's version; give it to a new store.

    Raises:
        StoreRefused: it has another version, or its migration was not finished; the message says what to do.
    """
    version = await read_version(redis)
    if version is None:
        await redis.hsetnx(META, "shards", str(SHARDS))
        await redis.hsetnx(META, "schema", str(SCHEMA))
        version = await read_version(redis)
        assert version is not None, "it has just been written"
    if version.is_migrating:
        raise StoreRefused(
            f"the store's migration from schema {version.schema} to {version.target} was not finished: "
            "run `farebox migrate` again"
        )
    if version.schema < SCHEMA:
        raise StoreRefused(
            f"the store has schema {version.schema} and this farebox needs {SCHEMA}: stop every gateway and run "
            "`farebox migrate` (`farebox migrate --dry-run` shows what it will do)"
        )
    if version.schema > SCHEMA:
        raise StoreRefused(
            f"the store has schema {version.schema}, written by a later farebox, and this one needs {SCHEMA}: "
            "install that version"
        )
    await raise_fences(redis, only_missing=True)


async def refuse_other_schema(redis: Redis) -> None:
    """Before a write that no fence guards. Raises StoreUnavailable if the store has another version by now."""
    found = cast(str | None, await redis.hget(META, "schema"))
    if found not in (None, str(SCHEMA)):
        raise StoreUnavailable(f"the store has schema {found} and this farebox writes {SCHEMA}")


async def raise_fences(redis: Redis, only_missing: bool = False) -> None:
    """Write this version into each fence. A store that is full and has its fences is not written to."""
    pipe = redis.pipeline(transaction=False)
    for fence in FENCES:
        pipe.get(fence)
    found = await pipe.execute()
    wrong = [f for f, text in zip(FENCES, found, strict=True) if text != str(SCHEMA) and not (only_missing and text)]
    if not wrong:
        return
    pipe = redis.pipeline(transaction=False)
    for fence in wrong:
        pipe.set(fence, str(SCHEMA), nx=only_missing)
    await pipe.execute()
