"""Send sealed events to Dodo and acknowledge them, in as few calls as the events that Dodo refuses allow.

Decides what each refusal means for an event. When to try again is the exporter's decision.

| Dodo refuses | it means | what follows |
|---|---|---|
| a call with several events | one of them is at fault, or our key or address | half as many are sent |
| one event, with a status of ``POISON`` | that event is at fault | a dead letter |
| one event, with any other status, again after it took another's | its customer is at fault | a dead letter |
| single events of several customers, and nothing is taken | our key or address is wrong | the send ends |
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from billing.clock import Clock
from billing.dodo.call_budget import Budget
from billing.dodo.client import Dodo
from billing.dodo.errors import DodoRefused, DodoUnavailable
from billing.export.events import Destination, SealedEvent
from billing.export.outbox import Outbox
from billing.notices.log import Notices
from billing.notices.notice import Notice, NoticeKind
from billing.usage import TenantId

MAX_EVENTS = 1_000
"""Dodo's limit of one call."""
PROBE_EVENTS = 8
"""After a failure so few are tried first: only attempted events may have to be looked up later."""
DOUBTFUL_MS = 60 * 60_000
"""How long Dodo is relied on to remember an id. After that it is asked before the event is sent again."""
BUDGET_WAIT_S = 0.25
DAY_MS = 24 * 60 * 60_000
POISON = (400, 413, 422)
"""Statuses by which Dodo refuses the content of an event."""
MAX_REFUSED = 3
"""So many customers' events, refused one after the other, end a send. The next one begins with other customers."""


log = logging.getLogger("farebox.billing.export.sending")


class BudgetSpent(Exception):
    """This minute's calls are used up; the rest waits for the next flush."""


@dataclass
class Tally:
    """What became of events so far, also when a send ended in an error."""

    sent: int = 0
    dead_letters: int = 0
    gone: set[str] = field(default_factory=set)
    """Ids of events that are in the outbox no more."""
    calls: int = 0
    """Calls that the budget had."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A tenant's event was refused alone, with a status that may be the event's fault or ours."""

    status: int
    taken: int
    """Calls that Dodo had taken events of by then. More since then show that it refuses this tenant, not us."""


