"""A journal, a cash book and catalogs of months that are over, written into a real store as they would stand there."""

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime

from redis.asyncio import Redis

from billing.catalog.catalog import Catalog
from billing.commerce.cash import Entry
from billing.ledger.journal import CHAIN_DIGITS
from billing.store.keys import CASH, CASH_BOOKED, CATALOG_CURRENT, CATALOG_HISTORY, catalog, shard_for
from billing.usage import TenantId, UsageRecord


def at(day: str) -> int:
    """The beginning of a day in UTC, in Unix milliseconds."""
    return int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()) * 1_000


async def in_force(redis: Redis, day: str, value: Catalog) -> None:
    """A catalog that came into force then."""
    await redis.set(catalog(value.content_hash), value.model_dump_json())
    await redis.xadd(CATALOG_HISTORY, {"hash": value.content_hash}, id=f"{at(day)}-0")
    await redis.set(CATALOG_CURRENT, value.content_hash)


async def settled(redis: Redis, record: UsageRecord) -> None:
    """A usage record, where its time says."""
    await _append(redis, "usage", record.tenant, record.occurred_at_ms, json.loads(record.to_json()))


async def moved(redis: Redis, day: str, kind: str, tenant: TenantId, **payload: object) -> None:
    """A movement of credit."""
    whole = {"unit": "nanos", "balance_nanos": 0, "occurred_at_ms": at(day)} | payload
    await _append(redis, kind, tenant, at(day), whole)


async def booked(redis: Redis, entry: Entry) -> None:
    """An entry of the cash book, where its time of booking says."""
    place = await redis.xadd(CASH, {"id": entry.id, "e": entry.to_json()}, id=f"{entry.booked_at_ms}-*")
    await redis.hset(CASH_BOOKED, entry.id, place)


async def _append(redis: Redis, kind: str, tenant: TenantId, at_ms: int, payload: dict[str, object]) -> None:
    shard = shard_for(tenant)
    account = shard.account(tenant)
    text = json.dumps(payload | {"seq": await redis.hincrby(account, "seq", 1)}, separators=(",", ":"))
    before = await redis.hget(account, "chain") or ""
    chain = hashlib.sha1(f"{before}{kind}{text}".encode(), usedforsecurity=False).hexdigest()[:CHAIN_DIGITS]
    await redis.hset(account, "chain", chain)
    await redis.xadd(shard.stream, {"k": kind, "t": tenant, "p": text, "c": chain}, id=f"{at_ms}-*")


def of(record: UsageRecord, day: str, tenant: str = "acme", **changes: object) -> UsageRecord:
    """The same on another day."""
    moved_ = replace(record, occurred_at_ms=at(day), tenant=TenantId(tenant))
    return replace(moved_, **changes)  # type: ignore[arg-type]
