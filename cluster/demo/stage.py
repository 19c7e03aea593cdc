"""A whole farebox without its engine, on a throw-away store and sandbox, in a time of its own: for scripted stories.

Knows how the parts of billing are wired and how one waits for them; knows no story. Calls are held and settled
as a gateway does it, with the tokens of a made-up answer.
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
from billing.commerce.sync import sync
from billing.commerce.webhooks import Webhooks
from billing.dodo.call_budget import CallBudget
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.errors import Refusal
from billing.export.exporter import Exporter
from billing.ledger.account import Settlement
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

Json = dict[str, Any]
"""An answer of the sandbox, as it came."""
API_KEY = "dodo_test_story"
CALLS_PER_MINUTE = 1_000_000
"""To the sandbox, which has no limit of its own."""
PATIENCE_S = 20.0
"""For the sandbox to have told everything that happened."""


class StoryStuck(Exception):
    """Dodo's news did not arrive, or could not be applied; the message says which."""


class Calendar:
    """A clock that stands still until the story goes on."""

    def __init__(self, start: datetime) -> None:
        self._now_ms = _ms(start)

    def __call__(self) -> int:
        return self._now_ms

    def go_to(self, moment: datetime) -> None:
        assert _ms(moment) >= self._now_ms, "a story goes forward"
        self._now_ms = _ms(moment)


@dataclass(frozen=True, slots=True)
class Calls:
    """What became of some calls at the gate."""

    admitted: int = 0
    refused: int = 0
    why: str = ""
    """Of the refused ones: the refusal, and what it says was the limit."""


@dataclass(frozen=True, slots=True)
class Told:
    """Dodo's own figures of one customer: sums of usage events in nanos, sums of money in cents."""

    charge_nanos: int
    covered_nanos: int
    invoiced_cents: int
    refunded_cents: int


