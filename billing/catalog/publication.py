"""The catalog in force, kept in the store by its content hash; which was in force when; which gateway serves which."""

import json
import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, cast

from pydantic import ValidationError
from redis.asyncio import Redis

from billing.catalog.catalog import Catalog
from billing.catalog.plans import Plan
from billing.store.connection import guarded
from billing.store.guard import BULK_DEADLINE_S
from billing.store.keys import CATALOG_CURRENT, CATALOG_HISTORY, GATEWAYS, PLANS, catalog
from billing.store.write import write

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GatewayState:
    """Which catalog a gateway serves, as it reported."""

    gateway_id: str
    hash: str
    """Content hash of the catalog it serves."""
    rejected: tuple[str, ...]
    """``kind id: reason`` of every entry that it does not serve."""
    at_ms: int


@dataclass(frozen=True, slots=True)
class CatalogHistory:
    """Which catalog was in force when: at least one, the oldest first."""

    starts_ms: tuple[int, ...]
    """When each came into force."""
    catalogs: tuple[Catalog, ...]

    @classmethod
    def of(cls, *parts: tuple[int, Catalog]) -> Self:
        """From catalogs and when they came into force. Each knows the plans of those before it as retired."""
        plans: dict[str, Plan] = {}
        catalogs = []
        for _, one in parts:
            catalogs.append(one.remembering({**one.retired, **plans}))
            plans |= one.plans
        return cls(tuple(start for start, _ in parts), tuple(catalogs))

    def at(self, at_ms: int) -> Catalog:
        """The one in force at a moment. Before the first one that is known, that one."""
        return self.catalogs[max(0, bisect_right(self.starts_ms, at_ms) - 1)]

    def within(self, start_ms: int, end_ms: int) -> Sequence[Catalog]:
        """Those in force at some moment from ``start_ms`` until before ``end_ms``, the oldest first."""
        first = max(0, bisect_right(self.starts_ms, start_ms) - 1)
        return self.catalogs[first : max(first + 1, bisect_right(self.starts_ms, end_ms - 1))]


async def publish(redis: Redis, value: Catalog, gateway_id: str, at_ms: int) -> str:
    """Put a validated catalog in force and report that this gateway serves it. Returns its hash."""
    hash_ = value.content_hash
    before = await _newest(redis)
    # A version without a history left only the catalog in force: it was so until now.
    came = [one for one in (before.unlisted, hash_) if one not in ("", before.listed)]
    plans = [word for name, plan in value.plans.items() for word in (name, plan.model_dump_json())]
    async with guarded(BULK_DEADLINE_S):
        # Plans are stored before the catalog that names them: a plan in force is never missing.
        await write(
            redis,
            ("HSET", PLANS, *plans),
            ("SET", catalog(hash_), value.model_dump_json()),
            ("SET", CATALOG_CURRENT, hash_),
            *(("XADD", CATALOG_HISTORY, "*", "hash", one) for one in dict.fromkeys(came)),
        )
    await renew(redis, value, gateway_id, at_ms)
    return hash_


@dataclass(frozen=True, slots=True)
class _Newest:
    listed: str
    """Hash of the last catalog of the history; empty where there is none."""
    unlisted: str
    """Hash of the catalog in force where there is no history yet; empty otherwise."""


async def _newest(redis: Redis) -> _Newest:
    async with guarded(BULK_DEADLINE_S):
        newest = cast(list[tuple[str, dict[str, str]]], await redis.xrevrange(CATALOG_HISTORY, count=1))
        in_force = cast(str | None, await redis.get(CATALOG_CURRENT))
    return _Newest(newest[0][1]["hash"], "") if newest else _Newest("", in_force or "")


async def in_force_ever(redis: Redis) -> CatalogHistory | None:
    """Every catalog that was ever in force, with retired plans; ``None`` until a gateway published one.

    One that this version cannot read is logged and left out: the one before it counts on.
    """
    async with guarded(BULK_DEADLINE_S):
        found = cast(list[tuple[str, dict[str, str]]], await redis.xrange(CATALOG_HISTORY))
    if not found:
        only = await current(redis)
        return None if only is None else CatalogHistory.of((0, only))
    parts = [(int(id_.partition("-")[0]), fields["hash"]) for id_, fields in found]
    known: dict[str, Catalog] = {}
    async with guarded(BULK_DEADLINE_S):
        for hash_ in dict.fromkeys(hash_ for _, hash_ in parts):
            try:
                known[hash_] = Catalog.model_validate_json(str(await redis.get(catalog(hash_))))
            except ValidationError as error:
                logger.warning("catalog %s of an earlier time cannot be read: %s", hash_[:12], error)
    retired = await plans_ever(redis)
    readable = [(start, known[hash_]) for start, hash_ in parts if hash_ in known]
    named = {name for _, one in readable for name in one.plans}
    older = {name: plan for name, plan in retired.items() if name not in named}
    return CatalogHistory.of(*((start, one.remembering(older)) for start, one in readable)) if readable else None


async def renew(redis: Redis, value: Catalog, gateway_id: str, at_ms: int) -> None:
    """Report that this gateway runs and serves that catalog; what is in force stays as it is."""
    rejected = [f"{entry.kind} {entry.id}: {entry.reason}" for entry in value.rejected]
    report = json.dumps({"hash": value.content_hash, "quarantined": rejected, "at_ms": at_ms})
    async with guarded(BULK_DEADLINE_S):
        await write(redis, ("HSET", GATEWAYS, gateway_id, report))


async def current(redis: Redis) -> Catalog | None:
    """The catalog in force, with retired plans; ``None`` until a gateway published one."""
    async with guarded(BULK_DEADLINE_S):
        hash_ = cast(str | None, await redis.get(CATALOG_CURRENT))
        text = await redis.get(catalog(hash_)) if hash_ else None
    return Catalog.model_validate_json(text).remembering(await plans_ever(redis)) if text else None


async def plans_ever(redis: Redis) -> dict[str, Plan]:
    """Every plan that was ever in force, as it last was. One that this version cannot read is logged and left out."""
    async with guarded(BULK_DEADLINE_S):
        found = cast(dict[str, str], await redis.hgetall(PLANS))
    plans: dict[str, Plan] = {}
    for name, text in found.items():
        try:
            plans[name] = Plan.model_validate_json(text)
        except ValidationError as error:
            logger.warning("plan %s of an earlier time cannot be read: %s", name, error)
    return plans


async def gateways(redis: Redis) -> list[GatewayState]:
    """All gateways that ever published, in order of their ids."""
    async with guarded(BULK_DEADLINE_S):
        found = cast(dict[str, str], await redis.hgetall(GATEWAYS))
    states = ((gateway_id, json.loads(text)) for gateway_id, text in sorted(found.items()))
    return [GatewayState(id_, s["hash"], tuple(s["quarantined"]), s["at_ms"]) for id_, s in states]


async def forget_gateway(redis: Redis, gateway_id: str) -> None:
    """Delete the report of a gateway that has stopped."""
    async with guarded(BULK_DEADLINE_S):
        await write(redis, ("HDEL", GATEWAYS, gateway_id))
