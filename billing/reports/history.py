"""What a tenant used: its records, newest first, and their sums, from the live stream and the archive together.

A stream is shared by all tenants of a shard: entries of the others are skipped.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from redis.asyncio import Redis

from billing.archive.archive_cursor import archive_url
from billing.ledger.journal import Entry, Stream, order
from billing.money import Nanos
from billing.store.keys import ALL_SHARDS, Shard, shard_for
from billing.usage import TenantId, UsageRecord

if TYPE_CHECKING:
    from billing.archive.files import Archive

GroupBy = Literal["model", "day"]

READ = 1_000
END = f"{2**63}-0"
"""A stream id after every entry."""
MAX_SCANNED = 20_000
"""Entries that are read for one page: it may be short, or empty, with a cursor to go on from."""


@dataclass(frozen=True, slots=True)
class Page:
    """Records, newest first, and where the next page starts; empty at the end."""

    records: tuple[UsageRecord, ...]
    next_cursor: str = ""


@dataclass(frozen=True, slots=True)
class Total:
    """Sums of records: of one group, a model or a day in UTC (``2026-11-23``), or of everything."""

    group: str = ""
    records: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    compute_ms: int = 0
    list_nanos: Nanos = Nanos(0)
    charged_nanos: Nanos = Nanos(0)
    overage_nanos: Nanos = Nanos(0)

    def plus(self, record: UsageRecord) -> "Total":
        usage = record.usage
        return replace(
            self,
            records=self.records + 1,
            requests=self.requests + usage.requests,
            prompt_tokens=self.prompt_tokens + usage.prompt_tokens,
            cached_tokens=self.cached_tokens + usage.cached_tokens,
            completion_tokens=self.completion_tokens + usage.completion_tokens,
            compute_ms=self.compute_ms + usage.compute_ms,
            list_nanos=Nanos(self.list_nanos + record.list_nanos),
            charged_nanos=Nanos(self.charged_nanos + record.charged_nanos),
            overage_nanos=Nanos(self.overage_nanos + record.overage_nanos),
        )


async def records(redis: Redis, tenant: TenantId, cursor: str = "", limit: int = 100) -> Page:
    """One page of a tenant's records. ``cursor`` is empty for the newest, then the last page's ``next_cursor``.

    Raises:
        ValueError: the cursor is none of ours.
    """
    stream, found, scanned = Stream(redis), list[UsageRecord](), 0
    before = _checked(cursor) if cursor else END
    while scanned < MAX_SCANNED:
        entries = await stream.newest(tenant, f"({before}", READ)
        for entry in entries:
            if entry.tenant == tenant and entry.is_usage:
                found.append(entry.record())
                if len(found) == limit:
                    return Page(tuple(found), entry.id)
        before = entries[-1].id if entries else before
        if len(entries) < READ:
            return await _archived(redis, tenant, found, before, limit)
        scanned += len(entries)
    return Page(tuple(found), before)


async def _archived(redis: Redis, tenant: TenantId, found: list[UsageRecord], before: str, limit: int) -> Page:
    """The rest of a page whose newer part the stream had."""
    archive = await archive_of(redis)
    if archive is None:
        return Page(tuple(found))
    missing = limit - len(found)
    older = await asyncio.to_thread(archive.newest_records, shard_for(tenant), tenant, before, missing)
    page = (*found, *(entry.record() for entry in older))
    return Page(page, older[-1].id if len(older) == missing else "")


async def archive_of(redis: Redis) -> "Archive | None":
    """Where entries go that have left the stream.

    Raises:
        ArchiveUnavailable: there is one that cannot be reached from here.
    """
    url = await archive_url(redis)
    if not url:
        return None
    from billing.archive.files import Archive

    return await asyncio.to_thread(Archive, url)


async def totals(
    redis: Redis, tenant: TenantId, start_ms: int, end_ms: int, group_by: GroupBy | None = None
) -> list[Total]:
    """Sums of the records settled from ``start_ms`` until before ``end_ms``, in order of their groups."""
    groups: dict[str, Total] = {}
    async for entry in _between(redis, shard_for(tenant), tenant, start_ms, end_ms):
        record = entry.record()
        name = _group(record, group_by)
        groups[name] = groups.get(name, Total(name)).plus(record)
    return [groups[name] for name in sorted(groups)]


async def of_all_tenants(redis: Redis, start_ms: int, end_ms: int) -> AsyncIterator[UsageRecord]:
    """All tenants' records settled from ``start_ms`` until before ``end_ms``, shard by shard."""
    for shard in ALL_SHARDS:
        async for entry in _between(redis, shard, None, start_ms, end_ms):
            yield entry.record()


async def journal_until(redis: Redis, shard: Shard, end_ms: int) -> AsyncIterator[Entry]:
    """Every entry of a shard that was written before then, movements of credit included, the oldest first."""
    async for entry in _entries(redis, shard, None, 0, end_ms):
        yield entry


async def _between(
    redis: Redis, shard: Shard, tenant: TenantId | None, start_ms: int, end_ms: int
) -> AsyncIterator[Entry]:
    async for entry in _entries(redis, shard, tenant, start_ms, end_ms):
        if entry.is_usage:
            yield entry


async def _entries(
    redis: Redis, shard: Shard, tenant: TenantId | None, start_ms: int, end_ms: int
) -> AsyncIterator[Entry]:
    """Archived entries first, then those of the stream behind them: what is in both is taken once."""
    if end_ms <= start_ms:
        return
    start, end = f"{max(start_ms, 0)}-0", f"({end_ms}-0"
    if archive := await archive_of(redis):
        last = await asyncio.to_thread(archive.last, shard)
        for entry in await asyncio.to_thread(archive.read, shard, start_ms, end_ms, tenant):
            if order(entry.id) <= order(last):
                yield entry
        if order(last) >= order(start):
            start = f"({last}"
    async for entry in _live(Stream(redis), shard, tenant, start, end):
        yield entry


async def _live(stream: Stream, shard: Shard, tenant: TenantId | None, start: str, end: str) -> AsyncIterator[Entry]:
    while True:
        entries = await stream.within(shard, start, end, READ)
        for entry in entries:
            if tenant in (None, entry.tenant):
                yield entry
        if len(entries) < READ:
            return
        start = f"({entries[-1].id}"


def _group(record: UsageRecord, group_by: GroupBy | None) -> str:
    if group_by == "model":
        return record.adapter.partition("@")[0]
    if group_by == "day":
        return datetime.fromtimestamp(record.occurred_at_ms // 1_000, UTC).strftime("%Y-%m-%d")
    return ""


def _checked(cursor: str) -> str:
    ms, dash, number = cursor.partition("-")
    is_id = dash and all(part.isascii() and part.isdigit() and len(part) <= 19 for part in (ms, number))
    if not is_id:
        raise ValueError(f"{cursor!r} is no cursor: use the `next_cursor` of the page before")
    return cursor
