"""Writes with plain commands, which no fence in a script guards, only where the store has this process's schema."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, cast

from redis.asyncio import Redis

from billing.store.cluster import Cluster
from billing.store.keys import META, SCHEMA
from billing.store.schema import FENCE, fence_of, refuse_other_schema

Command = tuple[str | int, ...]
"""The name of a command, its key, and its other words: fewer than 7,000, which is all that Lua can unpack."""

_RUN = """
local replies, at = {}, 1
while at <= #ARGV do
  local count = tonumber(ARGV[at])
  replies[#replies + 1] = redis.call(unpack(ARGV, at + 1, at + count))
  at = at + 1 + count
end
return replies
"""
_BEHIND_META = f"""\
local schema = redis.call("HGET", KEYS[1], "schema")
if schema and schema ~= "{SCHEMA}" then
  return redis.error_reply("SCHEMA the store has schema " .. schema .. " and this farebox writes {SCHEMA}")
end
{_RUN}"""
_BEHIND_FENCE = FENCE + _RUN


async def write(redis: Redis, *commands: Command) -> list[Any]:
    """Run these commands, and return their replies. Called inside ``guarded``.

    On one server, the schema in ``META`` is compared in the same atomic step. On a cluster, ``META`` is read first;
    commands in a row whose keys lie in one shard are then one atomic step, in which the shard's fence is compared. Of
    keys in no shard, a migration that begins within this one round trip is not seen.

    Raises:
        StoreUnavailable: the store has another schema. Nothing is written, unless a migration on a cluster began
            between two commands.
    """
    if not isinstance(redis, Cluster):
        keys = [META, *(str(command[1]) for command in commands)]
        return cast(list[Any], await redis.register_script(_BEHIND_META)(keys=keys, args=_words(commands)))
    await refuse_other_schema(redis)
    replies: list[Any] = []
    for fence, group in groupby(commands, key=lambda command: fence_of(str(command[1]))):
        together = list(group)
        if fence is None:
            replies += [await redis.execute_command(*command) for command in together]
        else:
            keys = [*(str(command[1]) for command in together), fence]
            replies += await redis.register_script(_BEHIND_FENCE)(keys=keys, args=_words(together))
    return replies


def _words(commands: Sequence[Command]) -> list[str | int]:
    return [word for command in commands for word in (len(command), *command)]
