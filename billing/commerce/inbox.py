"""Webhook deliveries as they came and what became of them, and the credit that payments buy.

Moves no money: what is stored here makes a delivery count once and keeps a failed one from being lost.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Self, cast

from redis.asyncio import Redis

from billing.commerce.dodo_ids import all_ids
from billing.commerce.products import Products
from billing.store.connection import guarded
from billing.store.guard import BULK_DEADLINE_S
from billing.store.keys import INBOX, INBOX_PARKED, PAYMENTS
from billing.store.schema import refuse_other_schema
from billing.store.scripts import Script
from billing.store.write import write
from billing.usage import Unit

SCAN = 500
NEVER_MS = 2**53 - 1
"""The time of the next try of a delivery that is set aside."""
NOTHING_BOUGHT = "[]"
"""What an earlier version fixed for payments that buy no credit."""
CHARGE_METER = "meter:charge"
"""Our name for the one meter at Dodo."""

log = logging.getLogger("farebox.billing.commerce.inbox")


class Outcome(StrEnum):
    WAITING = "waiting"
    """Not applied yet, or not applicable yet: it is tried again."""
    APPLIED = "applied"
    KEPT = "kept"
    """It moves nothing here, by its type or because it is about a product that is not ours."""
    SET_ASIDE = "set_aside"
    """It is about money for a product that is not ours. It is not tried again, but a person may still book it."""
    BOOKED = "booked"
    """A payment that a person granted credit for by hand."""
    DROPPED = "dropped"
    """A person decided that it is never applied."""


OPEN = (Outcome.WAITING, Outcome.SET_ASIDE)
"""Outcomes that may still change."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One signed webhook."""

    id: str
    type: str
    body: str
    received_at_ms: int
    outcome: Outcome = Outcome.WAITING
    reason: str = ""
    attempts: int = 0

    @classmethod
    def from_json(cls, text: str) -> Self:
        raw = json.loads(text)
        return cls(**{**raw, "outcome": Outcome(raw["outcome"])})


@dataclass(frozen=True, slots=True)
class PurchasedCredit:
    """The credit that one line of a payment buys, or that a person booked for it."""

    source: str
    unit: Unit
    amount: int
    expires_at_ms: int | None
    adapters: tuple[str, ...]
    tenant: str = ""
    """Who a person booked it for; empty where it is the tenant of the customer that paid."""
    price: int = 0
    """Nanos that the line was sold for; 0 in purchases fixed before 0.2."""
    is_allowance: bool = False
    """A plan's fee buys its period's allowance: ``source`` is the bucket's id, and holds put it in place."""


