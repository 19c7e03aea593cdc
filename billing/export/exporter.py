"""The exporter: usage records folded, sealed, sent to Dodo, acknowledged. Every step is repeatable.

Killed between any two steps, or run twice at once, it loses nothing and doubles nothing: a sealed event keeps its id
and quantities until Dodo has it, and Dodo counts an id once.

Each entry's digest is checked before it is sealed. One that is not as it was written is withheld: nothing of it is
sealed or sent, an error and a notice name it, and everything else goes on, its tenant's other records too. It is
checked again with each flush, and sealed in a window of its own once it is put right. An entry that is as it was
written and that this version cannot read stops its shard, until a version comes that can.
"""

import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from redis.asyncio import Redis

from billing.clock import Clock, now_ms
from billing.dodo.call_budget import PER_MINUTE, Budget, CallBudget
from billing.dodo.client import Dodo
from billing.dodo.errors import DodoRefused, DodoUnavailable
from billing.export.checking import Withheld, check_entries
from billing.export.events import CHARGE, Destination, SealedEvent, fold
from billing.export.outbox import ExporterState, Outbox, Unreadable
from billing.export.sending import BudgetSpent, Sender, Tally
from billing.ledger.journal import Entry, Stream, UnreadableEntry
from billing.notices.log import Notices
from billing.notices.notice import Notice, NoticeKind
from billing.store.errors import StoreUnavailable
from billing.store.keys import Shard, shard_for
from billing.sweep import FailingItem, Sweep
from billing.tenants.directory import Tenants
from billing.tenants.errors import UnknownTenant
from billing.usage import TenantId

WINDOW_ENTRIES = 1_000
"""Entries of one shard in one window, at most."""
LOCKED_OUT = (401, 403, 404)
"""Dodo refuses every customer's events so: wrong key, or wrong address."""

BACKOFF_MS, MAX_BACKOFF_MS = 1_000, 60_000
LONG_OUTAGE_MS = 10 * 60_000
STARVED_MS = 5 * 60_000
"""An export that got no call for so long is starved: other calls use up what all share."""
WIDE_WINDOW_MS = 15 * 60_000
"""In a long outage windows are sealed this far apart: 96 events a day and tenant, not 1,440."""

log = logging.getLogger("farebox.billing.export.exporter")


@dataclass(frozen=True, slots=True)
class FlushReport:
    """What one flush did, in events."""

    state: str
    sealed: int = 0
    sent: int = 0
    dead_letters: int = 0
    waiting: int = 0
    """Left in the outbox though their tenants have customers."""
    held: int = 0
    """Left in the outbox until their tenants have customers."""
    error: str = ""
    withheld: int = 0
    """Records that are not exported, because they are not as they were written."""


@dataclass(frozen=True, slots=True)
class _Window:
    """Entries of one shard behind its cursor."""

    shard: Shard
    start: str
    entries: list[Entry]

    @property
    def end(self) -> str:
        return self.entries[-1].id

    def __str__(self) -> str:
        return f"shard {self.shard.number}"


