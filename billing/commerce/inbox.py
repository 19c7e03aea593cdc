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
from billing.store.write import write
from billing.usage import Unit

SCAN = 500
CHARGE_METER = "meter:charge"
"""Our name for the one meter at Dodo."""

log = logging.getLogger("farebox.billing.commerce.inbox")


class Outcome(StrEnum):
    WAITING = "waiting"
    """Not applied yet, or not applicable yet: it is tried again."""
    APPLIED = "applied"
    KEPT = "kept"
    """Of a type that moves nothing here."""


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
    """The credit that one line of a payment buys."""

    source: str
    unit: Unit
    amount: int
    expires_at_ms: int | None
    adapters: tuple[str, ...]
    price: int = 0
    """Nanos that the line was sold for; 0 in purchases fixed before 0.2."""


class Inbox:
    def __init__(self, redis: Redis) -> None:
        self._redis = redis

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

    async def finish(self, delivery: Delivery) -> None:
        """Store how it ended, applied or kept: it is not tried again."""
        async with guarded(BULK_DEADLINE_S):
            await write(
                self._redis,
                ("HSET", INBOX, delivery.id, json.dumps(asdict(delivery))),
                ("ZREM", INBOX_PARKED, delivery.id),
            )

    async def park(self, delivery: Delivery, next_try_ms: int) -> None:
        """Store it with the reason why it waits, to be tried again at ``next_try_ms``."""
        async with guarded(BULK_DEADLINE_S):
            await write(
                self._redis,
                ("HSET", INBOX, delivery.id, json.dumps(asdict(delivery))),
                ("ZADD", INBOX_PARKED, next_try_ms, delivery.id),
            )

    async def parked(self, limit: int = 50) -> list[Delivery]:
        """Deliveries that wait, those due first."""
        async with guarded(BULK_DEADLINE_S):
            ids = cast(list[str], await self._redis.zrange(INBOX_PARKED, 0, limit - 1))
            texts = cast(Sequence[str | None], await self._redis.hmget(INBOX, ids) if ids else [])
        return [Delivery.from_json(text) for text in texts if text]

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
            return int(await self._redis.zcard(INBOX_PARKED))

    async def prune(self, before_ms: int) -> int:
        """Delete deliveries that are finished and were received before then. How many those were."""
        old: list[str] = []
        async with guarded(BULK_DEADLINE_S):
            async for webhook_id, text in self._redis.hscan_iter(INBOX, count=SCAN):
                try:
                    delivery = Delivery.from_json(text)
                except (ValueError, KeyError, TypeError) as error:
                    log.warning("webhook %s cannot be read, and stays: %s", webhook_id, error)
                    continue
                if delivery.outcome is not Outcome.WAITING and delivery.received_at_ms < before_ms:
                    old.append(webhook_id)
            for first in range(0, len(old), SCAN):
                await write(self._redis, ("HDEL", INBOX, *old[first : first + SCAN]))
        return len(old)

    async def fix_purchase(self, payment_id: str, credits_: Sequence[PurchasedCredit]) -> tuple[PurchasedCredit, ...]:
        """What a payment buys: ``credits_``, or what was fixed when it was first seen."""
        async with guarded(BULK_DEADLINE_S):
            fixed = json.dumps([asdict(one) for one in credits_])
            await write(self._redis, ("HSETNX", PAYMENTS, payment_id, fixed))
            text = await self._redis.hget(PAYMENTS, payment_id)
        return _credits(cast(str, text))

    async def purchase(self, payment_id: str) -> tuple[PurchasedCredit, ...] | None:
        async with guarded(BULK_DEADLINE_S):
            text = cast(str | None, await self._redis.hget(PAYMENTS, payment_id))
        return _credits(text) if text else None

    async def names(self) -> dict[str, str]:
        """By Dodo's id, our name, such as ``pack:small``, of everything that we made at Dodo."""
        sold = {id_: terms.name for id_, terms in (await Products(self._redis).all()).items()}
        return {id_: name for name, id_ in (await all_ids(self._redis)).items()} | sold


def _credits(text: str) -> tuple[PurchasedCredit, ...]:
    return tuple(
        PurchasedCredit(**{**raw, "unit": Unit(raw["unit"]), "adapters": tuple(raw["adapters"])})
        for raw in json.loads(text)
    )