class Sender:
    """``patience_s``: how long one call of ``send`` may wait for its budget, so that a backlog drains steadily."""

    def __init__(
        self, outbox: Outbox, notices: Notices, dodo: Dodo, budget: Budget, clock: Clock, patience_s: float = 0
    ) -> None:
        self._outbox, self._notices, self._dodo, self._budget, self._clock = outbox, notices, dodo, budget, clock
        self._patience_s, self._deadline_s = patience_s, 0.0
        self._size = MAX_EVENTS
        """Events in the next call: halved at each refusal until the one at fault is alone, doubled after. Kept
        from flush to flush, so that poison is found however few calls a flush may make."""
        self._taken = 0
        """Calls that Dodo took events of."""
        self._refused: dict[TenantId, _Refusal] = {}
        self._known: dict[TenantId, tuple[SealedEvent, Destination]] = {}
        """Some events that Dodo took lately, of different tenants, and where they went."""

    async def send(
        self, events: Sequence[SealedEvent], destinations: Mapping[TenantId, Destination], tally: Tally
    ) -> None:
        """Send all of these, oldest first; every tenant among them has a destination.

        Raises:
            BudgetSpent, DodoUnavailable, DodoRefused: what was not acknowledged stays in the outbox.
        """
        self._deadline_s = time.monotonic() + self._patience_s
        waiting = sorted(events, key=lambda event: event.tenant in self._refused)
        in_a_row = 0
        while waiting:
            batch, waiting = waiting[: self._size], waiting[self._size :]
            try:
                await self._ingest(batch, destinations, tally)
            except DodoUnavailable:
                self._size = PROBE_EVENTS
                raise
            except DodoRefused as refused:
                if len(batch) > 1:
                    self._size = len(batch) // 2
                    waiting = batch + waiting
                elif self._is_at_fault(batch[0], refused):
                    await self._add_dead_letter(batch[0], refused, tally)
                else:
                    in_a_row += 1
                    self._refused[batch[0].tenant] = _Refusal(refused.status, self._taken)
                    waiting = self._put_behind(batch[0], waiting)
                    if in_a_row == MAX_REFUSED or self._is_refused(waiting[0].tenant):
                        if not await self._takes_others(tally):
                            self._end_round({event.tenant for event in waiting})
                            raise
                        in_a_row = 0
            else:
                in_a_row = 0
                self._size = min(MAX_EVENTS, self._size * 2)

    def _is_at_fault(self, event: SealedEvent, refused: DodoRefused) -> bool:
        """Is it this event, or its customer, that Dodo refuses, and not us?

        So where it refused this tenant's before in the same way, and has taken another's.
        """
        if refused.status in POISON:
            return True
        known = self._refused.get(event.tenant)
        return known is not None and known.status == refused.status and known.taken < self._taken

    def _is_refused(self, tenant: TenantId) -> bool:
        """Was its event refused since Dodo last took any?"""
        known = self._refused.get(tenant)
        return known is not None and known.taken == self._taken

    def _put_behind(self, event: SealedEvent, waiting: Sequence[SealedEvent]) -> list[SealedEvent]:
        """Let all other tenants' events come first, so that it shows whether Dodo takes those."""
        others = [one for one in waiting if one.tenant != event.tenant]
        others.sort(key=lambda one: self._is_refused(one.tenant))
        return [*others, event, *(one for one in waiting if one.tenant == event.tenant)]

    async def _takes_others(self, tally: Tally) -> bool:
        """Does Dodo take an event again that it took before, of a tenant whose events it does not refuse?

        It ignores an id that it knows, so that nothing is counted twice.
        """
        for tenant, (event, destination) in self._known.items():
            if not self._is_refused(tenant) and not self._is_doubtful(event):
                await self._spend(tally)
                try:
                    await self._dodo.ingest([event.to_event(destination, self._clock())])
                except DodoRefused:
                    return False
                self._taken += 1
                return True
        return False

    def _end_round(self, tenants: Iterable[TenantId]) -> None:
        """Once every tenant's event was refused, and none taken, the next send begins with the first again."""
        if all(self._is_refused(tenant) for tenant in tenants):
            self._refused = {tenant: one for tenant, one in self._refused.items() if one.taken < self._taken}

    async def _ingest(
        self, batch: Sequence[SealedEvent], destinations: Mapping[TenantId, Destination], tally: Tally
    ) -> None:
        """An attempt is stored before the call, and deleted where Dodo answers that it took nothing."""
        batch = await self._without_known(batch, tally)
        if not batch:
            return
        await self._spend(tally)
        await self._mark(batch)
        await self._outbox.secure(batch)
        now = self._clock()
        try:
            await self._dodo.ingest([event.to_event(destinations[event.tenant], now) for event in batch])
        except DodoRefused:
            await self._outbox.mark(batch)
            raise
        self._taken += 1
        for event in batch:
            self._refused.pop(event.tenant, None)
        latest = {e.tenant: (e.attempted(e.first_attempt_ms or now), destinations[e.tenant]) for e in batch}
        self._known = dict([*(self._known | latest).items()][-MAX_REFUSED - 1 :])
        await self._ack(batch, tally)

    async def _ack(self, batch: Sequence[SealedEvent], tally: Tally) -> None:
        tally.sent += await self._outbox.ack(batch)
        tally.gone |= {event.id for event in batch}

    async def _add_dead_letter(self, event: SealedEvent, refused: DodoRefused, tally: Tally) -> None:
        reason = str(refused)
        await self._notices.record(_notice(event, refused, self._clock()))
        if await self._outbox.add_dead_letter(replace(event, reason=reason)):
            tally.dead_letters += 1
            log.error("%s has a dead letter, %s: `farebox dodo revive %s`", event.tenant, reason, event.id)
        tally.gone.add(event.id)

    async def _without_known(self, batch: Sequence[SealedEvent], tally: Tally) -> list[SealedEvent]:
        """Leave out, and acknowledge, events that an attempt too long ago turns out to have delivered."""
        unknown: list[SealedEvent] = []
        for event in batch:
            if self._is_doubtful(event):
                await self._spend(tally)
                if await self._dodo.has_event(event.id):
                    await self._ack([event], tally)
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

    async def _spend(self, tally: Tally) -> None:
        while not await self._budget.take():
            if time.monotonic() >= self._deadline_s:
                raise BudgetSpent
            await asyncio.sleep(BUDGET_WAIT_S)
        tally.calls += 1


def _notice(event: SealedEvent, refused: DodoRefused, now_ms: int) -> Notice:
    """One notice a day of a tenant's events that Dodo refuses with one status, however many they are."""
    once = f"dead_letter:{event.tenant}:{refused.status}:{now_ms // DAY_MS}"
    remedy = f"`farebox dodo dead` shows all of them, `farebox dodo revive {event.id}` sends this one again"
    facts = {"event": event.id, "reason": str(refused), "remedy": remedy}
    return Notice(NoticeKind.EVENT_REFUSED, event.tenant, once, now_ms, facts)
