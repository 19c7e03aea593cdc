"""A farebox without an engine for simulated months: a temporary store and Dodo sandbox, on a clock that is set.

Requests are held and settled as a gateway does it, with made-up token counts. Between two moments everything that the
billing actor does periodically is run until nothing is left to do.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response
from redis.asyncio import Redis

from billing.catalog import publication
from billing.catalog.catalog import Catalog
from billing.commerce.auto_refill.refiller import Refiller
from billing.commerce.auto_refill.store import Refills
from billing.commerce.context import Commerce
from billing.commerce.dodo_ids import id_of
from billing.commerce.plan_changes import PlanChanges
from billing.commerce.products import Products, sold
from billing.commerce.sync import sync
from billing.commerce.webhooks import Webhooks
from billing.dodo.call_budget import CallBudget
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.errors import Refusal
from billing.export.exporter import Exporter
from billing.ledger.account import Account, Settlement
from billing.ledger.admission import Admission, funding_for, plan_of
from billing.ledger.ledger import Ledger
from billing.notices.log import Notices
from billing.notices.thresholds import notices_for
from billing.reconcile.reconciler import Reconciler, Report
from billing.store.connection import connect
from billing.sweep import Sweep
from billing.tenants.directory import Tenants
from billing.tenants.tenant import Principal, Tenant, new_key
from billing.usage import RequestId, Status, TenantId, Usage
from cluster import valkey
from cluster.dodo_sandbox.endpoints import generated_secret
from cluster.dodo_sandbox.server import SandboxServer, listen, url_of
from cluster.errors import ClusterError

Json = dict[str, Any]
"""A parsed answer of the sandbox."""
API_KEY = "dodo_test_simulation"
CALLS_PER_MINUTE = 1_000_000
"""No limit in practice: the sandbox has none."""
DELIVERY_TIMEOUT_S = 20.0
"""For the sandbox to deliver all webhooks."""


class SimulationError(ClusterError):
    """A webhook was not delivered, or could not be applied."""


class ManualClock:
    """A clock that stands still until it is set."""

    def __init__(self, start: datetime) -> None:
        self._now_ms = _ms(start)

    def __call__(self) -> int:
        return self._now_ms

    def set(self, moment: datetime) -> None:
        assert _ms(moment) >= self._now_ms, "the clock only goes forward"
        self._now_ms = _ms(moment)


@dataclass(frozen=True, slots=True)
class Calls:
    """The results of some requests."""

    admitted: int = 0
    refused: int = 0
    refusal: str = ""
    """Which refusals, each with the limit that it names."""


@dataclass(frozen=True, slots=True)
class DodoTotals:
    """Dodo's figures for one customer, over all time: usage events in nanos, payments and refunds in cents."""

    charge_nanos: int
    covered_nanos: int
    invoiced_cents: int
    refunded_cents: int


