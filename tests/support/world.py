"""Short ways to make usage, let Dodo misbehave, and ask both sides for their sums."""

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import count

import httpx
from redis.asyncio import Redis
from standardwebhooks import Webhook

from billing.catalog.catalog import Catalog
from billing.commerce.context import Commerce
from billing.commerce.dodo_ids import id_of
from billing.commerce.products import Products, sold
from billing.commerce.webhooks import Webhooks
from billing.dodo.call_budget import CallBudget
from billing.dodo.client import Dodo
from billing.export.exporter import Exporter
from billing.export.outbox import Backlog
from billing.ledger.journal import CHAIN_DIGITS
from billing.ledger.ledger import Ledger
from billing.money import Nanos
from billing.store.keys import shard_for
from billing.sweep import Sweep
from billing.tenants.directory import Tenants
from billing.tenants.tenant import Tenant
from billing.usage import OVERAGE, BucketId, Draw, RequestId, Status, TenantId, Unit, Usage, UsageRecord
from tests.support.clock import SteppedClock

API_KEY = "dodo_test_key"
SECRET = "whsec_" + "c2VjcmV0" * 4
SECOND, MINUTE, HOUR, DAY = 1_000, 60_000, 3_600_000, 86_400_000

CATALOG = {
    "models": [{"id": "base", "price": {"input_per_1m": "1"}}],
    "plans": {
        "prepaid": {"kind": "prepaid"},
        "payg": {"kind": "pay_as_you_go", "credit_limit": "25", "grace_days": 2},
        "pro": {
            "kind": "subscription",
            "allowance": {"usd": "10"},
            "credit_limit": "50",
            "monthly_price": "20",
        },
    },
    "packs": {
        "small": {"price": "5", "grants": {"usd": "5"}, "expires_days": 30},
        "calls": {"price": "7", "grants": {"requests": 1000, "adapters": ["base"]}},
    },
    "default_plan": "prepaid",
}


