"""How many calls may still be made to Dodo this minute. Knows a clock; makes no call."""

from typing import Protocol

from billing.clock import Clock, now_ms

PER_MINUTE = 240
"""Dodo's default tier."""
MINUTE_MS = 60_000
BURST_SHARE = 6
"""A sixth of a minute's calls may come at once: 40 of 240, Dodo's own burst limit."""


class Budget(Protocol):
    """Whoever can wait asks here before every call to Dodo."""

    async def take(self) -> bool:
        """Spend one call, if there is one."""
        ...


class CallBudget:
    """At most ``per_minute`` calls of this process in any minute, a burst included. One owner, no lock."""

    def __init__(self, per_minute: int, clock: Clock = now_ms) -> None:
        assert per_minute >= 1, "a pump that may not call sends nothing"
        burst = max(1, per_minute // BURST_SHARE)
        self._clock = clock
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
        return True


class BothBudgets:
    """A share of a larger budget: a call is made only where both have one."""

    def __init__(self, own: Budget, shared: Budget) -> None:
        self._own, self._shared = own, shared

    async def take(self) -> bool:
        return await self._own.take() and await self._shared.take()