class Exporter:
    """Any number of them may run: the cursor lets one of them seal each window."""

    def __init__(
        self,
        redis: Redis,
        dodo: Dodo,
        tenants: Tenants,
        clock: Clock = now_ms,
        budget: Budget | None = None,
        jitter: Callable[[], float] = random.random,
        patience_s: float = 0,
    ) -> None:
        """``patience_s``: how long a flush may wait for its budget of calls before it leaves the rest to the next."""
        self.outbox = Outbox(redis)
        self._stream, self._tenants, self._clock, self._jitter = Stream(redis), tenants, clock, jitter
        self._notices = Notices(redis)
        self._sender = Sender(
            self.outbox, self._notices, dodo, budget or CallBudget(PER_MINUTE, clock), clock, patience_s
        )
        self._state = ExporterState()
        self._failing_since_ms: int | None = None
        self._sealed_at_ms = 0
        self._sealing, self._releasing, self._reading, self._addressing = self.sweeps = tuple(
            Sweep(name, clock, ends_after=None, ends_on=(StoreUnavailable,))
            for name in ("sealing of shards", "release of withheld entries", "reading of events", "lookup of customers")
        )
        self._withheld: list[Withheld] = []

    async def flush_once(self, force: bool = False) -> FlushReport:
        """Seal what is new and send what is sealed. ``force`` does not wait for a backoff to end.

        Raises:
            StoreUnavailable: the store does not answer; nothing is lost, call again.
        """
        tally = Tally()
        sealed = 0
        if force or self._may_seal():
            sealed = await self._seal() + await self._release()
        everything = await self._read()
        ready, destinations, held = await self._sendable(everything)
        if force or self._clock() >= self._state.next_try_ms:
            await self._send(ready, destinations, tally)
        waiting = sum(event.id not in tally.gone for event in ready)
        oldest_ms = min((event.oldest_ms for event in everything if event.id not in tally.gone), default=0)
        await self._show(tally, waiting, held, oldest_ms)
        return FlushReport(
            self._state.state,
            sealed,
            tally.sent,
            tally.dead_letters,
            waiting,
            held,
            self._state.error,
            len(self._withheld),
        )

    def _may_seal(self) -> bool:
        now = self._clock()
        is_long_outage = self._failing_since_ms is not None and now - self._failing_since_ms > LONG_OUTAGE_MS
        return not is_long_outage or now - self._sealed_at_ms >= WIDE_WINDOW_MS

    async def _seal(self) -> int:
        """Seal every shard up to its last entry. How many events that made."""
        self._sealed_at_ms = self._clock()
        sealed, is_more, is_first = 0, True, True
        while is_more:
            cursors = await self.outbox.cursors()
            windows = await self._stream.after(cursors, WINDOW_ENTRIES)
            # A shard that cannot be sealed is tried again with the next flush, not in this one.
            sealed += sum(
                await self._sealing.run(
                    [_Window(shard, cursors[shard.number], found) for shard, found in windows.items()],
                    self._seal_window,
                    str,
                    is_first,
                )
            )
            failing = {one.id for one in self._sealing.failing}
            full = [s for s, entries in windows.items() if len(entries) == WINDOW_ENTRIES]
            is_more, is_first = any(f"shard {shard.number}" not in failing for shard in full), False
        return sealed

    async def _seal_window(self, window: _Window) -> int:
        checked = check_entries(window.entries, await self.outbox.reached({entry.tenant for entry in window.entries}))
        events = self._fold(window.shard, window.start, window.end, checked.sound)
        is_ours = await self.outbox.seal(window.shard, window.start, window.end, checked, events)
        return len(events) if is_ours else 0

    async def _release(self) -> int:
        """Seal withheld entries that are right again; record a notice of the others. How many events that made."""
        self._withheld = []
        return sum(await self._releasing.run(await self.outbox.withheld(), self._release_one, lambda one: one.id, True))

    async def _release_one(self, one: Withheld) -> int:
        shard = shard_for(one.tenant)
        found = [e for e in await self._stream.within(shard, one.id, one.id) if one.behind.precedes(e)]
        try:
            events = self._fold(shard, one.id, one.id, found)
        except UnreadableEntry:
            found = []
        if not found:
            self._withheld.append(one)
            await self._alarm(one)
            return 0
        return len(events) if await self.outbox.release(one, events) else 0

    async def _alarm(self, one: Withheld) -> None:
        log.error("%s, and is not exported: see `farebox reconcile`", one)
        once, facts = f"withheld:{one.tenant}:{one.id}", {"record": one.name}
        await self._notices.record(Notice(NoticeKind.RECORD_WITHHELD, one.tenant, once, self._clock(), facts))

    def _fold(self, shard: Shard, start: str, end: str, entries: list[Entry]) -> list[SealedEvent]:
        records = [entry.record() for entry in entries if entry.is_usage]
        return fold(shard.number, start, end, records, self._clock())

    @property
    def _failing(self) -> tuple[FailingItem, ...]:
        """Shards, withheld records, events and tenants that the last flush could not deal with."""
        return tuple(one for sweep in self.sweeps for one in sweep.failing)

    @property
    def _problem(self) -> str:
        """What keeps records from being sealed; empty where nothing does."""
        for one in self._sealing.failing:
            return f"{one.id} cannot be exported beyond {one.error}"
        for one in self._failing:
            return f"{one.id} is not exported: {one.error}"
        return f"{len(self._withheld)} records are withheld: {self._withheld[0]}" if self._withheld else ""

    async def _read(self) -> list[SealedEvent]:
        """The events in the outbox. What cannot be read stays there, and is named."""

        async def fail(one: Unreadable) -> None:
            raise one.error

        events, unreadable = await self.outbox.read_events()
        await self._reading.run(unreadable, fail, lambda one: f"event {one.id}", is_forced=True)
        return events

    async def _sendable(self, events: list[SealedEvent]) -> tuple[list[SealedEvent], dict[TenantId, Destination], int]:
        """Events to send and where to; and how many are held because their tenants have no Dodo customer."""
        now = self._clock()
        tenants = sorted({event.tenant for event in events})
        found = await self._addressing.run(tenants, self._destination, is_forced=True)
        destinations = dict(one for one in found if one is not None)
        known = [event for event in events if event.tenant in destinations]
        ready = [e for e in known if e.name != CHARGE or not destinations[e.tenant].is_closing(now)]
        return ready, destinations, len(events) - len(known)

    async def _destination(self, tenant_id: TenantId) -> tuple[TenantId, Destination] | None:
        try:
            tenant = await self._tenants.get(tenant_id)
        except UnknownTenant:
            return None
        if not tenant.dodo_customer_id:
            return None
        period = tenant.subscription
        if period is None:
            return tenant_id, Destination(tenant.dodo_customer_id)
        destination = Destination(
            tenant.dodo_customer_id,
            period.period_start_ms,
            period.period_end_ms,
            period.is_last_period,
            period.paused_at_ms or 0,
        )
        return tenant_id, destination

    async def _send(
        self, events: list[SealedEvent], destinations: Mapping[TenantId, Destination], tally: Tally
    ) -> None:
        try:
            await self._sender.send(events, destinations, tally)
        except BudgetSpent:
            log.info("this minute's calls to Dodo are used up: the rest follows")
            self._answered()
            if not tally.calls:
                await self._starve()
        except DodoUnavailable as error:
            self._failed("backing_off", str(error), round(error.retry_after_s * 1_000))
        except DodoRefused as refused:
            if refused.status in LOCKED_OUT:
                log.error("export stopped, nothing is lost: %s. Check DODO_PAYMENTS_API_KEY and the address", refused)
                self._failed("stopped", str(refused), MAX_BACKOFF_MS)
            else:
                self._failed("backing_off", str(refused), 0)
        else:
            self._answered()
            if tally.sent and not self._failing:
                self._state = replace(self._state, last_success_ms=self._clock())
        if tally.calls or not events:
            self._state = replace(self._state, starved_since_ms=0)

    def _answered(self) -> None:
        """Dodo refuses nothing that it was asked for, or was asked for nothing."""
        self._failing_since_ms = None
        self._state = replace(self._state, state="running", failures=0, error="", next_try_ms=0)

    async def _starve(self) -> None:
        """Note a flush that could make no call; raise the alarm where that goes on."""
        now, since_ms = self._clock(), self._state.starved_since_ms or self._clock()
        self._state = replace(self._state, starved_since_ms=since_ms)
        if now - since_ms < STARVED_MS:
            return
        error = f"no call to Dodo was left for {(now - since_ms) // 60_000} minutes: others use up what all share"
        self._state = replace(self._state, state="starved", error=error)
        log.error("export waits, nothing is lost: %s", error)
        facts = {"error": error, "remedy": "raise requests_per_minute if your Dodo account allows more"}
        once = f"starved:{since_ms}"
        await self._notices.record(Notice(NoticeKind.EXPORT_STARVED, TenantId(""), once, now, facts))

    def _failed(self, state: str, error: str, at_least_ms: int) -> None:
        now, failures = self._clock(), self._state.failures + 1
        self._failing_since_ms = self._failing_since_ms or now
        ceiling = min(MAX_BACKOFF_MS, BACKOFF_MS * 2 ** min(failures, 10))
        wait_ms = max(at_least_ms, round(ceiling * self._jitter()))
        self._state = replace(self._state, state=state, failures=failures, error=error, next_try_ms=now + wait_ms)
        log.warning("Dodo: %s; next try in %d ms", error, wait_ms)

    async def _show(self, tally: Tally, waiting: int, held: int, oldest_ms: int) -> None:
        self._state = replace(
            self._state,
            last_flush_ms=self._clock(),
            sent_events=tally.sent,
            waiting_events=waiting,
            held_events=held,
            oldest_waiting_ms=oldest_ms,
            dead_events=(await self.outbox.sums()).dead_events,
            error=self._problem or self._state.error,
        )
        await self.outbox.show(self._state)
