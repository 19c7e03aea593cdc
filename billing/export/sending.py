"""Send sealed events to Dodo and acknowledge them, in as few calls as the events that Dodo refuses allow.

Decides what each refusal means for an event. When to try again is the exporter's decision.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from billing.clock import Clock
from billing.dodo.call_budget import Budget
from billing.dodo.client import Dodo
from billing.dodo.errors import DodoRefused, DodoUnavailable
from billing.export.events import Destination, SealedEvent
from billing.export.outbox import Outbox
from billing.usage import TenantId

MAX_EVENTS = 1_000
"""Dodo's limit of one call."""
PROBE_EVENTS = 8
"""After a failure so few are tried first: only attempted events may have to be looked up later."""
DOUBTFUL_MS = 60 * 60_000
"""How long Dodo is relied on to remember an id. After that it is asked before the event is sent again."""
BUDGET_WAIT_S = 0.25
POISON = (400, 413, 422)
"""Statuses by which Dodo refuses the content: the batch is halved until the event at fault is alone."""


log = logging.getLogger("farebox.billing.export.sending")


class BudgetSpent(Exception):
    """This minute's calls are used up; the rest waits for the next flush."""


@dataclass
class Tally:
    """What became of events so far, also when a send ended in an error."""

    sent: int = 0
    dead_letters: int = 0


class Sender:
    """``patience_s``: how long one call of ``send`` may wait for its budget, so that a backlog drains steadily."""

    def __init__(self, outbox: Outbox, dodo: Dodo, budget: Budget, clock: Clock, patience_s: float = 0) -> None:
        self._outbox, self._dodo, self._budget, self._clock = outbox, dodo, budget, clock
        self._patience_s, self._deadline_s = patience_s, 0.0
        self._size = MAX_EVENTS
        """Events in the next call: halved at each refusal until the one at fault is alone, doubled after. Kept
        from flush to flush, so that poison is found however few calls a flush may make."""

    async def send(
        self, events: Sequence[SealedEvent], destinations: Mapping[TenantId, Destination], tally: Tally
    ) -> None:
        """Send all of these, oldest first; every tenant among them has a destination.

        Raises:
            BudgetSpent, DodoUnavailable, DodoRefused: what was not acknowledged stays in the outbox.
        """
        self._deadline_s = time.monotonic() + self._patience_s
        waiting = list(events)
        while waiting:
            batch = await self._without_known(waiting[: self._size], tally)
            rest = waiting[self._size :]
            try:
                await self._ingest(batch, destinations, tally)
            except DodoUnavailable:
                self._size = PROBE_EVENTS
                raise
            except DodoRefused as refused:
                if refused.status not in POISON:
                    self._size = PROBE_EVENTS
                    raise
                if len(batch) == 1:
                    await self._add_dead_letter(batch[0], str(refused), tally)
                else:
                    self._size = len(batch) // 2
                    rest = batch + rest
            else:
                self._size = min(MAX_EVENTS, self._size * 2)
            waiting = rest

    async def _ingest(
        self, batch: Sequence[SealedEvent], destinations: Mapping[TenantId, Destination], tally: Tally
    ) -> None:
        """An attempt is stored before the call, and deleted where Dodo answers that it took nothing."""
        if not batch:
            return
        await self._spend()
        await self._mark(batch)
        await self._outbox.secure(batch)
        now = self._clock()
        try:
            await self._dodo.ingest([event.to_event(destinations[event.tenant], now) for event in batch])
        except DodoRefused:
            await self._outbox.mark(batch)
            raise
        tally.sent += await self._outbox.ack(batch)

    async def _add_dead_letter(self, event: SealedEvent, reason: str, tally: Tally) -> None:
        if await self._outbox.add_dead_letter(replace(event, reason=reason)):
            tally.dead_letters += 1
            log.error("%s has a dead letter, %s: `farebox dodo revive %s`", event.tenant, reason, event.id)

    async def _without_known(self, batch: Sequence[SealedEvent], tally: Tally) -> list[SealedEvent]:
        """Leave out, and acknowledge, events that an attempt too long ago turns out to have delivered."""
        unknown: list[SealedEvent] = []
        for event in batch:
            if self._is_doubtful(event):
                await self._spend()
                if await self._dodo.has_event(event.id):
                    tally.sent += await self._outbox.ack([event])
                    continue
            unknown.append(event)
        return unknown

    def _is_doubtful(self, event: SealedEvent) -> bool:
        return event.first_attempt_ms is not None and self._clock() - event.first_attempt_ms >= DOUBTFUL_MS

    async def _mark(self, batch: Sequence[SealedEvent]) -> None:
        """Store that these events are attempted now. What an earlier attempt did is known, or Dodo knows its ids."""
        now = self._clock()
        new = [e.attempted(now) for e in batch if e.first_attempt_ms is None or self._is_doubtful(e)]
        await self._outbox.mark(new)

    async def _spend(self) -> None:
        while not await self._budget.take():
            if time.monotonic() >= self._deadline_s:
                raise BudgetSpent
            await asyncio.sleep(BUDGET_WAIT_S)
