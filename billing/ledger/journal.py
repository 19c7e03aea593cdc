"""The stream of entries, read only: usage records and movements of credit in the order in which they took effect.

What is exported of it, and how far, is in ``billing.export.outbox``.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from redis.asyncio import Redis

from billing.store.connection import guarded
from billing.store.guard import BULK_DEADLINE_S
from billing.store.keys import ALL_SHARDS, Shard, shard_for
from billing.usage import TenantId, UsageRecord

FIRST = "-"
LAST = "+"
USAGE_KIND = "usage"
CHAIN_DIGITS = 16
"""Hexadecimal digits of an entry's digest, as ``lua/lib/entries.lua`` writes it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry. ``id`` orders it within its shard: store milliseconds and a number."""

    id: str
    kind: str
    """``usage``, ``grant``, ``adjust``, ``clawback``, ``restore`` or ``repay``."""
    tenant: TenantId
    payload: str
    chain: str = ""
    """Digest of this entry and of its tenant's entry before it."""

    @property
    def is_usage(self) -> bool:
        return self.kind == USAGE_KIND

    def record(self) -> UsageRecord:
        """The usage record.

        Raises:
            UnreadableEntry: the payload is none.
        """
        try:
            return UsageRecord.from_json(self.payload)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise UnreadableEntry(f"entry {self.id} of {self.tenant}: {type(error).__name__} {error}") from error

    @property
    def number(self) -> int:
        """Its place among the tenant's entries, from 1.

        Raises:
            UnreadableEntry: it has none.
        """
        try:
            return int(json.loads(self.payload)["seq"])
        except (ValueError, KeyError, TypeError) as error:
            raise UnreadableEntry(f"entry {self.id} of {self.tenant} has no number") from error

    def follows(self, chain: str) -> bool:
        """Is this entry as it was written, right behind its tenant's one whose digest is ``chain``?"""
        digest = hashlib.sha1(f"{chain}{self.kind}{self.payload}".encode(), usedforsecurity=False).hexdigest()
        return self.chain == digest[:CHAIN_DIGITS]

    def movement(self) -> Mapping[str, object]:
        """Source, unit, amount and bucket of an entry that is no usage."""
        value: Mapping[str, object] = json.loads(self.payload)
        return value


@dataclass(frozen=True, slots=True)
class Link:
    """Where a tenant's entries stand: the number and the digest of the last one."""

    number: int = 0
    chain: str = ""


class UnreadableEntry(ValueError):
    """A stream entry that this version cannot read."""


class Stream:
    """Reads entries of one shard or of all."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def after(self, positions: Mapping[int, str], count: int) -> dict[Shard, list[Entry]]:
        """Up to ``count`` entries of every shard behind its position; shards without news are left out."""
        async with guarded(BULK_DEADLINE_S):
            pipe = self._redis.pipeline(transaction=False)
            for shard in ALL_SHARDS:
                pipe.xrange(shard.stream, min=_behind(positions.get(shard.number, "0-0")), count=count)
            found = await pipe.execute()
        return {shard: entries_in(raw) for shard, raw in zip(ALL_SHARDS, found, strict=True) if raw}

    async def within(self, shard: Shard, start: str = FIRST, end: str = LAST, count: int = 1000) -> list[Entry]:
        """Entries of a shard, oldest first, both ends included."""
        async with guarded(BULK_DEADLINE_S):
            return entries_in(await self._redis.xrange(shard.stream, min=start, max=end, count=count))

    async def newest(self, tenant: TenantId, before: str = LAST, count: int = 1000) -> list[Entry]:
        """Entries of the tenant's whole shard, newest first, from ``before`` on."""
        async with guarded(BULK_DEADLINE_S):
            return entries_in(await self._redis.xrevrange(shard_for(tenant).stream, max=before, count=count))


def _behind(position: str) -> str:
    return f"({position}" if position != "0-0" else FIRST


def order(entry_id: str) -> tuple[int, int]:
    """What stream ids are sorted by: store milliseconds, then a number."""
    ms, _, number = entry_id.partition("-")
    return int(ms), int(number)


def entries_in(raw: object) -> list[Entry]:
    """Entries as the store answers them. What one lacks is empty: it is no usage, and follows from no entry."""
    rows = cast(Sequence[tuple[str, Mapping[str, str]]], raw or ())
    return [
        Entry(id_, found.get("k", ""), TenantId(found.get("t", "")), found.get("p", ""), found.get("c", ""))
        for id_, found in rows
    ]
