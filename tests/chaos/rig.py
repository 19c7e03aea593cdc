"""What a scenario runs on: a real store, the offline Dodo, a tokenizer, and processes that can be killed."""

import asyncio
import multiprocessing
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import httpx

from billing.catalog import publication
from billing.clock import Clock, now_ms
from billing.commerce.sync import sync
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.ledger.account import Grant
from billing.store.connection import connect
from billing.tenants.tenant import new_key
from billing.usage import TenantId, Unit
from cluster import valkey
from cluster.dodo_sandbox.server import SandboxServer, listen
from deployments.gateway.catalog_holder import read_catalog
from tests.support.word_tokenizer import save_word_tokenizer
from tests.support.world import API_KEY, SECRET, World

USER_CONFIG: dict[str, object] = {
    "base": {"id": "farebox-base", "price": {"input_per_1m": "1", "output_per_1m": "2"}},
    "adapters": [
        {
            "id": "pirate",
            "path": "/adapters/pirate",
            "digest": "ab" * 32,
            "price": {"input_per_1m": "333.333333", "output_per_1m": "1777.777777"},
        },
        {"id": "flat", "path": "/adapters/flat", "digest": "cd" * 32, "price": {"per_request": "0.01"}},
    ],
    "plans": {"prepaid": {"kind": "prepaid"}},
    "packs": {"small": {"price": "5.00", "grants": {"usd": "5.00"}}},
    "default_plan": "prepaid",
}
"""The prices do not divide evenly, so that a rounding too many would show."""
LIFE_S = 60.0
"""How long a process may take to reach its failpoint."""


@dataclass(frozen=True)
class Rig:
    """A store and an offline Dodo in a folder of their own."""

    folder: Path
    store_url: str
    dodo_url: str

    @property
    def environ(self) -> dict[str, str]:
        """The environment variables of a Farebox process."""
        return {
            "REDIS_URL": self.store_url,
            "FAREBOX_DODO_ENVIRONMENT": "sandbox",
            "DODO_PAYMENTS_BASE_URL": self.dodo_url,
            "DODO_PAYMENTS_API_KEY": API_KEY,
            "DODO_PAYMENTS_WEBHOOK_KEY": SECRET,
        }


@contextmanager
def open_rig(clock: Clock = now_ms) -> Iterator[Rig]:
    """Start a store and an offline Dodo. Call from the main thread: the store ends with the thread that started it."""
    with tempfile.TemporaryDirectory(prefix="chaos") as name:
        folder = Path(name)
        (folder / "model").mkdir()
        save_word_tokenizer(folder / "model")
        server = valkey.start(folder / "v")
        try:
            with SandboxServer(folder / "dodo", API_KEY, webhook_secret=SECRET, clock=clock) as sandbox:
                yield Rig(folder, server.url, sandbox.url)
        finally:
            server.stop()


@asynccontextmanager
async def open_world(
    rig: Rig, clock: Clock = now_ms, http_client: httpx.AsyncClient | None = None
) -> AsyncIterator[World]:
    """Publish and sync the catalog; there is no tenant yet. Every call to Dodo goes through ``http_client``."""
    redis = await connect(rig.store_url)
    dodo = Dodo(DodoSettings(API_KEY, SECRET, base_url=rig.dodo_url), http_client)
    catalog = read_catalog(USER_CONFIG)
    async with httpx.AsyncClient(base_url=rig.dodo_url, trust_env=False, timeout=30) as operator:
        await publication.publish(redis, catalog, "gateway-1", clock())
        await sync(dodo, redis, catalog)
        yield World(redis, dodo, operator, clock, catalog)  # type: ignore[arg-type]
    await dodo.close()
    await redis.aclose()


async def tenant_with(world: World, name: str, nanos: int) -> str:
    """Create a tenant with a customer at Dodo and that much credit; returns its API key."""
    tenant = await world.tenant(name)
    if nanos:
        await world.ledger.grant(Grant(f"chaos:{name}", tenant.id, Unit.NANOS, nanos))
    secret, key = new_key(TenantId(name), now_ms())
    await world.tenants.add_key(key)
    return secret


@contextmanager
def listener() -> Iterator[socket.socket]:
    """A listening socket that stays open while the processes that answer on it are killed: no connection is refused."""
    bound = listen("127.0.0.1", 0)
    bound.listen(4096)
    try:
        yield bound
    finally:
        bound.close()


class ProcessStarter:
    """Starts processes quickly: each is forked from a server process that has imported ``module`` already."""

    def __init__(self, module: str) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([module])

    def start(self, target: Callable[..., None], *args: object) -> BaseProcess:
        process = self._context.Process(target=target, args=args, daemon=True)
        process.start()
        return process

    async def run_until_killed(self, target: Callable[..., None], *args: object) -> None:
        """Run one process until it kills itself.

        Raises AssertionError if it ends in another way, and TimeoutError if it does not end.
        """
        process = self.start(target, *args)
        try:
            async with asyncio.timeout(LIFE_S):
                while process.exitcode is None:  # noqa: ASYNC110, only this thread may reap it
                    await asyncio.sleep(0.02)
            assert process.exitcode == -signal.SIGKILL, f"{target.__name__} ended with {process.exitcode}"
        finally:
            process.kill()
