"""How far each shard is archived, in the store, and the trimming of entries that are archived.

Every change is one atomic step. The files stand in ``files``.
"""

from collections.abc import Mapping

from redis.asyncio import Redis

from billing.export.outbox import START
from billing.ledger.journal import Entry, Link, entries_in
from billing.store.connection import guarded
from billing.store.guard import BULK_DEADLINE_S
from billing.store.keys import ARCHIVE, Shard
from billing.store.scripts import Script
from billing.store.write import write
from billing.usage import TenantId


async def archive_url(redis: Redis) -> str:
    """Where the archive is, as the archiver announced it; empty where nothing was archived."""
    async with guarded():
        return str(await redis.get(ARCHIVE) or "")


class ArchiveCursor:
    """The archive cursor of every shard."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._archive = Script(redis, "archive/archive")
        self._trim = Script(redis, "archive/trim")

    async def announce(self, url: str) -> None:
        """Store where the archive is, for all that read old entries."""
        async with guarded():
            await write(self._redis, ("SET", ARCHIVE, url))

    async def position(self, shard: Shard) -> tuple[str, str]:
        """The stream ids up to which a shard is archived, and sealed for export."""
        async with guarded(BULK_DEADLINE_S):
            archived, sealed = await self._redis.hmget(shard.cursor, ["archived", "at"])
        return str(archived or START), str(sealed or START)

    async def now_ms(self) -> int:
        """The store's own clock."""
        async with guarded(BULK_DEADLINE_S):
            seconds, microseconds = await self._redis.time()
        return int(seconds) * 1_000 + int(microseconds) // 1_000

    async def window(self, shard: Shard, after: str, until: str, count: int) -> list[Entry]:
        """Up to ``count`` entries behind ``after``, ``until`` included."""
        async with guarded(BULK_DEADLINE_S):
            return entries_in(await self._redis.xrange(shard.stream, min=f"({after}", max=until, count=count))

    async def links(self, shard: Shard) -> dict[TenantId, Link]:
        """Where each tenant's archived entries end."""
        async with guarded(BULK_DEADLINE_S):
            found = await self._redis.hgetall(shard.archived)
        return {TenantId(str(tenant)): _link(str(text)) for tenant, text in found.items()}

    async def move(self, shard: Shard, start: str, end: str, links: Mapping[TenantId, Link]) -> bool:
        """Move the archive cursor from ``start`` to ``end``; ``False`` if it stood elsewhere."""
        rows = [(tenant, f"{link.number}|{link.chain}") for tenant, link in links.items()]
        async with guarded(BULK_DEADLINE_S):
            moved = await self._archive.number(
                keys={"cursor": shard.cursor, "archived": shard.archived},
                args={"expected": start, "after": end, "links": rows},
            )
        return bool(moved)

    async def trim(self, shard: Shard, keep_ms: int) -> int:
        """Remove what is sealed, archived and older than ``keep_ms``. How many entries those were."""
        async with guarded(BULK_DEADLINE_S):
            return await self._trim.number(
                keys={"cursor": shard.cursor, "stream": shard.stream}, args={"keep": keep_ms}
            )


def _link(text: str) -> Link:
    number, _, chain = text.partition("|")
    return Link(int(number), chain)
