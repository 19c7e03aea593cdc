"""Sends sealed events to Dodo and acknowledges them: one batch, in as few calls as its poison allows.

Knows what each refusal means for an event; knows neither when to try again nor how events are made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from billing.clock import Clock
from billing.dodo.budget import CallBudget
from billing.dodo.client import Dodo
from billing.errors import DodoRefused, DodoUnavailable
from billing.export.events import Destination, SealedEvent
from billing.store.outbox import Outbox
from billing.usage import TenantId

MAX_EVENTS = 1_000
"""Dodo's limit of one call."""
PROBE_EVENTS = 8
"""After a failure so few are tried first: only what was attempted must ever be looked up."""
DOUBTFUL_MS = 60 * 60_000
"""How long we count on Dodo to remember an id. After that we ask before we send it again."""
POISON = (400, 413, 422)
"""Dodo refuses the content: halve until the event at fault is alone."""


class BudgetSpent(Exception):
    """This minute's calls are used up; the rest waits for the next flush."""


@dataclass
class Tally:
    """What became of events so far, also when a send ended in an error."""

    sent: int = 0
    buried: int = 0


class Sender:
    def __init__(self, outbox: Outbox, dodo: Dodo, budget: CallBudget, clock: Clock) -> None:
        self._outbox, self._dodo, self._budget, self._clock = outbox, dodo, budget, clock
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
        waiting = list(events)
        while waiting:
            batch = await self._marked(await self._without_known(waiting[: self._size], tally))
            rest = waiting[self._size :]
            try:
                await self._ingest(batch, destinations, tally)
            except DodoUnavailable:
                self._size = PROBE_EVENTS
                raise
            except DodoRefused as refused:
                if refused.status not in POISON:
                    raise
                if len(batch) == 1:
                    tally.buried += await self._outbox.bury(replace(batch[0], reason=str(refused)))
                else:
                    self._size = len(batch) // 2
                    rest = batch + rest
            else:
                self._size = min(MAX_EVENTS, self._size * 2)
            waiting = rest

    async def _ingest(
        self, batch: Sequence[SealedEvent], destinations: Mapping[TenantId, Destination], tally: Tally
    ) -> None:
        if not batch:
            return
        self._spend()
        now = self._clock()
        await self._dodo.ingest([event.to_event(destinations[event.tenant], now) for event in batch])
        tally.sent += await self._outbox.ack(batch)

    async def _without_known(self, batch: Sequence[SealedEvent], tally: Tally) -> list[SealedEvent]:
        """Leave out, and acknowledge, events that an attempt too long ago turns out to have delivered."""
        unknown: list[SealedEvent] = []
        for event in batch:
            if event.first_attempt_ms is None or self._clock() - event.first_attempt_ms < DOUBTFUL_MS:
                unknown.append(event)
                continue
            self._spend()
            if await self._dodo.has_event(event.id):
                tally.sent += await self._outbox.ack([event])
            else:
                unknown.append(event.attempted(None))
        return unknown

    async def _marked(self, batch: Sequence[SealedEvent]) -> list[SealedEvent]:
        """Write down, before the call, that these events are attempted now."""
        new = [event.attempted(self._clock()) for event in batch if event.first_attempt_ms is None]
        await self._outbox.mark(new)
        known = {event.id: event for event in new}
        return [known.get(event.id, event) for event in batch]

    def _spend(self) -> None:
        if not self._budget.take():
            raise BudgetSpent
