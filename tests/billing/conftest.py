"""A store of each kind that can be had here, and everything between it and the offline Dodo, wired as in production."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from redis.asyncio import Redis

from billing.catalog import publication
from billing.catalog.catalog import Catalog
from billing.commerce.sync import sync
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.ledger.ledger import Ledger
from billing.store.connection import connect
from cluster import valkey
from cluster.dodo_sandbox.server import SandboxServer
from tests.support.clock import SteppedClock
from tests.support.servers import SYSTEM_REDIS
from tests.support.world import API_KEY, CATALOG, SECRET, World


def _servers() -> list[Path | None]:
    return [None, *([SYSTEM_REDIS] if SYSTEM_REDIS.exists() else [])]


@pytest.fixture(scope="session", params=_servers(), ids=lambda server: server.name if server else "embedded")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[valkey.Valkey]:
    """A running store; tests that take it run once on each kind of server."""
    started = valkey.start(tmp_path_factory.mktemp("s"), request.param)
    yield started
    started.stop()


@pytest.fixture
async def store(server: valkey.Valkey) -> AsyncIterator[Redis]:
    """A client as production makes it, of an empty store."""
    client = await connect(server.url)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
def clock(request: pytest.FixtureRequest) -> SteppedClock:
    """A fixed moment; now where the offline Dodo takes part, which signs webhooks with the real time."""
    return SteppedClock(None if "sandbox" in request.fixturenames else 1_795_000_000_000)


@pytest.fixture
def ledger(store: Redis, clock: SteppedClock) -> Ledger:
    return Ledger(store, clock)


@pytest.fixture
def sandbox(tmp_path: Path, clock: SteppedClock) -> Iterator[SandboxServer]:
    with SandboxServer(tmp_path / "dodo", API_KEY, webhook_secret=SECRET, clock=clock) as server:
        yield server


@pytest.fixture
async def dodo(sandbox: SandboxServer) -> AsyncIterator[Dodo]:
    client = Dodo(DodoSettings(API_KEY, SECRET, base_url=sandbox.url))
    yield client
    await client.close()


@pytest.fixture
async def world(redis: Redis, sandbox: SandboxServer, dodo: Dodo, clock: SteppedClock) -> AsyncIterator[World]:
    """Everything made at Dodo, the catalog in force, nobody there yet."""
    async with httpx.AsyncClient(base_url=sandbox.url, trust_env=False, timeout=30) as operator:
        catalog = Catalog.model_validate(CATALOG)
        await publication.publish(redis, catalog, "gateway-1", clock())
        await sync(dodo, redis, catalog)
        yield World(redis, dodo, operator, clock, catalog)
