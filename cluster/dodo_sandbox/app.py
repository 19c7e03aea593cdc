"""Puts the sandbox together: routes, limits, faults, and the two tasks that run beside them."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import httpx
from fastapi import Depends, FastAPI

from billing.clock import Clock, now_ms
from cluster.dodo_sandbox import (
    admin,
    checkout,
    customers,
    cycle,
    disputes,
    endpoints,
    entitlements,
    errors,
    events,
    invoices,
    licences,
    meters,
    pages,
    payments,
    plan_change,
    products,
    refunds,
    subscriptions,
    updates,
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
FAILURE_PAUSE_S = 1.0

log = logging.getLogger(__name__)

API = (
    customers,
    meters,
    events,
    products,
    checkout,
    payments,
    refunds,
    disputes,
    entitlements,
    subscriptions,
    updates,
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
    """The sandbox on the state in ``state_dir``; its tasks run while the app's lifespan does.

    Raises ValueError for a webhook secret that is not ``whsec_`` and base64.
    """
    if webhook_secret is not None and not endpoints.well_formed(webhook_secret):
        raise ValueError("a webhook secret is whsec_ followed by base64")
    store = Store(state_dir)
    sandbox = Sandbox(store, SandboxClock(store, clock), Outbox(store, clock), api_key, public_url)
    endpoints.adopt_secret(sandbox, webhook_secret)
    app = FastAPI(title="Dodo sandbox", lifespan=_lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.sandbox, app.state.faults = sandbox, Faults()
    errors.install(app)
    for part in API:
        app.include_router(part.router, dependencies=[Depends(authorize)])
    app.include_router(licences.router)
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
        tasks = [asyncio.create_task(_forever(work)) for work in (app.state.courier.round, partial(_renew, sandbox))]
        yield
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    sandbox.store.close()


async def _forever(work: Callable[[], Awaitable[None]]) -> None:
    """The outermost loop of a task: one failed round is logged and does not end the sandbox."""
    while True:
        try:
            await work()
        except Exception:  # the task's outermost loop: without it one bad row would end all renewals
            log.exception("a round of the sandbox's background work failed")
            await asyncio.sleep(FAILURE_PAUSE_S)


async def _renew(sandbox: Sandbox) -> None:
    cycle.run_due(sandbox)
    await asyncio.sleep(RENEWAL_POLL_S)
