"""Live counters per tenant, rebuilt from the stream: for dashboards, never for bills."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace

from redis.asyncio import Redis

from billing.abuse.rules import Habits
from billing.ledger.journal import Entry, Stream, UnreadableEntry
from billing.usage import TenantId

READ = 1_000


@dataclass(frozen=True, slots=True)
class Counters:
    """Sums over a tenant's records that were read."""

    records: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    compute_ms: int = 0
    charged_nanos: int = 0
    overage_nanos: int = 0


class LiveCounters:
    """Follows every shard's stream in memory. One owner.

    It begins at what the store still has: entries that were archived and trimmed before are not counted, so a
    restart may begin lower. ``billing.reports.history`` adds up stream and archive.
    """

    def __init__(self, redis: Redis) -> None:
        self._stream = Stream(redis)
        self._positions: dict[int, str] = {}
        self._by_tenant: dict[TenantId, Counters] = {}
        self._reading = asyncio.Lock()
        self._active: set[TenantId] = set()
        self.habits = Habits()
        self.unreadable = 0

    @property
    def by_tenant(self) -> Mapping[TenantId, Counters]:
        return dict(self._by_tenant)

    def take_active(self) -> frozenset[TenantId]:
        """Tenants with records that were read since the last call."""
        active, self._active = frozenset(self._active), set()
        return active

    async def catch_up(self) -> int:
        """Read on to the end of every stream. How many entries were new; who comes meanwhile waits for its turn.

        Entries that are trimmed before they are read are missed: trimming only follows export and archive.
        """
        async with self._reading:
            return await self._read_on()

    async def _read_on(self) -> int:
        read = 0
        while windows := await self._stream.after(self._positions, READ):
            for shard, entries in windows.items():
                for entry in entries:
                    self._add(entry)
                self._positions[shard.number] = entries[-1].id
                read += len(entries)
        return read

    def _add(self, entry: Entry) -> None:
        if not entry.is_usage:
            return
        try:
            record = entry.record()
        except UnreadableEntry:
            self.unreadable += 1
            return
        self._active.add(entry.tenant)
        self.habits.note(record)
        was, usage = self._by_tenant.get(entry.tenant, Counters()), record.usage
        self._by_tenant[entry.tenant] = replace(
            was,
            records=was.records + 1,
            requests=was.requests + usage.requests,
            prompt_tokens=was.prompt_tokens + usage.prompt_tokens,
            cached_tokens=was.cached_tokens + usage.cached_tokens,
            completion_tokens=was.completion_tokens + usage.completion_tokens,
            compute_ms=was.compute_ms + usage.compute_ms,
            charged_nanos=was.charged_nanos + record.charged_nanos,
            overage_nanos=was.overage_nanos + record.overage_nanos,
        )
