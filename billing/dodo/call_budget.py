"""How many calls may still be made to Dodo this minute: within one process, and shared by all through the store.

Both count by one rule, a token bucket: ``lua/spend_call.lua`` has it for the store, ``CallBudget`` for one process.
"""

from typing import Protocol

from redis.asyncio import Redis

from billing.clock import Clock, now_ms
from billing.store.connection import guarded
from billing.store.guard import BULK_DEADLINE_S
from billing.store.keys import CALL_BUDGET
from billing.store.scripts import Script

PER_MINUTE = 240
"""Dodo's default tier."""
MINUTE_MS = 60_000
EXPORT_SHARE = 8
"""An eighth of a minute's calls is kept for the export: up to 30,000 events a minute by the default tier."""
BURST_SHARE = 6
"""A sixth of a minute's calls may come at once: 40 of 240, Dodo's own burst limit."""


class Budget(Protocol):
    """Whatever can wait takes a call from a budget before it calls Dodo."""

    async def take(self) -> bool:
        """Spend one call, if there is one."""
        ...


class CallBudget:
    """At most ``per_minute`` calls of this process in any minute, a burst included.

    ``within``: the larger budget of which this is a share; a call is made only where both have one.
    """

    def __init__(self, per_minute: int, clock: Clock = now_ms, within: Budget | None = None) -> None:
        assert per_minute >= 1, "an exporter without calls sends nothing"
        burst = max(1, per_minute // BURST_SHARE)
        self._clock, self._within = clock, within
        self._refill = max(1, per_minute - burst)
        """Call-milliseconds a minute, so that everything is whole."""
        self._capacity = burst * MINUTE_MS
        self._level = self._capacity
        self._seen_ms = clock()

    async def take(self) -> bool:
        now = self._clock()
        self._level = min(self._capacity, self._level + max(0, now - self._seen_ms) * self._refill)
        self._seen_ms = now
        if self._level < MINUTE_MS:
            return False
        self._level -= MINUTE_MS
        return self._within is None or await self._within.take()


class SharedBudget:
    """At most ``per_minute`` calls of all processes in any minute; 0 stands for the limit that was set last.

    ``reserved_share``: one in so many calls is kept for this caller, 0 for none. It gets those even while calls that
    customers wait for have used up, and overdrawn, all others.
    """

    def __init__(self, redis: Redis, per_minute: int = 0, reserved_share: int = 0) -> None:
        self._per_minute, self._reserved_share = per_minute, reserved_share
        self._spend = Script(redis, "dodo/spend_call")

    async def take(self) -> bool:
        """Spend one call, if there is one."""
        return await self._ask(must=False)

    async def spend(self) -> None:
        """Count a call that is made in any case, since a customer waits for it; what can wait then waits longer."""
        await self._ask(must=True)

    async def _ask(self, must: bool) -> bool:
        async with guarded(BULK_DEADLINE_S):
            asked = {
                "asked_per_minute": self._per_minute,
                "burst_share": BURST_SHARE,
                "reserved_share": self._reserved_share,
                "must": must,
            }
            return bool(await self._spend.number(keys={"budget": CALL_BUDGET}, args=asked))
