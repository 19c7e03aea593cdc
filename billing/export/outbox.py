"""The export cursor, what was sealed and not yet acknowledged, the dead letters, and what is withheld.

Every change is one atomic step: an event is in the outbox, acknowledged or dead, and the running sums count it
there: sealed = acknowledged + dead + what is in the outbox. What is withheld is not sealed.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TypeVar

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from billing.export.checking import CheckedEntries, Reached, Withheld
from billing.export.events import SealedEvent
from billing.ledger.journal import order
from billing.store.connection import guarded, replicated
from billing.store.guard import BULK_DEADLINE_S
from billing.store.keys import ALL_SHARDS, EXPORTER, Shard, shard_for
from billing.store.scripts import Script
from billing.store.write import write
from billing.usage import TenantId

log = logging.getLogger("farebox.billing.export.outbox")

T = TypeVar("T")

START = "0-0"
"""A cursor before the first entry."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Running sums over all shards, in events and nanos."""

    sealed_entries: int = 0
    sealed_events: int = 0
    sealed_charge: int = 0
    sealed_covered: int = 0
    acked_events: int = 0
    acked_charge: int = 0
    acked_covered: int = 0
    dead_events: int = 0
    dead_charge: int = 0
    dead_covered: int = 0


@dataclass(frozen=True, slots=True)
class Backlog:
    """What is not exported yet, counted at this moment."""

    unsealed_entries: int
    outbox_events: int
    dead_events: int
    withheld_records: int
    """Among the unsealed: entries that are not as they were written."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Something in the outbox that this version cannot read."""

    id: str
    error: Exception


@dataclass(frozen=True, slots=True)
class ExporterState:
    """The exporter's state as it last stored it, for people."""

    state: str = "starting"
    """``starting``, ``running``, ``backing_off``, ``starved`` (no call to Dodo was left for it for minutes) or
    ``stopped`` (Dodo refuses our credentials or address)."""
    last_flush_ms: int = 0
    last_success_ms: int = 0
    """When a flush last ended in which Dodo took events, all that could be sent, and nothing else failed."""
    next_try_ms: int = 0
    failures: int = 0
    """Failed flushes in a row."""
    sent_events: int = 0
    """In the last flush."""
    waiting_events: int = 0
    held_events: int = 0
    """Sealed events of tenants that have no Dodo customer yet."""
    dead_events: int = 0
    oldest_waiting_ms: int = 0
    """When the oldest record was settled of what the last flush left in the outbox; 0 where it left nothing."""
    starved_since_ms: int = 0
    """When the first flush in a row ended that got no call to Dodo; 0 where the last one got one or needed none."""
    error: str = ""

    def waiting_s(self, now_ms: int) -> int:
        """Age of the oldest record that the outbox was left with, in seconds."""
        return max(0, now_ms - self.oldest_waiting_ms) // 1_000 if self.oldest_waiting_ms else 0


