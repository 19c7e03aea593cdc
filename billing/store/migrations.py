"""Migrates a store that an earlier farebox wrote to this one's schema: one offline step that may be repeated.

1. ``META`` names both versions (``1>2``). From then on ``verify`` refuses the store to every process.
2. No other farebox may be connected. If one is, ``META`` is set back and nothing has changed.
3. Values that are cheap to rewrite are rewritten. One that has the new form already stays as it is.
4. The version is written into each shard, as the fence that scripts compare, and at last alone into ``META``.

A migration that was killed is started again and goes on. Journal entries, archive, sealed events, dead letters, markers
and unresolved settlements are never rewritten: their readers know every form.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, cast

from redis import exceptions
from redis.asyncio import Redis

from billing.store.connection import primaries_of
from billing.store.errors import StoreRefused
from billing.store.guard import BULK_DEADLINE_S, guarded, is_unfit
from billing.store.keys import (
    CATALOG_CURRENT,
    DODO_IDS,
    GATEWAYS,
    META,
    PLANS,
    PRODUCTS,
    SCHEMA,
    TENANTS,
    api_key,
    catalog,
    shard_for,
)
from billing.store.schema import Version, open_schema, raise_fences, read_version
from billing.usage import TenantId

BATCH = 500
GATEWAY_ALIVE_MS = 30_000
"""A gateway reports every five seconds. Asked only where ``CLIENT LIST`` is denied."""

_SWAP = """
if redis.call("HGET", KEYS[1], "schema") ~= ARGV[1] then return 0 end
redis.call("HSET", KEYS[1], "schema", ARGV[2])
return 1
"""

Value = dict[str, Any]
"""A stored JSON object."""


@dataclass(frozen=True, slots=True)
class Change:
    """Values that a migration rewrites, or would."""

    what: str
    count: int


@dataclass(frozen=True, slots=True)
class Migration:
    """What a migration did, or would do."""

    found: Version | None
    """The version that the store had; None for a new store."""
    changes: tuple[Change, ...] = ()
    connected: tuple[str, ...] = ()
    """Of a dry run: other processes that must be stopped first."""

    @property
    def is_needed(self) -> bool:
        return self.found is not None and self.found != Version(SCHEMA, SCHEMA)


async def migrate(redis: Redis, is_dry: bool = False, ignore_unnamed: bool = False) -> Migration:
    """Bring the store to this farebox's schema. A new store gets it at once; one that has it is left alone.

    Args:
        is_dry: only find out what would be done.
        ignore_unnamed: connections without a name are no farebox before 0.2, which did not name its own.

    Raises:
        StoreRefused: other processes are connected, or the store is of a later farebox. Nothing has changed.
        StoreUnavailable: the store does not answer. Migrate again.
    """
    async with guarded(BULK_DEADLINE_S):
        found = await read_version(redis)
        if found is None and not is_dry:
            await open_schema(redis)
    if found is None or found == Version(SCHEMA, SCHEMA):
        return Migration(found)
    if found.target > SCHEMA or (found.is_migrating and found.target != SCHEMA):
        raise StoreRefused(f"the store has schema {found} and this farebox migrates to {SCHEMA}: use a later one")
    under_way = Version(found.schema, SCHEMA)
    if is_dry:
        return Migration(found, await _rewrite(redis, found, is_dry), await _connected(redis, ignore_unnamed))
    async with guarded(BULK_DEADLINE_S):
        if not await _swap_version(redis, found, under_way):
            raise StoreRefused("another `farebox migrate` is running: wait until it has ended")
    if others := await _connected(redis, ignore_unnamed):
        async with guarded(BULK_DEADLINE_S):
            await _swap_version(redis, under_way, found)  # unless another migration finished meanwhile
        raise StoreRefused(f"stop these first, they use the store: {'; '.join(others)}")
    changes = await _rewrite(redis, found, is_dry)
    async with guarded(BULK_DEADLINE_S):
        await raise_fences(redis)
        await redis.hset(META, "schema", str(SCHEMA))
    return Migration(found, changes)


async def _swap_version(redis: Redis, old: Version, new: Version) -> bool:
    """Write the version into ``META`` only where it is still the old one."""
    swapped = await redis.register_script(_SWAP)(keys=[META], args=[str(old), str(new)])
    return bool(swapped)


async def _connected(redis: Redis, ignore_unnamed: bool) -> tuple[str, ...]:
    """Describe each other connection of a farebox; where they may not be listed, each gateway that reported lately."""
    found: list[str] = []
    async with guarded(BULK_DEADLINE_S):
        for server in primaries_of(redis).values():
            pipe = server.pipeline(transaction=False)
            pipe.client_id()
            pipe.client_list()
            try:
                own, clients = await pipe.execute()
            except exceptions.ResponseError as error:
                if is_unfit(error):
                    raise
                return await _reporting(redis)
            found += [_described(one) for one in clients if one["id"] != str(own) and _is_farebox(one, ignore_unnamed)]
    return tuple(found)


def _is_farebox(client: Mapping[str, str], ignore_unnamed: bool) -> bool:
    """Before 0.2 a farebox did not name its connections. Later servers say which library each connection uses."""
    if client["name"]:
        return client["name"].startswith("farebox:")
    is_replica = bool(set(client["flags"]) & set("SM"))
    may_be_ours = client.get("lib-name", "redis-py").startswith("redis-py")
    return may_be_ours and not is_replica and not ignore_unnamed


def _described(client: Mapping[str, str]) -> str:
    name = client["name"] or "a connection without a name (a farebox before 0.2?)"
    address = "a unix socket" if "/" in client["addr"] else client["addr"]
    return f"{name} from {address}, idle for {client['idle']} s"


async def _reporting(redis: Redis) -> tuple[str, ...]:
    seconds, _ = await redis.time()
    reports = cast(Mapping[str, str], await redis.hgetall(GATEWAYS))
    ages = {gateway: abs(seconds * 1000 - json.loads(text)["at_ms"]) for gateway, text in reports.items()}
    return tuple(f"gateway {id_}, which reported {a // 1000} s ago" for id_, a in ages.items() if a < GATEWAY_ALIVE_MS)


async def _rewrite(redis: Redis, found: Version, is_dry: bool) -> tuple[Change, ...]:
    """Apply each step from the version found to this one's."""
    changes: list[Change] = []
    for version in range(found.schema + 1, SCHEMA + 1):
        changes += [Change(what, await step(redis, is_dry)) for what, step in _STEPS[version].items()]
    return tuple(changes)