@dataclass
class World:
    redis: Redis
    dodo: Dodo
    operator: httpx.AsyncClient
    """On the sandbox's admin routes."""
    clock: SteppedClock
    catalog: Catalog
    sums: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    """What the ledger says must be exported: by tenant and metadata key."""
    _numbers: "count[int]" = field(default_factory=count)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.redis, self.clock)
        self.tenants = Tenants(self.redis, self.clock)

    def exporter(self, calls_per_minute: int = 100_000) -> Exporter:
        """A new exporter, as after a restart; its backoff never waits."""
        budget = CallBudget(calls_per_minute, self.clock)
        return Exporter(self.redis, self.dodo, self.tenants, self.clock, budget, jitter=lambda: 0.0)

    def commerce(self) -> Commerce:
        async def catalog() -> Catalog | None:
            return self.catalog

        return Commerce(self.redis, self.dodo, self.ledger, self.tenants, catalog, self.clock)

    def sweep(self) -> Sweep:
        """One that remembers no failures, as after a restart."""
        return Sweep("test", self.clock)

    def webhooks(self) -> Webhooks:
        return Webhooks(self.commerce(), SECRET)

    async def tenant(self, name: str, plan: str = "prepaid", has_customer: bool = True) -> Tenant:
        made = await self.tenants.create(Tenant(id=TenantId(name), email=f"{name}@example.com", plan=plan))
        return await self.give_customer(made.id) if has_customer else made

    async def spoil(self, name: str) -> None:
        """Make a tenant's record one that cannot be read, as another version might write it."""
        await self.redis.set(shard_for(TenantId(name)).tenant(TenantId(name)), "{}")

    async def give_customer(self, tenant_id: TenantId) -> Tenant:
        tenant = await self.tenants.get(tenant_id)
        return await self.tenants.set_customer(tenant_id, await self.dodo.create_customer(tenant))

    async def use(self, name: str, charged: int = 100, overage: int = 0, ago_ms: int = 0, **changes: object) -> None:
        """Append one record as a settle does."""
        number = next(self._numbers)
        draws = [Draw(BucketId("pack"), Unit.NANOS, charged - overage)] if charged > overage else []
        draws += [Draw(OVERAGE, Unit.NANOS, overage)] if overage else []
        usage = Usage(prompt_tokens=10, cached_tokens=2, completion_tokens=5, compute_ms=7)
        base = UsageRecord(
            record_id=f"rec_{number}",
            request_id=RequestId(str(number)),
            tenant=TenantId(name),
            key_id="key",
            adapter="base",
            adapter_class="default",
            plan="prepaid",
            price_version="pv",
            usage=usage,
            status=Status.COMPLETE,
            occurred_at_ms=self.clock() - ago_ms,
            list_nanos=Nanos(charged),
            charged_nanos=Nanos(charged),
            draws=tuple(draws),
        )
        record = replace(base, **changes)  # type: ignore[arg-type]
        await append(self.redis, record)
        self.sums[name, "charge_nanos"] += record.overage_nanos
        self.sums[name, "covered_nanos"] += record.charged_nanos - record.overage_nanos
        self.sums[name, "completion_tokens"] += record.usage.completion_tokens
        self.sums[name, "requests"] += record.usage.requests

    async def exported(self) -> dict[tuple[str, str], int]:
        """What Dodo has, in the shape of ``sums``."""
        by_customer = (await self.operator.get("/_sandbox/sums")).json()
        exported: dict[tuple[str, str], int] = defaultdict(int)
        for tenant in await self.tenants.list():
            for by_key in by_customer.get(tenant.dodo_customer_id, {}).values():
                for key in ("charge_nanos", "covered_nanos", "completion_tokens", "requests"):
                    exported[tenant.id, key] += by_key.get(key, 0)
        return exported

    async def events(self) -> list[dict[str, object]]:
        found: list[dict[str, object]] = (await self.operator.get("/_sandbox/events")).json()
        return found

    async def fault(self, *kinds: str, path: str = "/events/ingest", times: int | None = None, rate: float = 1) -> None:
        rule = {"path": path, "kinds": list(kinds), "rate": rate} | ({"count": times} if times else {})
        (await self.operator.post("/_sandbox/faults", json=rule)).raise_for_status()

    async def heal(self) -> None:
        await self.operator.delete("/_sandbox/faults")

    async def product(self, name: str) -> str:
        """Dodo's id of what the catalog sells under this name, such as ``pack:small``, or of ``meter:charge``."""
        terms = next((terms for terms in sold(self.catalog) if terms.name == name), None)
        return await id_of(self.redis, name) if terms is None else await Products(self.redis).id_for(terms)

    async def buy(self, tenant: str, name: str, quantity: int = 1) -> dict[str, object]:
        """Pay for a product at Dodo; the payment as Dodo has it."""
        stored = await self.tenants.get(TenantId(tenant))
        url = await self.dodo.checkout(stored, await self.product(name), {}, "http://127.0.0.1/", quantity)
        paid = await self.operator.post(f"/_sandbox/pay/{url.rpartition('/')[2]}")
        paid.raise_for_status()
        payment: dict[str, object] = paid.json()
        return payment


def assert_same(exported: dict[tuple[str, str], int], sums: dict[tuple[str, str], int]) -> None:
    """Equal to the nano, both ways; zeros need no event."""
    assert {k: v for k, v in exported.items() if v} == {k: v for k, v in sums.items() if v}


def is_clear(backlog: Backlog) -> bool:
    """Is everything exported?"""
    return backlog.unsealed_entries == backlog.outbox_events == 0


async def append(redis: Redis, record: UsageRecord) -> None:
    """As the ledger's scripts do, number and digest included."""
    shard = shard_for(record.tenant)
    account = shard.account(record.tenant)
    payload = replace(record, seq=await redis.hincrby(account, "seq", 1)).to_json()
    before = await redis.hget(account, "chain") or ""
    chain = hashlib.sha1(f"{before}usage{payload}".encode(), usedforsecurity=False).hexdigest()[:CHAIN_DIGITS]
    await redis.hset(account, "chain", chain)
    entry = {"k": "usage", "t": record.tenant, "p": payload, "c": chain}
    await redis.xadd(shard.stream, entry)  # type: ignore[arg-type]


def delivery(
    type_: str, data: dict[str, object], webhook_id: str = "msg_1", secret: str = SECRET
) -> tuple[bytes, dict[str, str]]:
    """A webhook as Dodo sends it, with its signature."""
    now = datetime.now(UTC)
    body = json.dumps({"business_id": "bus_1", "type": type_, "timestamp": now.isoformat(), "data": data})
    headers = {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": Webhook(secret).sign(webhook_id, now, body),
    }
    return body.encode(), headers
