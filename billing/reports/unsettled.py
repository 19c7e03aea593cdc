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
from billing.usage import Draw, Unit


@dataclass(frozen=True, slots=True)
class Unsettled:
    """Ages are of the oldest, in seconds by the store's clock; 0 where there is none."""

    open_holds: int = 0
    """Those that cannot be read are counted, and neither their age nor their amount is."""
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
    texts = [text for shard in found[::3] for text in shard]
    holds = [hold for hold in map(_hold, texts) if hold is not None]
    unsealed = [order(entries[0][0])[0] for entries in found[1::3] if entries]
    return Unsettled(
        open_holds=len(texts),
        oldest_hold_s=_age_s(int(seconds), [since for since, _ in holds]),
        held_nanos=sum(draw.amount for _, draws in holds for draw in draws if draw.unit is Unit.NANOS),
        oldest_unsealed_s=_age_s(int(seconds), unsealed),
        unresolved=sum(found[2::3]),
    )


def _hold(text: str) -> tuple[int, Sequence[Draw]] | None:
    """Since when a hold is open and what it drew; ``None`` where it cannot be read, which ``expire`` names."""
    try:
        hold = json.loads(text)
        return int(hold["since"]), unpack_draws(hold["draws"])
    except (ValueError, KeyError, TypeError):
        return None


def _age_s(now_s: int, moments_ms: Sequence[int]) -> int:
    return max(0, now_s - min(moments_ms) // 1_000) if moments_ms else 0