async def _name_throttled_keys(redis: Redis, is_dry: bool) -> int:
    count = 0
    async with guarded(BULK_DEADLINE_S):
        tenants = sorted(cast(set[str], await redis.smembers(TENANTS)))
    for first in range(0, len(tenants), BATCH):
        pipe = redis.pipeline(transaction=False)
        for tenant in tenants[first : first + BATCH]:
            pipe.smembers(shard_for(TenantId(tenant)).keys_of(TenantId(tenant)))
        async with guarded(BULK_DEADLINE_S):
            names = [api_key(digest) for digests in await pipe.execute() for digest in sorted(digests)]
        for one in range(0, len(names), BATCH):
            count += await _rewrite_strings(redis, names[one : one + BATCH], _with_throttled, is_dry)
    return count


async def _name_credit_limits(redis: Redis, is_dry: bool) -> int:
    async with guarded(BULK_DEADLINE_S):
        plans = cast(Mapping[str, str], await redis.hgetall(PLANS))
        changed = {name: new for name, text in plans.items() if (new := _changed(text, _with_credit_limit))}
        if changed and not is_dry:
            await redis.hset(PLANS, mapping=changed)  # type: ignore[arg-type]
    return len(changed)


async def _publish_catalog(redis: Redis, is_dry: bool) -> int:
    """Only the catalog in force is read again, so the others keep their form."""
    async with guarded(BULK_DEADLINE_S):
        current = cast(str | None, await redis.get(CATALOG_CURRENT))
        text = cast(str | None, await redis.get(catalog(current))) if current else None
        new = _changed(text, _with_new_names) if text else None
        if new is not None and not is_dry:
            content_hash = sha256(new.encode()).hexdigest()
            await redis.set(catalog(content_hash), new)
            await redis.set(CATALOG_CURRENT, content_hash)
    return int(new is not None)


