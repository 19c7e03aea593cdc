"""Live totals per tenant, rebuilt from the stream: for dashboards, never for bills."""

import asyncio
from collections.abc import Mapping

from redis.asyncio import Redis

from billing.abuse.rules import Habits
from billing.ledger.journal import Entry, Stream, UnreadableEntry
from billing.reports.history import Total
from billing.usage import TenantId

READ = 1_000


class LiveCounters:
    """Follows every shard's stream in memory.

    It begins at what the store still has: entries that were archived and trimmed before are not counted, so a
    restart may begin lower. ``billing.reports.history`` adds up stream and archive.
    """

    def __init__(self, redis: Redis) -> None:
        self._stream = Stream(redis)
        self._positions: dict[int, str] = {}
        self._by_tenant: dict[TenantId, Total] = {}
        self._seen: dict[TenantId, int] = {}
        self._reading = asyncio.Lock()
        self.habits = Habits()
        self.unreadable = 0

    @property
    def by_tenant(self) -> Mapping[TenantId, Total]:
        return dict(self._by_tenant)

    def unseen(self) -> dict[TenantId, int]:
        """Tenants with records that were read since they were last noted as seen, and how many were read in all."""
        return {name: t.records for name, t in self._by_tenant.items() if t.records != self._seen.get(name)}

    def note_seen(self, tenant: TenantId, records: int) -> None:
        """The first so many records of a tenant were dealt with."""
        self._seen[tenant] = records

    async def catch_up(self) -> int:
        """Read on to the end of every stream, one call at a time. How many entries were new.

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
        self.habits.note(record)
        self._by_tenant[entry.tenant] = self._by_tenant.get(entry.tenant, Total()).plus(record)
