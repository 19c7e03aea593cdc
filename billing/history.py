"""What a tenant used: its records, newest first, and their sums, read from the live stream.

Knows how to page and to add up; the stream is shared by a shard, so others' entries are passed over.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from redis.asyncio import Redis

from billing.money import Nanos
from billing.store.stream import LAST, Entry, Stream
from billing.usage import TenantId, UsageRecord

GroupBy = Literal["model", "day"]

READ = 1_000
MAX_SCANNED = 20_000
"""Entries looked at for one page: a page may come short, or empty, with a cursor to go on from."""


@dataclass(frozen=True, slots=True)
class Page:
    """Records, newest first, and where the next page starts; empty at the end."""

    records: tuple[UsageRecord, ...]
    next_cursor: str = ""


@dataclass(frozen=True, slots=True)
class Total:
    """Sums of one group: a model, a day in UTC (``2026-11-23``) or, ungrouped, everything."""

    group: str
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
    before = f"({_checked(cursor)}" if cursor else LAST
    while scanned < MAX_SCANNED:
        entries = await stream.newest(tenant, before, READ)
        for entry in entries:
            if entry.tenant == tenant and entry.is_usage:
                found.append(entry.record())
                if len(found) == limit:
                    return Page(tuple(found), entry.id)
        if len(entries) < READ:
            return Page(tuple(found))
        scanned += len(entries)
        before = f"({entries[-1].id}"
    return Page(tuple(found), before[1:])


async def totals(
    redis: Redis, tenant: TenantId, start_ms: int, end_ms: int, group_by: GroupBy | None = None
) -> list[Total]:
    """Sums of the records settled from ``start_ms`` until before ``end_ms``, in order of their groups."""
    groups: dict[str, Total] = {}
    async for entry in _between(Stream(redis), tenant, start_ms, end_ms):
        record = entry.record()
        name = _group(record, group_by)
        groups[name] = groups.get(name, Total(name)).plus(record)
    return [groups[name] for name in sorted(groups)]


async def _between(stream: Stream, tenant: TenantId, start_ms: int, end_ms: int) -> AsyncIterator[Entry]:
    if end_ms <= start_ms:
        return
    start, end = f"{max(start_ms, 0)}-0", f"({end_ms}-0"
    while True:
        entries = await stream.of(tenant, start, end, READ)
        for entry in entries:
            if entry.tenant == tenant and entry.is_usage:
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
    if not (dash and ms.isascii() and ms.isdigit() and number.isascii() and number.isdigit() and len(cursor) < 42):
        raise ValueError(f"{cursor!r} is no cursor")
    return cursor
