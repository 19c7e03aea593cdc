"""Measure the memory that a tenant and a usage record take in the store, by the growth of ``used_memory``."""

import asyncio
from dataclasses import dataclass
from functools import partial

from redis.asyncio import Redis

from billing.ledger.account import Funding, Grant, HoldRequest, Settlement
from billing.ledger.ledger import Ledger
from billing.pricing.prices import Price
from billing.store.keys import ALL_SHARDS
from billing.tenants.directory import Tenants
from billing.tenants.tenant import Tenant, new_key
from billing.usage import RequestId, Status, TenantId, Unit, Usage
from deployments.gateway.edge import new_request_id
from tests.bench.retries import with_retries

TENANTS = 20_000
RECORDS = 40_000
AT_ONCE = 200
PAYMENT = "payment:pay_V8FWulo5Z2OviRQ1NMIz:pdt_lGCcW0St2oLngAK2qz2U"
PRICE = Price.model_validate({"input_per_1m": "1.00", "output_per_1m": "2.00"})


@dataclass(frozen=True, slots=True)
class Weights:
    """Memory of one of each, in bytes."""

    identity: float
    """A tenant and one API key, with their entries in lists."""
    tenant: float
    """A tenant's account and one bucket, with the grant's marker and journal entry."""
    record: float
    marker: float


async def weigh(redis: Redis) -> Weights:
    """Fill an empty store step by step."""
    ledger, tenants = Ledger(redis), Tenants(redis)
    names = [TenantId(f"tenant-{number:06d}") for number in range(TENANTS)]
    empty = await _used(redis)
    for name in names:
        tenant, key = Tenant(id=name, email=f"{name}@example.com", plan="prepaid"), new_key(name, now_ms=1)[1]
        await with_retries(partial(tenants.create, tenant))
        await with_retries(partial(tenants.add_key, key))
    named = await _used(redis)
    for start in range(0, TENANTS, AT_ONCE):
        group = names[start : start + AT_ONCE]
        await asyncio.gather(*(_grant(ledger, name) for name in group))
    granted = await _used(redis)
    streams, markers = await _of(redis, "stream"), await _of(redis, "settled")
    for start in range(0, RECORDS, AT_ONCE):
        batch = range(start, start + AT_ONCE)
        await asyncio.gather(*(_sell(ledger, names[number % TENANTS]) for number in batch))
    return Weights(
        identity=(named - empty) / TENANTS,
        tenant=(granted - named) / TENANTS,
        record=(await _of(redis, "stream") - streams) / RECORDS,
        marker=(await _of(redis, "settled") - markers) / RECORDS,
    )


async def _grant(ledger: Ledger, tenant: TenantId) -> None:
    await with_retries(lambda: ledger.grant(Grant(PAYMENT, tenant, Unit.NANOS, 10**12)))


async def _sell(ledger: Ledger, tenant: TenantId) -> None:
    usage = Usage(prompt_tokens=200, completion_tokens=120, compute_ms=37)
    request = HoldRequest(
        request_id=RequestId(new_request_id()),
        tenant=tenant,
        key_id="key_0123456789abcdef",
        model="pirate",
        adapter="pirate@54a6a3d4ff45",
        adapter_class="default",
        plan="prepaid",
        price=PRICE,
        prompt_tokens=200,
        max_tokens=256,
        funding=Funding(),
    )
    await with_retries(lambda: ledger.hold(request))
    settlement = Settlement(request.request_id, tenant, usage, PRICE.charge(usage), Status.COMPLETE)
    await with_retries(lambda: ledger.settle(settlement))


async def _used(redis: Redis) -> int:
    return int((await redis.info("memory"))["used_memory"])


async def _of(redis: Redis, kind: str) -> int:
    """Memory of all keys of one kind, over all shards."""
    names = [name for shard in ALL_SHARDS for name in ([shard.stream] if kind == "stream" else shard.settled)]
    return sum([int(await redis.memory_usage(name, samples=0) or 0) for name in names])
