"""A ledger with every kind of movement on it, exported to the offline Dodo as in production."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from redis.asyncio import Redis

from billing.dodo.call_budget import CallBudget
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.export.exporter import Exporter
from billing.ledger.account import Adjustment, Bucket, Clawback, Funding, Grant
from billing.ledger.ledger import Ledger
from billing.money import Nanos
from billing.reconcile.reconciler import Reconciler, Report
from billing.tenants.directory import Tenants
from billing.tenants.tenant import Tenant
from billing.usage import BucketId, Status, TenantId, Unit
from cluster.dodo_sandbox.server import SandboxServer
from tests.support.samples import PER_TOKEN, request, settlement

SANDBOX_KEY = "sandbox_test"
ACME, ZETA = TenantId("acme"), TenantId("zeta")
CREDIT = Nanos(1_000_000)
ALLOWANCE = Bucket(BucketId("allowance:free:2026-11"), Unit.NANOS, 30_000, 30_000, is_allowance=True)


@dataclass(frozen=True)
class Scenario:
    """Two tenants and what is moved on their accounts."""

    redis: Redis
    dodo: Dodo

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.redis)

    async def open(self) -> None:
        """Two tenants with Dodo customers."""
        tenants = Tenants(self.redis)
        for name in (ACME, ZETA):
            tenant = await tenants.create(Tenant(id=name, email=f"{name}@farebox.test", plan="prepaid"))
            await tenants.set_customer(name, await self.dodo.create_customer(tenant))

    async def serve(self, request_id: str, tenant: TenantId = ACME, tokens: int = 5, **changes: object) -> None:
        """One request from hold to settle."""
        await self.ledger.hold(request(request_id, tenant=tenant, **changes))
        await self.ledger.settle(replace(settlement(request_id, tokens), tenant=tenant))

    async def move(self) -> None:
        """Every movement there is; two holds stay open."""
        ledger = self.ledger
        await ledger.grant(Grant("payment:1", ACME, Unit.NANOS, CREDIT))
        await ledger.grant(Grant("payment:2", ACME, Unit.REQUESTS, 3))
        await ledger.grant(Grant("payment:3", ZETA, Unit.NANOS, 60_000))
        for request_id in ("req_call", "req_second_call", "req_last_call"):
            await self.serve(request_id)
        await self.serve("req_money", tokens=20)
        await self.serve("req_allowed", funding=Funding(ALLOWANCE))
        await self.serve("req_overage", ZETA, 20, funding=Funding(credit_limit=Nanos(500_000)))
        await self.serve("req_more_overage", ZETA, 20, funding=Funding(credit_limit=Nanos(500_000)))
        await self.serve("req_free", ZETA, price=PER_TOKEN.model_copy(update={"free": True}))
        await ledger.repay_overage("payment:4", ZETA, 10_000)
        await ledger.adjust(Adjustment("adjustment:1", ACME, Unit.NANOS, 5_000, "billed twice"))
        await ledger.hold(request("req_long", step_tokens=4))
        await ledger.extend(request("req_long"), Nanos(30_000), Nanos(0))
        await ledger.settle(settlement("req_long", 8))
        await ledger.hold(request("req_void"))
        await ledger.void(request("req_void").request_id, ACME)
        await ledger.hold(request("req_left"))
        await ledger.settle(replace(settlement("req_left", 2), status=Status.CANCELLED))
        await ledger.hold(request("req_gone", lease_ms=1))
        await asyncio.sleep(0.01)
        await ledger.expire()
        await ledger.settle(settlement("req_gone", 3))
        await ledger.hold(request("req_open"))
        await ledger.extend(request("req_open"), Nanos(70_000), Nanos(0))
        await ledger.hold(request("req_open_zeta", tenant=ZETA, funding=Funding(credit_limit=Nanos(500_000))))

    async def refund(self) -> None:
        """Take credit back that was spent, so that a later payment pays a debt."""
        await self.ledger.claw_back(Clawback("refund:3", ZETA, "payment:3", 60_000))
        await self.ledger.adjust(Adjustment("adjustment:2", ZETA, Unit.NANOS, -2_000, "granted too much"))
        await self.ledger.grant(Grant("payment:5", ZETA, Unit.NANOS, 90_000))

    async def flush(self) -> None:
        await Exporter(self.redis, self.dodo, Tenants(self.redis)).flush_once(force=True)

    async def reconcile(self) -> Report:
        return await Reconciler(self.redis, self.dodo, budget=CallBudget(10_000)).run()


@asynccontextmanager
async def played(redis: Redis, folder: Path) -> AsyncIterator[Scenario]:
    """A scenario with every movement, all of them exported to a sandbox in ``folder`` and acknowledged."""
    with SandboxServer(folder, SANDBOX_KEY) as sandbox:
        dodo = Dodo(DodoSettings(SANDBOX_KEY, base_url=sandbox.url))
        scenario = Scenario(redis, dodo)
        try:
            await scenario.open()
            await scenario.move()
            await scenario.flush()
            yield scenario
        finally:
            await dodo.close()
