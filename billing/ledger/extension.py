"""Extends one running request's hold, and says whether it pays for what was generated.

An extension is asked for while what is held lasts, so that nothing waits for the store unless the credit runs short.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace

from billing.errors import BillingError
from billing.ledger.account import Hold
from billing.ledger.codec import max_cost
from billing.ledger.errors import CreditOnHold, InsufficientCredits, SpendCapReached, UnknownHold
from billing.ledger.ledger import Ledger
from billing.money import Nanos, divide_up
from billing.store.errors import StoreUnavailable
from billing.usage import Usage

RETRY_S = 0.25
"""The pause after an extension that did not bring all: others may settle while what is held lasts."""
STEPS_AHEAD = 2
"""An extension is asked for when less than one part in so many of a step is left."""

Start = Callable[[Coroutine[None, None, None]], "asyncio.Task[None]"]


class GrowingHold:
    """What one request may cost by now."""

    def __init__(self, ledger: Ledger, hold: Hold, start: Start) -> None:
        """``start`` runs an extension that outlives the wait for it."""
        request = hold.request
        step = Usage(completion_tokens=request.step_tokens, requests=0, compute_ms=request.step_compute_ms)
        self._ledger, self._request, self._start = ledger, request, start
        self._step = request.price.charge(step)
        self._reserve = Nanos(divide_up(self._step, STEPS_AHEAD))
        self._ceiling = max_cost(replace(request, max_tokens=hold.max_tokens))
        self._is_covered = hold.covered_by_requests
        self._attempt: asyncio.Task[None] | None = None
        self._next_attempt_at = 0.0
        self.held_nanos = hold.held_nanos
        self.refusal: BillingError | None = None
        """Why the last extension brought nothing."""

    def pays(self, cost: Nanos) -> bool:
        """Whether the hold pays for so much. Asks for more, without waiting, when it soon would not."""
        if self._is_covered:
            return True
        if min(cost + self._reserve, self._ceiling) > self.held_nanos:
            self._reach_beyond(cost)
        return cost <= self.held_nanos

    async def grow(self, cost: Nanos) -> bool:
        """Wait for an extension to so much, once more where one on its way does not bring it."""
        if cost > self._ceiling:
            return False
        if self._attempt is not None:
            await asyncio.wait({self._attempt})
        if cost > self.held_nanos:
            self._attempt = self._start(self._extend(cost))
            await asyncio.wait({self._attempt})
        return cost <= self.held_nanos

    def _reach_beyond(self, cost: Nanos) -> None:
        is_on_its_way = self._attempt is not None and not self._attempt.done()
        if not is_on_its_way and asyncio.get_running_loop().time() >= self._next_attempt_at:
            self._attempt = self._start(self._extend(cost))

    async def _extend(self, cost: Nanos) -> None:
        total = Nanos(min(cost + self._reserve + self._step, self._ceiling))
        try:
            self.held_nanos = max(self.held_nanos, await self._ledger.extend(self._request, total, cost))
            self.refusal = None
        except (InsufficientCredits, CreditOnHold, SpendCapReached, StoreUnavailable, UnknownHold) as error:
            self.refusal = error
        if self.held_nanos < total:
            self._next_attempt_at = asyncio.get_running_loop().time() + RETRY_S