@dataclass
class Stage:
    redis: Redis
    dodo: Dodo
    operator: httpx.AsyncClient
    """On the sandbox, with the merchant's key."""
    calendar: Calendar
    catalog: Catalog
    secret: str
    _numbers: "count[int]" = field(default_factory=count)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.redis, self.calendar)
        self.tenants = Tenants(self.redis, self.calendar)
        self.notices, self.refills = Notices(self.redis), Refills(self.redis)
        self._admission = Admission(self.ledger, self.calendar)
        budget = CallBudget(CALLS_PER_MINUTE, self.calendar)
        self._exporter = Exporter(self.redis, self.dodo, self.tenants, self.calendar, budget)
        commerce = Commerce(self.redis, self.dodo, self.ledger, self.tenants, self._current, self.calendar)
        self.webhooks, self._refiller = Webhooks(commerce, self.secret), Refiller(commerce)
        self._replaying, self._refilling = Sweep("webhooks", self.calendar), Sweep("refills", self.calendar)

    async def _current(self) -> Catalog | None:
        return await publication.current(self.redis)

    async def join(self, name: str, plan: str) -> Principal:
        """A new tenant with a key and a Dodo customer."""
        made = await self.tenants.create(Tenant(id=TenantId(name), email=f"{name}@example.com", plan=plan))
        _, key = new_key(made.id, self.calendar())
        await self.tenants.add_key(key)
        return Principal(key, await self.tenants.set_customer(made.id, await self.dodo.create_customer(made)))

    async def go_to(self, moment: datetime) -> None:
        """Let time pass: what was used is told first, then Dodo renews, retries and ends what is due."""
        await self.settle_down()
        self.calendar.go_to(moment)
        await self.order("clock", advance_s=0)
        await self.settle_down()

    async def settle_down(self) -> None:
        """Until the billing process would find nothing more to do."""
        await self._hear()
        await self._exporter.flush_once(force=True)
        await self._refiller.run_once(self._refilling)
        await self._hear()
        for tenant in await self.tenants.list():
            plan, now = plan_of(tenant, self.catalog), self.calendar()
            account = await self.ledger.account(tenant.id, funding_for(tenant, plan, now))
            for notice in notices_for(tenant, plan, account, now):
                await self.notices.record(notice)

    async def _hear(self) -> None:
        """Until Dodo has told all its news and every one was applied."""
        deadline = time.monotonic() + PATIENCE_S
        while pending := [one for one in await self._deliveries() if one["state"] != "delivered"]:
            if time.monotonic() > deadline:
                raise StoryStuck(f"{pending[0]['type']} was not taken: {pending[0]['last_status']}")
            await asyncio.sleep(0.01)
        await self.webhooks.replay(self._replaying)
        if parked := await self.webhooks.inbox.parked(1):
            raise StoryStuck(f"{parked[0].type} cannot be applied: {parked[0].reason}")

    async def _deliveries(self) -> list[Json]:
        found: list[Json] = (await self.read("/_sandbox/webhooks", limit=10_000))["data"]
        return found

    async def call(self, who: Principal, model: str, usage: Usage, times: int) -> Calls:
        """Run so many requests one after the other; each that is admitted is settled with this usage."""
        admitted, whys = 0, []
        principal = Principal(who.key, await self.tenants.get(who.tenant.id))
        offered = self.catalog.find(model, who.tenant.id, None)
        for _ in range(times):
            id_ = RequestId(f"story-{next(self._numbers)}")
            try:
                hold = await self._admission.admit(
                    principal, offered, self.catalog, id_, usage.prompt_tokens, usage.completion_tokens
                )
            except Refusal as refusal:
                source = getattr(refusal, "limit_source", "")
                whys.append(f"{type(refusal).__name__} ({source})" if source else type(refusal).__name__)
                continue
            cost = hold.request.price.charge(usage)
            await self.ledger.settle(Settlement(id_, who.tenant.id, usage, cost, Status.COMPLETE))
            admitted += 1
        return Calls(admitted, len(whys), ", ".join(sorted(set(whys))))

    async def buy(self, who: Principal, product: str) -> str:
        """Pay for a product, such as ``pack:small``, on the checkout page; the payment's id."""
        tenant = await self.tenants.get(who.tenant.id)
        product_id = await id_of(self.redis, product)
        url = await self.dodo.checkout(tenant, product_id, {}, "http://127.0.0.1/")
        payment = await self.order(f"pay/{url.rpartition('/')[2]}")
        return str(payment["payment_id"])

    async def set_card(self, who: Principal, declines: bool) -> None:
        await self.order(f"customers/{who.tenant.dodo_customer_id}/card", declines=declines)

    async def product(self, name: str) -> str:
        return await id_of(self.redis, name)

    async def told(self, who: Principal) -> Told:
        """Asked from Dodo, not from the ledger."""
        customer_id = who.tenant.dodo_customer_id
        sums = (await self.read("/_sandbox/sums")).get(customer_id, {})
        paid = (await self.read("/payments", customer_id=customer_id, status="succeeded", page_size=100))["items"]
        back = (await self.read("/refunds", customer_id=customer_id, page_size=100))["items"]
        return Told(
            charge_nanos=sum(by_key.get("charge_nanos", 0) for by_key in sums.values()),
            covered_nanos=sum(by_key.get("covered_nanos", 0) for by_key in sums.values()),
            invoiced_cents=sum(one["total_amount"] for one in paid),
            refunded_cents=sum(one["amount"] for one in back),
        )

    async def reconcile(self) -> Report:
        """All books from their beginning, Dodo's too."""
        budget = CallBudget(CALLS_PER_MINUTE, self.calendar)
        return await Reconciler(self.redis, self.dodo, None, budget, self.calendar, is_full=True).run()

    async def order(self, path: str, /, **order: object) -> Json:
        """What somebody at Dodo's other side does: a customer, a bank, the operator of the sandbox."""
        return await self.ask("POST", f"/_sandbox/{path}", **order)

    async def ask(self, method: str, path: str, /, **body: object) -> Json:
        answer = await self.operator.request(method, path, json=body)
        answer.raise_for_status()
        found: Json = answer.json()
        return found

    async def read(self, path: str, **asked: str | int) -> Json:
        answer = await self.operator.get(path, params=asked)
        answer.raise_for_status()
        found: Json = answer.json()
        return found


@asynccontextmanager
async def stage(folder: Path, catalog: Catalog, start: datetime) -> AsyncIterator[Stage]:
    """Everything started in ``folder``, the catalog in force and known to Dodo; all of it ends with the block."""
    calendar, secret = Calendar(start), generated_secret()
    store = valkey.start(folder / "store")
    try:
        redis = await connect(store.url)
        with SandboxServer(folder / "dodo", API_KEY, webhook_secret=secret, clock=calendar) as sandbox:
            dodo = Dodo(DodoSettings(API_KEY, secret, base_url=sandbox.url))
            bearer = {"Authorization": f"Bearer {API_KEY}"}
            async with httpx.AsyncClient(base_url=sandbox.url, headers=bearer, trust_env=False) as operator:
                there = Stage(redis, dodo, operator, calendar, catalog, secret)
                async with _door(there.webhooks) as url:
                    await publication.publish(redis, catalog, "story", calendar())
                    await sync(dodo, redis, catalog, url)
                    yield there
            await dodo.close()
        await redis.aclose()
    finally:
        store.stop()


class _Server(uvicorn.Server):
    """Leaves the process's signals to whoever runs the story."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def _door(webhooks: Webhooks) -> AsyncIterator[str]:
    """Where Dodo delivers: a real HTTP server, as the gateway's."""
    app = FastAPI(openapi_url=None)

    @app.post("/webhooks/dodo")
    async def hear(request: Request) -> Response:
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