@dataclass
class Simulation:
    """Everything that runs in a simulation; ``simulation`` starts it."""

    redis: Redis
    dodo: Dodo
    sandbox: httpx.AsyncClient
    """With the merchant's API key."""
    clock: ManualClock
    catalog: Catalog
    secret: str
    _numbers: "count[int]" = field(default_factory=count)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.redis, self.clock)
        self.tenants = Tenants(self.redis, self.clock)
        self.notices, self.refills = Notices(self.redis), Refills(self.redis)
        self._admission = Admission(self.ledger, self.clock)
        budget = CallBudget(CALLS_PER_MINUTE, self.clock)
        self._exporter = Exporter(self.redis, self.dodo, self.tenants, self.clock, budget)
        commerce = Commerce(self.redis, self.dodo, self.ledger, self.tenants, self._current, self.clock)
        self._plan_changes = PlanChanges(commerce)
        self.webhooks, self._refiller = Webhooks(commerce, self.secret), Refiller(commerce)
        self._replaying, self._refilling = Sweep("webhooks", self.clock), Sweep("refills", self.clock)

    async def _current(self) -> Catalog | None:
        return await publication.current(self.redis)

    async def create_tenant(self, name: str, plan: str) -> Principal:
        """Create a tenant with an API key and a Dodo customer."""
        made = await self.tenants.create(Tenant(id=TenantId(name), email=f"{name}@example.com", plan=plan))
        _, key = new_key(made.id, self.clock())
        await self.tenants.add_key(key)
        return Principal(key, await self.tenants.set_customer(made.id, await self.dodo.create_customer(made)))

    async def go_to(self, moment: datetime) -> None:
        """Set the clock. Usage is exported first; then Dodo renews, retries and ends what is due by then."""
        await self.run_periodic_tasks()
        self.clock.set(moment)
        await self.control("clock", advance_s=0)
        await self.run_periodic_tasks()

    async def run_periodic_tasks(self) -> None:
        """Run the billing actor's periodic tasks until none of them finds more to do."""
        await self._apply_webhooks()
        await self._exporter.flush_once(force=True)
        await self._refiller.run_once(self._refilling)
        await self._apply_webhooks()
        for tenant in await self.tenants.list():
            plan, account = plan_of(tenant, self.catalog), await self.account(tenant)
            for notice in notices_for(tenant, plan, account, self.clock()):
                await self.notices.record(notice)

    async def account(self, tenant: Tenant) -> Account:
        """The account with what the tenant's plan lets it draw on now, as ``GET /v1/account`` shows it."""
        return await self.ledger.account(tenant.id, funding_for(tenant, plan_of(tenant, self.catalog), self.clock()))

    async def _apply_webhooks(self) -> None:
        """Wait until Dodo has delivered every webhook, and apply those that wait for another one."""
        deadline = time.monotonic() + DELIVERY_TIMEOUT_S
        while pending := [one for one in await self._deliveries() if one["state"] != "delivered"]:
            if time.monotonic() > deadline:
                raise SimulationError(f"the webhook {pending[0]['type']} was refused with {pending[0]['last_status']}")
            await asyncio.sleep(0.01)
        await self.webhooks.replay(self._replaying)
        if parked := await self.webhooks.inbox.parked(1):
            raise SimulationError(f"the webhook {parked[0].type} cannot be applied: {parked[0].reason}")

    async def _deliveries(self) -> list[Json]:
        found: list[Json] = (await self.read("/_sandbox/webhooks", limit=10_000))["data"]
        return found

    async def call(self, who: Principal, model: str, usage: Usage, times: int) -> Calls:
        """Run ``times`` requests one after the other; each that is admitted is settled with this usage."""
        admitted, refusals = 0, []
        principal = Principal(who.key, await self.tenants.get(who.tenant.id))
        offered = self.catalog.find(model, who.tenant.id, None)
        for _ in range(times):
            id_ = RequestId(f"simulated-{next(self._numbers)}")
            try:
                hold = await self._admission.admit(
                    principal, offered, self.catalog, id_, usage.prompt_tokens, usage.completion_tokens
                )
            except Refusal as refusal:
                source = getattr(refusal, "limit_source", "")
                refusals.append(f"{type(refusal).__name__} ({source})" if source else type(refusal).__name__)
                continue
            cost = hold.request.price.charge(usage)
            await self.ledger.settle(Settlement(id_, who.tenant.id, usage, cost, Status.COMPLETE))
            admitted += 1
        return Calls(admitted, len(refusals), ", ".join(sorted(set(refusals))))

    async def buy(self, who: Principal, product: str) -> str:
        """Buy a product, such as ``pack:small``, over a checkout session; returns the payment's id."""
        return await self.pay(await self.checkout(who, product))

    async def checkout(self, who: Principal, product: str) -> str:
        """Open a checkout session; returns its page."""
        tenant = await self.tenants.get(who.tenant.id)
        return await self.dodo.checkout(tenant, await self.product_id(product), {}, "http://127.0.0.1/")

    async def pay(self, checkout_url: str) -> str:
        """Pay an open checkout session; returns the payment's id."""
        payment = await self.control(f"pay/{checkout_url.rpartition('/')[2]}")
        return str(payment["payment_id"])

    async def change_plan(self, who: Principal, plan: str) -> str:
        """Change the plan as ``POST /v1/plan`` does; returns the payment's id."""
        changed = await self._plan_changes.change(await self.tenants.get(who.tenant.id), plan)
        return changed.payment_id

    async def deploy(self, catalog: Catalog) -> None:
        """Create at Dodo what is new, then put the catalog in force, as ``farebox deploy`` does."""
        await sync(self.dodo, self.redis, catalog)
        await publication.publish(self.redis, catalog, "simulation", self.clock())
        self.catalog = catalog

    async def set_card(self, who: Principal, declines: bool) -> None:
        await self.control(f"customers/{who.tenant.dodo_customer_id}/card", declines=declines)

    async def product_id(self, name: str) -> str:
        terms = next((terms for terms in sold(self.catalog) if terms.name == name), None)
        return await id_of(self.redis, name) if terms is None else await Products(self.redis).id_for(terms)

    async def dodo_totals(self, who: Principal) -> DodoTotals:
        """Read from Dodo, not from the ledger."""
        customer_id = who.tenant.dodo_customer_id
        sums = (await self.read("/_sandbox/sums")).get(customer_id, {})
        paid = (await self.read("/payments", customer_id=customer_id, status="succeeded", page_size=100))["items"]
        back = (await self.read("/refunds", customer_id=customer_id, page_size=100))["items"]
        return DodoTotals(
            charge_nanos=sum(by_key.get("charge_nanos", 0) for by_key in sums.values()),
            covered_nanos=sum(by_key.get("covered_nanos", 0) for by_key in sums.values()),
            invoiced_cents=sum(one["total_amount"] for one in paid),
            refunded_cents=sum(one["amount"] for one in back),
        )

    async def reconcile(self) -> Report:
        """Reconcile the ledger with the journal and with Dodo, from the beginning."""
        budget = CallBudget(CALLS_PER_MINUTE, self.clock)
        return await Reconciler(self.redis, self.dodo, None, budget, self.clock, is_full=True).run()

    async def control(self, path: str, /, **body: object) -> Json:
        """Call the sandbox's own routes: what customers, banks and the sandbox's operator do."""
        return await self.request("POST", f"/_sandbox/{path}", **body)

    async def request(self, method: str, path: str, /, **body: object) -> Json:
        answer = await self.sandbox.request(method, path, json=body)
        answer.raise_for_status()
        found: Json = answer.json()
        return found

    async def read(self, path: str, **query: str | int) -> Json:
        answer = await self.sandbox.get(path, params=query)
        answer.raise_for_status()
        found: Json = answer.json()
        return found


