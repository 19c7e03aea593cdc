"""Settles whose hold the store has lost: charged once where that is certain, else kept unresolved for the operator."""

import json
import logging
from dataclasses import dataclass

from redis.asyncio import Redis

from billing.clock import Clock
from billing.ledger.account import HoldSnapshot, Receipt, Settlement
from billing.ledger.codec import letter_of, pack_bucket, pack_caps, pack_settlement, pack_usage, unpack_settlement
from billing.ledger.errors import DuplicateRequest, UnknownHold, UnresolvedSettlement
from billing.store.connection import guarded
from billing.store.keys import ALL_SHARDS, shard_for
from billing.store.scripts import Argument, Script
from billing.store.write import write
from billing.usage import RequestId, UsageRecord

LIST_SILENCE_S = 2.0

log = logging.getLogger("farebox.billing.ledger.recovery")


@dataclass(frozen=True, slots=True)
class Kept:
    """An unresolved settlement: whether it was ever charged is for the operator to find out."""

    settlement: Settlement
    reason: str
    at_ms: int
    """When it came here, by the store's clock."""


class Recovery:
    """Lost holds of all tenants."""

    def __init__(self, redis: Redis, clock: Clock, window_ms: int) -> None:
        self._redis, self._clock, self._window_ms = redis, clock, window_ms
        self._recover = Script(redis, "ledger/recover")

    async def settle(self, settlement: Settlement, is_sure: bool = False) -> Receipt | None:
        """Charge it, at most what was held; ``None`` where the store has it after all.

        Args:
            is_sure: the operator found out that it was never charged; its age does not matter then.

        Raises:
            UnknownHold: it does not say what was held.
            UnresolvedSettlement: it is kept for the operator.
            StoreUnavailable: whether it took effect is unknown; settle again.
        """
        snapshot, shard, tenant = settlement.snapshot, shard_for(settlement.tenant), settlement.tenant
        if snapshot is None:
            raise UnknownHold(settlement.request_id)
        async with guarded():
            reply = await self._recover.reply(
                keys={
                    "account": shard.account(tenant),
                    "buckets": shard.buckets(tenant),
                    "retired": shard.retired(tenant),
                    "holds": shard.holds,
                    "stream": shard.stream,
                    "unresolved": shard.unresolved,
                    "movements": shard.movement(tenant, ""),
                    "settled": shard.settled,
                },
                args={
                    "id": settlement.request_id,
                    "tenant": tenant,
                    "status": settlement.status.value,
                    "usage": pack_usage(settlement.usage),
                    "list": settlement.list_nanos,
                    "gateway_now": self._clock(),
                    "window": self._window_ms,
                    "is_sure": is_sure,
                    "settlement": pack_settlement(settlement),
                    **_pack_snapshot(snapshot),
                },
            )
        if reply.state == "kept":
            raise UnresolvedSettlement(settlement.request_id, reply["reason"])
        return Receipt(UsageRecord.from_json(reply["record"])) if reply.state == "settled" else None

    async def kept(self) -> list[Kept]:
        """Unresolved settlements, oldest first, without those that cannot be read."""
        async with guarded(LIST_SILENCE_S):
            pipe = self._redis.pipeline(transaction=False)
            for shard in ALL_SHARDS:
                pipe.hvals(shard.unresolved)
            found = [text for texts in await pipe.execute() for text in texts]
        kept: list[Kept] = []
        for text in found:
            try:
                raw = json.loads(text)
                kept.append(Kept(unpack_settlement(raw["settlement"]), raw["reason"], int(raw["at"])))
            except (ValueError, KeyError, TypeError, AssertionError) as error:
                log.error("an unresolved settlement cannot be read, and stays: %s: %s", error, text)
        return sorted(kept, key=lambda one: (one.at_ms, one.settlement.request_id))

    async def charge(self, request_id: RequestId) -> Receipt:
        """Charge an unresolved settlement: the operator found out that it never was.

        Raises:
            UnknownHold: it is not there.
            DuplicateRequest: it was charged after all, and is not unresolved any more.
            UnresolvedSettlement: the credit that it drew on is still not there.
        """
        settlement = await self._find(request_id)
        if receipt := await self.settle(settlement, is_sure=True):
            return receipt
        await self.drop(request_id)
        raise DuplicateRequest(request_id)

    async def drop(self, request_id: RequestId) -> Settlement:
        """Forget an unresolved settlement: the operator found out that it was charged. Raises UnknownHold."""
        settlement = await self._find(request_id)
        async with guarded():
            await write(self._redis, ("HDEL", shard_for(settlement.tenant).unresolved, request_id))
        return settlement

    async def _find(self, request_id: RequestId) -> Settlement:
        for one in await self.kept():
            if one.settlement.request_id == request_id:
                return one.settlement
        raise UnknownHold(request_id)


def _pack_snapshot(snapshot: HoldSnapshot) -> dict[str, Argument]:
    allowance = snapshot.allowance
    return {
        "head": snapshot.head,
        "unit": letter_of(snapshot.unit),
        "drawn": snapshot.drawn,
        "held": snapshot.held,
        "credit_limit": snapshot.credit_limit,
        "held_at": snapshot.held_at_ms,
        "key": snapshot.counted_key,
        "month": snapshot.month_start_ms,
        "caps": pack_caps(snapshot.caps),
        "allowance": allowance.id if allowance else "",
        "allowance_value": pack_bucket(allowance) if allowance else "",
    }
