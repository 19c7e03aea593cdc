"""What is open in the ledger at one moment, how much and since when: for people, never for bills."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from redis.asyncio import Redis

from billing.export.outbox import Outbox
from billing.ledger.codec import unpack_draws
from billing.ledger.journal import order
from billing.store.connection import guarded
from billing.store.guard import BULK_DEADLINE_S
from billing.store.keys import ALL_SHARDS
from billing.usage import Unit


@dataclass(frozen=True, slots=True)
class Unsettled:
    """Ages are of the oldest, in seconds by the store's clock; 0 where there is none."""

    open_holds: int = 0
    oldest_hold_s: int = 0
    held_nanos: int = 0
    """What open holds have set aside: the amount that is not settled."""
    oldest_unsealed_s: int = 0
    """Since the first record that no export window has."""
    unresolved: int = 0
    """Settlements that only a person can decide about: whether they were charged before cannot be known."""


async def unsettled(redis: Redis) -> Unsettled:
    """Raises StoreUnavailable."""
    cursors = await Outbox(redis).cursors()
    async with guarded(BULK_DEADLINE_S):
        pipe = redis.pipeline(transaction=False)
        for shard in ALL_SHARDS:
            pipe.hvals(shard.holds)
            pipe.xrange(shard.stream, min=f"({cursors[shard.number]}", count=1)
            pipe.hlen(shard.unresolved)
        found = await pipe.execute()
        seconds, _ = await redis.time()
    holds = [json.loads(text) for texts in found[::3] for text in texts]
    unsealed = [order(entries[0][0])[0] for entries in found[1::3] if entries]
    draws = [draw for hold in holds for draw in unpack_draws(hold["draws"])]
    return Unsettled(
        open_holds=len(holds),
        oldest_hold_s=_age_s(int(seconds), [int(hold["since"]) for hold in holds]),
        held_nanos=sum(draw.amount for draw in draws if draw.unit is Unit.NANOS),
        oldest_unsealed_s=_age_s(int(seconds), unsealed),
        unresolved=sum(found[2::3]),
    )


def _age_s(now_s: int, moments_ms: Sequence[int]) -> int:
    return max(0, now_s - min(moments_ms) // 1_000) if moments_ms else 0
