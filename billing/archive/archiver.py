"""Move entries that are sealed and old enough from the stream to the archive, then trim the stream.

Every step is repeatable: killed between any two, or run twice at once, it loses nothing and counts nothing twice.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from redis.asyncio import Redis

from billing.archive.archive_cursor import ArchiveCursor
from billing.archive.files import Archive
from billing.errors import BillingError
from billing.ledger.journal import Entry, Link, order
from billing.store.keys import ALL_SHARDS, Shard
from billing.sweep import Sweep
from billing.usage import TenantId

KEEP_MS = 6 * 3_600_000
"""A repeated settle finds its record in the stream: this is longer than the deduplication window."""
WINDOW_ENTRIES = 5_000


class ChainBroken(BillingError):
    """A tenant's entries have a gap, a repeat or an alteration: they stay where they are until that is explained."""


@dataclass(frozen=True, slots=True)
class ArchiveReport:
    """What one run did, in entries."""

    archived: int
    trimmed: int
    problems: tuple[str, ...] = ()
    """Shards that are not archived further, and why."""


@dataclass(frozen=True, slots=True)
class Archiver:
    redis: Redis
    archive: Archive
    keep_ms: int = KEEP_MS
    """Entries younger than this stay in the stream, and out of the archive."""

    async def run_once(self, sweep: Sweep) -> ArchiveReport:
        """Archive and trim every shard; one that cannot be archived keeps no other waiting.

        Raises:
            StoreUnavailable, ArchiveUnavailable: several shards in a row failed; the rest waits for the next run.
        """
        cursor = ArchiveCursor(self.redis)
        await cursor.announce(self.archive.url)
        until_ms = await cursor.now_ms() - self.keep_ms

        async def archive(number: int) -> tuple[int, int]:
            shard = Shard(number)
            try:
                archived = await self._archive(cursor, shard, until_ms)
            except BillingError:
                await cursor.trim(shard, self.keep_ms)  # what is archived already
                raise
            return archived, await cursor.trim(shard, self.keep_ms)

        done = await sweep.run([shard.number for shard in ALL_SHARDS], archive, is_forced=True)
        problems = tuple(f"shard {one.id} is not archived further: {one.error}" for one in sweep.failing)
        return ArchiveReport(sum(archived for archived, _ in done), sum(trimmed for _, trimmed in done), problems)

    async def _archive(self, cursor: ArchiveCursor, shard: Shard, until_ms: int) -> int:
        start, sealed = await cursor.position(shard)
        until = min(sealed, f"{max(0, until_ms)}-0", key=order)
        moved = 0
        while order(start) < order(until):
            entries = await cursor.window(shard, start, until, WINDOW_ENTRIES)
            if not entries:
                break
            links = advance(await cursor.links(shard), entries)
            await asyncio.to_thread(self.archive.write, shard, entries)
            if not await cursor.move(shard, start, entries[-1].id, links):
                break  # another archiver moved it
            moved, start = moved + len(entries), entries[-1].id
        return moved


def advance(last: dict[TenantId, Link], entries: Iterable[Entry]) -> dict[TenantId, Link]:
    """The last link of each tenant in ``entries``, which go on from ``last`` unaltered and without a gap.

    Raises:
        ChainBroken: they do not.
        UnreadableEntry: one has no number.
    """
    reached: dict[TenantId, Link] = {}
    for entry in entries:
        before = reached.get(entry.tenant) or last.get(entry.tenant, Link())
        if entry.number != before.number + 1:
            raise ChainBroken(
                f"{entry.tenant}'s entry {entry.id} has the number {entry.number}, not {before.number + 1}"
            )
        if not entry.follows(before.chain):
            raise ChainBroken(f"{entry.tenant}'s entry {entry.id} is not as it was written")
        reached[entry.tenant] = Link(entry.number, entry.chain)
    return reached