class Inbox:
    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._keep = Script(redis, "commerce/keep_delivery")

    async def receive(self, delivery: Delivery, next_try_ms: int) -> Delivery:
        """Store a delivery before anything is done with it. Returns the one stored under this id before, if any."""
        async with guarded(BULK_DEADLINE_S):
            (is_new,) = await write(self._redis, ("HSETNX", INBOX, delivery.id, json.dumps(asdict(delivery))))
            if not is_new:
                known = await self.get(delivery.id)
                return known or delivery
            await write(self._redis, ("ZADD", INBOX_PARKED, next_try_ms, delivery.id))
            return delivery

    async def get(self, webhook_id: str) -> Delivery | None:
        async with guarded(BULK_DEADLINE_S):
            text = cast(str | None, await self._redis.hget(INBOX, webhook_id))
        return Delivery.from_json(text) if text else None

    async def finish(self, delivery: Delivery) -> bool:
        """Store how it ended: it is not tried again. False where it was finished before; then that stays."""
        return await self._keep_open(delivery, NEVER_MS if delivery.outcome is Outcome.SET_ASIDE else None)

    async def park(self, delivery: Delivery, next_try_ms: int) -> bool:
        """Store it with the reason why it waits, to be tried again at ``next_try_ms``. False as ``finish``."""
        return await self._keep_open(delivery, next_try_ms)

    async def _keep_open(self, delivery: Delivery, next_try_ms: int | None) -> bool:
        async with guarded(BULK_DEADLINE_S):
            await refuse_other_schema(self._redis)
            is_kept = await self._keep.number(
                keys={"inbox": INBOX},
                args={"id": delivery.id, "delivery": json.dumps(asdict(delivery)), "open": OPEN},
            )
            if is_kept and next_try_ms is not None:
                await write(self._redis, ("ZADD", INBOX_PARKED, next_try_ms, delivery.id))
            else:
                await self.forget(delivery.id)
        return bool(is_kept)

    async def forget(self, webhook_id: str) -> None:
        """Do not try this delivery again. What is stored of it stays."""
        async with guarded(BULK_DEADLINE_S):
            await write(self._redis, ("ZREM", INBOX_PARKED, webhook_id))

    async def parked(self, limit: int = 50) -> list[Delivery]:
        """Deliveries that wait, those due first."""
        return [one for one in await self.unfinished(limit) if one.outcome is Outcome.WAITING]

    async def unfinished(self, limit: int = 50) -> list[Delivery]:
        """Deliveries that wait, those due first; then those that are set aside."""
        async with guarded(BULK_DEADLINE_S):
            ids = cast(list[str], await self._redis.zrange(INBOX_PARKED, 0, limit - 1))
            texts = cast(Sequence[str | None], await self._redis.hmget(INBOX, ids) if ids else [])
        found = [_read(webhook_id, text) for webhook_id, text in zip(ids, texts, strict=True) if text]
        return [one for one in found if one is not None and one.outcome in OPEN]

    async def due(self, due_ms: int, limit: int) -> list[str]:
        """Ids of deliveries that wait and are due by then, those due longest first."""
        async with guarded(BULK_DEADLINE_S):
            found = await self._redis.zrangebyscore(INBOX_PARKED, "-inf", due_ms, start=0, num=limit)
        return cast(list[str], found)

    async def reschedule(self, webhook_ids: Sequence[str], due_ms: int) -> None:
        """Try waiting deliveries at ``due_ms``; what was finished meanwhile stays finished."""
        if webhook_ids:
            due = [word for webhook_id in webhook_ids for word in (due_ms, webhook_id)]
            async with guarded(BULK_DEADLINE_S):
                await write(self._redis, ("ZADD", INBOX_PARKED, "XX", *due))

    async def parked_count(self) -> int:
        async with guarded(BULK_DEADLINE_S):
            return int(await self._redis.zcount(INBOX_PARKED, "-inf", f"({NEVER_MS}"))

    async def set_aside_count(self) -> int:
        async with guarded(BULK_DEADLINE_S):
            return int(await self._redis.zcount(INBOX_PARKED, NEVER_MS, "+inf"))

    async def prune(self, before_ms: int) -> int:
        """Delete deliveries that do not wait and were received before then. How many those were."""
        old: list[str] = []
        async with guarded(BULK_DEADLINE_S):
            async for webhook_id, text in self._redis.hscan_iter(INBOX, count=SCAN):
                delivery = _read(webhook_id, text)
                if delivery is None or delivery.outcome is Outcome.WAITING:
                    continue
                if delivery.received_at_ms < before_ms:
                    old.append(webhook_id)
            for first in range(0, len(old), SCAN):
                some = old[first : first + SCAN]
                await write(self._redis, ("ZREM", INBOX_PARKED, *some), ("HDEL", INBOX, *some))
        return len(old)

    async def fix_purchase(self, payment_id: str, credits_: Sequence[PurchasedCredit]) -> tuple[PurchasedCredit, ...]:
        """What a payment buys: ``credits_``, or what was fixed before. Buying nothing is not fixed."""
        fixed = json.dumps([asdict(one) for one in credits_])
        async with guarded(BULK_DEADLINE_S):
            if credits_:
                await write(self._redis, ("HSETNX", PAYMENTS, payment_id, fixed))
            text = cast(str | None, await self._redis.hget(PAYMENTS, payment_id))
            if credits_ and text == NOTHING_BOUGHT:
                await write(self._redis, ("HSET", PAYMENTS, payment_id, fixed))
                text = fixed
        return _credits(text) if text else ()

    async def purchase(self, payment_id: str) -> tuple[PurchasedCredit, ...] | None:
        """What was fixed that a payment buys; ``None`` where nothing is."""
        async with guarded(BULK_DEADLINE_S):
            text = cast(str | None, await self._redis.hget(PAYMENTS, payment_id))
        return (_credits(text) or None) if text else None

    async def names(self) -> dict[str, str]:
        """By Dodo's id, our name, such as ``pack:small``, of everything that we made at Dodo."""
        sold = {id_: terms.name for id_, terms in (await Products(self._redis).all()).items()}
        return {id_: name for name, id_ in (await all_ids(self._redis)).items()} | sold


def _read(webhook_id: str, text: str) -> Delivery | None:
    """``None`` where this version cannot read it, which the log says."""
    try:
        return Delivery.from_json(text)
    except (ValueError, KeyError, TypeError) as error:
        log.warning("webhook %s cannot be read, and stays: %s", webhook_id, error)
        return None


def _credits(text: str) -> tuple[PurchasedCredit, ...]:
    return tuple(
        PurchasedCredit(**{**raw, "unit": Unit(raw["unit"]), "adapters": tuple(raw["adapters"])})
        for raw in json.loads(text)
    )
