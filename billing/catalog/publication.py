"""The catalog in force, kept in the store by its content hash, and which gateway serves which catalog."""

import json
import logging
from dataclasses import dataclass
from typing import cast

from pydantic import ValidationError
from redis.asyncio import Redis

from billing.catalog.catalog import Catalog
from billing.catalog.plans import Plan
from billing.store.connection import guarded
from billing.store.guard import BULK_DEADLINE_S
from billing.store.keys import CATALOG_CURRENT, GATEWAYS, PLANS, catalog
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


async def publish(redis: Redis, value: Catalog, gateway_id: str, at_ms: int) -> str:
    """Put a validated catalog in force and report that this gateway serves it. Returns its hash."""
    hash_ = value.content_hash
    plans = [word for name, plan in value.plans.items() for word in (name, plan.model_dump_json())]
    async with guarded(BULK_DEADLINE_S):
        # Plans are stored before the catalog that names them: a plan in force is never missing.
        await write(
            redis,
            ("HSET", PLANS, *plans),
            ("SET", catalog(hash_), value.model_dump_json()),
            ("SET", CATALOG_CURRENT, hash_),
        )
    await renew(redis, value, gateway_id, at_ms)
    return hash_


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
