"""Watermarks: how far the books of each shard were proved, and the sums of everything until there, as text."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from redis.asyncio import Redis

from billing.export.outbox import START
from billing.store.connection import guarded
from billing.store.guard import BULK_DEADLINE_S
from billing.store.keys import ALL_SHARDS, Shard
from billing.store.write import write
from billing.usage import TenantId

WORDS = 1_000
"""Names and values in one command: even, and far fewer than a script may give to a command."""
_AT, _DODO_MS = "at", "told_ms"
_FOLD, _DODO = "fold:", "told:"


@dataclass(frozen=True, slots=True)
class Mark:
    """Everything up to a stream id, and everything that Dodo dates before a moment, is proved and does not change."""

    at: str = START
    folds: Mapping[TenantId, str] = field(default_factory=dict)
    dodo_ms: int = 0
    dodo: Mapping[TenantId, str] = field(default_factory=dict)


class Watermarks:
    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def all(self) -> dict[int, Mark]:
        """By shard number."""
        async with guarded(BULK_DEADLINE_S):
            pipe = self._redis.pipeline(transaction=False)
            for shard in ALL_SHARDS:
                pipe.hgetall(shard.proved)
            found = await pipe.execute()
        return {shard.number: _mark(raw) for shard, raw in zip(ALL_SHARDS, found, strict=True)}

    async def keep(self, shard: Shard, mark: Mark) -> None:
        """In one step, in place of the one before."""
        values: dict[str, str | int] = {_AT: mark.at, _DODO_MS: mark.dodo_ms}
        values |= {_FOLD + tenant: text for tenant, text in mark.folds.items()}
        values |= {_DODO + tenant: text for tenant, text in mark.dodo.items()}
        words = [word for pair in values.items() for word in pair]
        async with guarded(BULK_DEADLINE_S):
            await write(
                self._redis,
                ("DEL", shard.proved),
                *(("HSET", shard.proved, *words[at : at + WORDS]) for at in range(0, len(words), WORDS)),
            )


def _mark(raw: Mapping[str, str]) -> Mark:
    return Mark(raw.get(_AT, START), _under(raw, _FOLD), int(raw.get(_DODO_MS, 0)), _under(raw, _DODO))


def _under(raw: Mapping[str, str], prefix: str) -> dict[TenantId, str]:
    return {TenantId(name.removeprefix(prefix)): text for name, text in raw.items() if name.startswith(prefix)}
