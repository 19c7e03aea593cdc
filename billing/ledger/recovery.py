"""Settles that the store no longer knows of: charged once where that is certain, else kept for a person.

Knows ``lua/orphan.lua`` and the quarantine; the ledger says when a settle is an orphan.
"""

import json
from dataclasses import dataclass
from typing import cast

from redis.asyncio import Redis

from billing.clock import Clock
from billing.ledger.account import HoldSnapshot, Receipt, Settlement
from billing.ledger.codec import letter_of, pack_caps, pack_settlement, pack_usage, unpack_settlement
from billing.ledger.errors import DuplicateRequest, UnknownHold, UnresolvedSettlement
from billing.store.connection import guarded
from billing.store.keys import ALL_SHARDS, shard_for
from billing.store.scripts import source
from billing.usage import RequestId, UsageRecord

LIST_SILENCE_S = 2.0


@dataclass(frozen=True, slots=True)
class Kept:
    """A settle in quarantine: whether it was ever charged is for a person to find out."""

    settlement: Settlement
    reason: str
    at_ms: int
    """When it came here, by the store's clock."""


class Recovery:
    """Orphans of all tenants."""

    def __init__(self, redis: Redis, clock: Clock, window_ms: int) -> None:
        self._redis, self._clock, self._window_ms = redis, clock, window_ms
        self._orphan = redis.register_script(source("ledger/orphan"))

    async def settle(self, settlement: Settlement, is_sure: bool = False) -> Receipt | None:
        """Charge it, at most what was held; ``None`` where the store knows it after all.

        Args:
            is_sure: somebody found out that it was never charged; its age does not matter then.

        Raises:
            UnknownHold: it does not say what was held.
            Quarantined: it is kept for a person.
            StoreUnavailable: whether it took effect is unknown; settle again.
        """
        origin, shard, tenant = settlement.origin, shard_for(settlement.tenant), settlement.tenant
        if origin is None:
            raise UnknownHold(settlement.request_id)
        names = [shard.account(tenant), shard.buckets(tenant), shard.retired(tenant), shard.holds, shard.stream]
        async with guarded():
            reply = cast(
                list[str],
                await self._orphan(
                    keys=[*names, shard.unresolved, *shard.settled],
                    args=self._arguments(settlement, origin, is_sure),
                ),
            )
        if reply[0] == "kept":
            raise UnresolvedSettlement(settlement.request_id, reply[1])
        return Receipt(UsageRecord.from_json(reply[1])) if reply[0] == "settled" else None

    def _arguments(self, settlement: Settlement, origin: HoldSnapshot, is_sure: bool) -> list[str | int]:
        return [
            settlement.request_id,
            settlement.tenant,
            settlement.status,
            pack_usage(settlement.usage),
            settlement.list_nanos,
            self._clock(),
            self._window_ms,
            origin.head,
            letter_of(origin.unit),
            origin.bucket,
            origin.held,
            origin.credit_limit,
            origin.held_at_ms,
            int(is_sure),
            pack_settlement(settlement),
            origin.counted_key,
            pack_caps(origin.caps),
            origin.month_start_ms,
        ]

    async def kept(self) -> list[Kept]:
        """The quarantine, oldest first."""
        async with guarded(LIST_SILENCE_S):
            pipe = self._redis.pipeline(transaction=False)
            for shard in ALL_SHARDS:
                pipe.hvals(shard.unresolved)
            found = [json.loads(text) for texts in await pipe.execute() for text in texts]
        kept = [Kept(unpack_settlement(raw["settlement"]), raw["reason"], int(raw["at"])) for raw in found]
        return sorted(kept, key=lambda one: (one.at_ms, one.settlement.request_id))

    async def charge(self, request_id: RequestId) -> Receipt:
        """Charge one of the quarantine: somebody found out that it never was.

        Raises:
            UnknownHold: it is not there.
            DuplicateRequest: it was charged after all; it has left the quarantine.
            Quarantined: the credit that it drew on is still not there.
        """
        settlement = await self._find(request_id)
        if receipt := await self.settle(settlement, is_sure=True):
            return receipt
        await self.drop(request_id)
        raise DuplicateRequest(request_id)

    async def drop(self, request_id: RequestId) -> Settlement:
        """Forget one of the quarantine: somebody found out that it was charged. Raises UnknownHold."""
        settlement = await self._find(request_id)
        async with guarded():
            await self._redis.hdel(shard_for(settlement.tenant).unresolved, request_id)
        return settlement

    async def _find(self, request_id: RequestId) -> Settlement:
        for one in await self.kept():
            if one.settlement.request_id == request_id:
                return one.settlement
        raise UnknownHold(request_id)