@asynccontextmanager
async def simulation(folder: Path, catalog: Catalog, start: datetime) -> AsyncIterator[Simulation]:
    """Start everything in ``folder``, with the catalog published and its products created at Dodo."""
    clock, secret = ManualClock(start), generated_secret()
    store = valkey.start(folder / "store")
    try:
        redis = await connect(store.url)
        with SandboxServer(folder / "dodo", API_KEY, webhook_secret=secret, clock=clock) as sandbox:
            dodo = Dodo(DodoSettings(API_KEY, secret, base_url=sandbox.url))
            bearer = {"Authorization": f"Bearer {API_KEY}"}
            async with httpx.AsyncClient(base_url=sandbox.url, headers=bearer, trust_env=False) as client:
                running = Simulation(redis, dodo, client, clock, catalog, secret)
                async with _webhook_server(running.webhooks) as url:
                    await publication.publish(redis, catalog, "simulation", clock())
                    await sync(dodo, redis, catalog, url)
                    yield running
            await dodo.close()
        await redis.aclose()
    finally:
        store.stop()


class _Server(uvicorn.Server):
    """A server that installs no signal handlers."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def _webhook_server(webhooks: Webhooks) -> AsyncIterator[str]:
    """An HTTP server that receives webhooks as the gateway does; yields the URL of its route."""
    app = FastAPI(openapi_url=None)

    @app.post("/webhooks/dodo")
    async def receive(request: Request) -> Response:
        await webhooks.receive(await request.body(), dict(request.headers))
        return Response()

    bound = listen("127.0.0.1", 0)
    server = _Server(uvicorn.Config(app, lifespan="off", ws="none", log_level="warning", access_log=False))
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    try:
        yield f"{url_of(bound)}/webhooks/dodo"
    finally:
        server.should_exit = True
        await serving
        bound.close()


def _ms(moment: datetime) -> int:
    return round(moment.timestamp() * 1_000)