async def _keep_terms(redis: Redis, is_dry: bool) -> int:
    """Until now a product at Dodo granted by the catalog in force. From now on it has terms of its own: these."""
    async with guarded(BULK_DEADLINE_S):
        ids = cast(Mapping[str, str], await redis.hgetall(DODO_IDS))
        current = cast(str | None, await redis.get(CATALOG_CURRENT))
        text = cast(str | None, await redis.get(catalog(current))) if current else None
        plans = cast(Mapping[str, str], await redis.hgetall(PLANS))
        known = cast(Sequence[str], await redis.hkeys(PRODUCTS))
        in_force: Value = json.loads(text) if text else {"packs": {}, "plans": {}}
        packs, ever = in_force["packs"], {name: json.loads(plan) for name, plan in plans.items()} | in_force["plans"]
        found = {f"pack:{name}": _terms_of_pack(name, pack) for name, pack in packs.items()}
        found |= {f"plan:{name}": _terms_of_plan(name, plan) for name, plan in ever.items()}
        new = {id_: json.dumps(found[name]) for name, id_ in ids.items() if name in found and id_ not in known}
        if new and not is_dry:
            await redis.hset(PRODUCTS, mapping=new)  # type: ignore[arg-type]
    return len(new)


def _terms_of_pack(name: str, pack: Value) -> Value:
    same: Value = {field: pack[field] for field in ("price", "grants", "expires_days", "licence_key") if field in pack}
    return {"name": f"pack:{name}", **same}


def _terms_of_plan(name: str, plan: Value) -> Value:
    return {
        "name": f"plan:{name}",
        "price": plan.get("monthly_price", "0"),
        "grants": plan.get("allowance"),
        "licence_key": plan.get("licence_key", False),
    }


_STEPS: Mapping[int, Mapping[str, Callable[[Redis, bool], Awaitable[int]]]] = {
    2: {
        "API keys: quarantine is called throttled": _name_throttled_keys,
        "plans: overage_cap is called credit_limit": _name_credit_limits,
        "catalog in force: the same in its plans, quarantined is called rejected": _publish_catalog,
        "products at Dodo: their terms, those of the catalog in force": _keep_terms,
    },
}
"""By the version that they lead to. A step returns how many values it changed, or would change in a dry run."""


async def _rewrite_strings(redis: Redis, names: Sequence[str], change: Callable[[Value], Value], is_dry: bool) -> int:
    async with guarded(BULK_DEADLINE_S):
        pipe = redis.pipeline(transaction=False)
        for name in names:
            pipe.get(name)
        texts = cast(Sequence[str | None], await pipe.execute())
        changed = {name: new for name, t in zip(names, texts, strict=True) if t and (new := _changed(t, change))}
        if changed and not is_dry:
            pipe = redis.pipeline(transaction=False)
            for name, text in changed.items():
                pipe.set(name, text)
            await pipe.execute()
    return len(changed)


def _changed(text: str, change: Callable[[Value], Value]) -> str | None:
    """The text of the changed value, in pydantic's form, which the content hash of a catalog is made of; None if it is
    the same."""
    old = json.loads(text)
    new = change(old)
    return None if new == old else json.dumps(new, separators=(",", ":"), ensure_ascii=False)


def _with_throttled(key: Value) -> Value:
    return _renamed(key, "quarantine", "throttled")


def _with_credit_limit(plan: Value) -> Value:
    return _renamed(plan, "overage_cap", "credit_limit")


def _with_new_names(value: Value) -> Value:
    plans = {name: _with_credit_limit(plan) for name, plan in value["plans"].items()}
    return _renamed(value | {"plans": plans}, "quarantined", "rejected")


def _renamed(value: Value, old: str, new: str) -> Value:
    """The same members in the same order."""
    return {new if name == old else name: member for name, member in value.items() if name != old or new not in value}
