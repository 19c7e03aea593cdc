"""The sandbox's application: its routes, limits and faults, and the tasks for webhooks and renewals."""

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
    portal,
    products,
    refunds,
    subscriptions,
    updates,
)
from cluster.dodo_sandbox.delivery import WebhookSender
from cluster.dodo_sandbox.faults import FaultGate, Faults
from cluster.dodo_sandbox.limits import Limits
from cluster.dodo_sandbox.outbox import Outbox
from cluster.dodo_sandbox.state import Sandbox, SandboxClock, authorize
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
    """The sandbox with its state in ``state_dir``. Its tasks run during the application's lifespan.

    Raises:
        ValueError: the webhook secret is not ``whsec_`` and base64.
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
    app.include_router(portal.router)
    app.add_middleware(Limits, sandbox=sandbox)
    app.add_middleware(FaultGate, faults=app.state.faults)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    sandbox: Sandbox = app.state.sandbox
    async with httpx.AsyncClient(trust_env=False) as client:
        app.state.sender = WebhookSender(sandbox, client)
        tasks = [asyncio.create_task(_forever(work)) for work in (app.state.sender.run_once, partial(_renew, sandbox))]
        yield
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    sandbox.store.close()


async def _forever(work: Callable[[], Awaitable[None]]) -> None:
    """Repeat ``work``; log an error and go on."""
    while True:
        try:
            await work()
        except Exception:  # the task's outermost loop: one bad row must not end all renewals
            log.exception("a background task of the sandbox failed")
            await asyncio.sleep(FAILURE_PAUSE_S)


async def _renew(sandbox: Sandbox) -> None:
    cycle.run_due(sandbox)
    await asyncio.sleep(RENEWAL_POLL_S)