class Outbox:
    """Sealed events of all shards."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._seal = Script(redis, "export/seal")
        self._ack = Script(redis, "export/ack")
        self._move_dead = Script(redis, "export/move_dead")
        self._mark = Script(redis, "export/mark")
        self._release = Script(redis, "export/release")

    async def cursors(self) -> dict[int, str]:
        """By shard number, the stream id up to which everything is sealed."""
        async with guarded(BULK_DEADLINE_S):
            pipe = self._redis.pipeline(transaction=False)
            for shard in ALL_SHARDS:
                pipe.hget(shard.cursor, "at")
            found = await pipe.execute()
        return {shard.number: at or START for shard, at in zip(ALL_SHARDS, found, strict=True)}

    async def reached(self, tenants: Iterable[TenantId]) -> dict[TenantId, Reached]:
        """How far each tenant's entries were sealed; tenants without a sealed entry are left out."""
        asked = list(tenants)
        async with guarded(BULK_DEADLINE_S):
            pipe = self._redis.pipeline(transaction=False)
            for tenant in asked:
                pipe.hget(shard_for(tenant).account(tenant), "told")
            found = await pipe.execute()
        return {tenant: Reached.from_text(text) for tenant, text in zip(asked, found, strict=True) if text}

    async def seal(
        self, shard: Shard, start: str, end: str, checked: CheckedEntries, events: Sequence[SealedEvent]
    ) -> bool:
        """Move the cursor from ``start`` to ``end``, keep the events and what is withheld; ``False`` if it stood
        elsewhere.
        """
        async with guarded(BULK_DEADLINE_S):
            sealed = await self._seal.number(
                keys={
                    "cursor": shard.cursor,
                    "outbox": shard.outbox,
                    "withheld": shard.withheld,
                    "accounts": [shard.account(tenant) for tenant in checked.reached],
                },
                args={
                    "expected": start,
                    "after": end,
                    "entries": len(checked.sound),
                    "charge": sum(event.charge_nanos for event in events),
                    "covered": sum(event.covered_nanos for event in events),
                    "reached": [reached.to_text() for reached in checked.reached.values()],
                    "events": _rows(events),
                    "held_back": [(entry.id, entry.to_json()) for entry in checked.withheld],
                },
            )
        return bool(sealed)

    async def withheld(self) -> list[Withheld]:
        """Entries behind the cursor that are withheld, oldest first, without those that cannot be read."""
        async with guarded(BULK_DEADLINE_S):
            pipe = self._redis.pipeline(transaction=False)
            for shard in ALL_SHARDS:
                pipe.hgetall(shard.withheld)
            found = await pipe.execute()
        withheld, unreadable = _read(found, Withheld.from_json)
        _log(unreadable)
        return sorted(withheld, key=lambda one: order(one.id))

    async def release(self, entry: Withheld, events: Sequence[SealedEvent]) -> bool:
        """Seal what was withheld; ``False`` where another exporter has."""
        shard = shard_for(entry.tenant)
        async with guarded(BULK_DEADLINE_S):
            released = await self._release.number(
                keys={"cursor": shard.cursor, "outbox": shard.outbox, "withheld": shard.withheld},
                args={
                    "entry": entry.id,
                    "charge": sum(event.charge_nanos for event in events),
                    "covered": sum(event.covered_nanos for event in events),
                    "events": _rows(events),
                },
            )
        return bool(released)

    async def events(self) -> list[SealedEvent]:
        """Everything sealed and not acknowledged, oldest first, without what cannot be read."""
        events, unreadable = await self.read_events()
        _log(unreadable)
        return events

    async def read_events(self) -> tuple[list[SealedEvent], list[Unreadable]]:
        """Everything sealed and not acknowledged, oldest first; and what of it cannot be read."""
        async with guarded(BULK_DEADLINE_S):
            pipe = self._redis.pipeline(transaction=False)
            for shard in ALL_SHARDS:
                pipe.hgetall(shard.outbox)
            found = await pipe.execute()
        events, unreadable = _read(found, lambda _, text: SealedEvent.from_json(text))
        return sorted(events, key=lambda e: (e.sealed_at_ms, e.id)), unreadable

    async def mark(self, events: Iterable[SealedEvent]) -> None:
        """Store the attempts that these events carry, before the attempt is made."""
        await asyncio.gather(*(self._mark_in(shard, group) for shard, group in _by_shard(events).items()))

    async def secure(self, events: Iterable[SealedEvent]) -> None:
        """Wait until enough replicas have all that is written of these: a failover must not take back what is sent.

        Raises:
            StoreUnavailable: they do not in time; nothing may be sent.
        """
        shards = {shard_for(event.tenant) for event in events}
        await asyncio.gather(*(replicated(self._redis, shard.pulse) for shard in shards))

    async def ack(self, events: Iterable[SealedEvent]) -> int:
        """Acknowledge events that Dodo has. How many this call took out of the outbox; the rest were out before.

        Shards go side by side: the store syncs its log once for all that came meanwhile.
        """
        return sum(await asyncio.gather(*(self._ack_in(shard, group) for shard, group in _by_shard(events).items())))

    async def _mark_in(self, shard: Shard, events: Sequence[SealedEvent]) -> None:
        async with guarded(BULK_DEADLINE_S):
            await self._mark.number(keys={"outbox": shard.outbox}, args={"events": _rows(events)})

    async def _ack_in(self, shard: Shard, events: Sequence[SealedEvent]) -> int:
        rows = [(event.id, event.charge_nanos, event.covered_nanos) for event in events]
        async with guarded(BULK_DEADLINE_S):
            return await self._ack.number(keys={"cursor": shard.cursor, "outbox": shard.outbox}, args={"events": rows})

    async def add_dead_letter(self, event: SealedEvent) -> bool:
        """Move an event that Dodo refuses for good, with the reason it carries, to the dead letters."""
        shard = shard_for(event.tenant)
        return await self._move(event, shard.outbox, shard.dead, 1)

    async def revive(self, event: SealedEvent) -> bool:
        """Send a dead letter again, with the same id and quantities."""
        shard = shard_for(event.tenant)
        return await self._move(event, shard.dead, shard.outbox, -1)

    async def _move(self, event: SealedEvent, come_from: str, go_to: str, sign: int) -> bool:
        async with guarded(BULK_DEADLINE_S):
            moved = await self._move_dead.number(
                keys={"cursor": shard_for(event.tenant).cursor, "from": come_from, "to": go_to},
                args={
                    "id": event.id,
                    "event": event.to_json(),
                    "events": sign,
                    "charge": sign * event.charge_nanos,
                    "covered": sign * event.covered_nanos,
                },
            )
        return bool(moved)

    async def dead(self) -> list[SealedEvent]:
        """All dead letters with their reasons, oldest first, without those that cannot be read."""
        async with guarded(BULK_DEADLINE_S):
            pipe = self._redis.pipeline(transaction=False)
            for shard in ALL_SHARDS:
                pipe.hgetall(shard.dead)
            found = await pipe.execute()
        events, unreadable = _read(found, lambda _, text: SealedEvent.from_json(text))
        _log(unreadable)
        return sorted(events, key=lambda e: (e.sealed_at_ms, e.id))

    async def sums(self) -> Sums:
        async with guarded(BULK_DEADLINE_S):
            pipe = self._redis.pipeline(transaction=False)
            for shard in ALL_SHARDS:
                pipe.hgetall(shard.cursor)
            found = await pipe.execute()
        return Sums(**{f.name: sum(int(shard.get(f.name, 0)) for shard in found) for f in fields(Sums)})

    async def backlog(self) -> Backlog:
        """Counted now, from the store; cheap however long the streams are."""
        async with guarded(BULK_DEADLINE_S):
            pipe = self._redis.pipeline(transaction=False)
            for shard in ALL_SHARDS:
                pipe.xinfo_stream(shard.stream)
                pipe.hget(shard.cursor, "sealed_entries")
                pipe.hlen(shard.outbox)
                pipe.hlen(shard.dead)
                pipe.hlen(shard.withheld)
            found = await pipe.execute(raise_on_error=False)
        unsealed = outbox = dead = withheld = 0
        for info, sealed, in_outbox, in_dead, in_withheld in zip(*(iter(found),) * 5, strict=True):
            added = 0 if isinstance(info, ResponseError) else int(info["entries-added"])
            unsealed += added - int(sealed or 0)
            outbox, dead, withheld = outbox + in_outbox, dead + in_dead, withheld + in_withheld
        return Backlog(unsealed, outbox, dead, withheld)

    async def show(self, state: ExporterState) -> None:
        """Store the exporter's state, for the admin API."""
        async with guarded(BULK_DEADLINE_S):
            await write(self._redis, ("HSET", EXPORTER, *(word for pair in asdict(state).items() for word in pair)))

    async def shown(self) -> ExporterState:
        async with guarded(BULK_DEADLINE_S):
            raw = await self._redis.hgetall(EXPORTER)
        known = {f.name: f.type for f in fields(ExporterState)}
        values = {name: value if known[name] is str else int(value) for name, value in raw.items() if name in known}
        return ExporterState(**values)  # type: ignore[arg-type]


def _read(shards: Iterable[Mapping[str, str]], read: Callable[[str, str], T]) -> tuple[list[T], list[Unreadable]]:
    found: list[T] = []
    unreadable: list[Unreadable] = []
    for id_, text in (row for shard in shards for row in shard.items()):
        try:
            found.append(read(id_, text))
        except (ValueError, KeyError, TypeError) as error:
            unreadable.append(Unreadable(id_, error))
    return found, unreadable


def _log(unreadable: Iterable[Unreadable]) -> None:
    for one in unreadable:
        log.error("%s of the outbox cannot be read, and stays: %s", one.id, one.error)


def _rows(events: Iterable[SealedEvent]) -> list[tuple[str, str]]:
    return [(event.id, event.to_json()) for event in events]


def _by_shard(events: Iterable[SealedEvent]) -> dict[Shard, list[SealedEvent]]:
    groups: dict[Shard, list[SealedEvent]] = defaultdict(list)
    for event in events:
        groups[shard_for(TenantId(event.tenant))].append(event)
    return groups
