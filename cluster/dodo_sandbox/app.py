"""Puts the sandbox together: routes, limits, faults, and the two tasks that run beside them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
from fastapi import Depends, FastAPI

from billing.clock import Clock, now_ms
from cluster.dodo_sandbox import (
    admin,
    checkout,
    customers,
    cycle,
    endpoints,
    errors,
    events,
    invoices,
    meters,
    pages,
    payments,
    plan_change,
    products,
    refunds,
    subscriptions,
)
from cluster.dodo_sandbox.clock import SandboxClock
from cluster.dodo_sandbox.delivery import Courier
from cluster.dodo_sandbox.faults import FaultGate, Faults
from cluster.dodo_sandbox.limits import Limits
from cluster.dodo_sandbox.outbox import Outbox
from cluster.dodo_sandbox.state import Sandbox, authorize
from cluster.dodo_sandbox.store import Store

DEFAULT_URL = "http://127.0.0.1:8010"
RENEWAL_POLL_S = 1.0

API = (
    customers,
    meters,
    events,
    products,
    checkout,
    payments,
    refunds,
    subscriptions,
    cycle,
    plan_change,
    endpoints,
    invoices,
)


def create_app(
    state_dir: Path,
    *,
    api_key: str,
    clock: Clock = now_ms,
    webhook_secret: str | None = None,
    public_url: str = DEFAULT_URL,
) -> FastAPI:
    """The sandbox on the state in ``state_dir``; its tasks run while the app's lifespan does."""
    store = Store(state_dir)
    sandbox = Sandbox(store, SandboxClock(store, clock), Outbox(store, clock), api_key, public_url)
    endpoints.adopt_secret(sandbox, webhook_secret)
    app = FastAPI(title="Dodo sandbox", lifespan=_lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.sandbox, app.state.faults = sandbox, Faults()
    errors.install(app)
    for part in API:
        app.include_router(part.router, dependencies=[Depends(authorize)])
    app.include_router(admin.router)
    app.include_router(pages.router)
    app.add_middleware(Limits, sandbox=sandbox)
    app.add_middleware(FaultGate, faults=app.state.faults)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    sandbox: Sandbox = app.state.sandbox
    async with httpx.AsyncClient(trust_env=False) as client:
        app.state.courier = Courier(sandbox, client)
        tasks = [asyncio.create_task(app.state.courier.run()), asyncio.create_task(_renew(sandbox))]
        yield
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    sandbox.store.close()


async def _renew(sandbox: Sandbox) -> None:
    while True:
        cycle.run_due(sandbox)
        await asyncio.sleep(RENEWAL_POLL_S)
