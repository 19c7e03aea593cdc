"""A store of each kind of server, the offline Dodo, and what production has between the two."""

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

needs_redis_server = pytest.mark.skipif(not SYSTEM_REDIS.exists(), reason=f"needs {SYSTEM_REDIS}")


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(None, id="embedded"),
        pytest.param(SYSTEM_REDIS, id="redis-server", marks=[needs_redis_server, pytest.mark.slow]),
    ],
)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[valkey.Valkey]:
    """A running store. A test that uses it runs once on each kind of server."""
    started = valkey.start(tmp_path_factory.mktemp("s"), request.param)
    yield started
    started.stop()


@pytest.fixture
async def store(server: valkey.Valkey) -> AsyncIterator[Redis]:
    """A client of an empty store, made as in production."""
    client = await connect(server.url)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
def clock(request: pytest.FixtureRequest) -> SteppedClock:
    """A clock at a fixed time, or at the real one for tests with the offline Dodo, which signs webhooks with that."""
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
    """A published catalog whose products are made at Dodo; there is no tenant yet."""
    async with httpx.AsyncClient(base_url=sandbox.url, trust_env=False, timeout=30) as operator:
        catalog = Catalog.model_validate(CATALOG)
        await publication.publish(redis, catalog, "gateway-1", clock())
        await sync(dodo, redis, catalog)
        yield World(redis, dodo, operator, clock, catalog)
