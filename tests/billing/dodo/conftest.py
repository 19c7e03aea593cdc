"""A store, the offline Dodo, and everything between them, wired as in production."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from redis.asyncio import Redis

from billing.catalogue import Catalogue
from billing.dodo.client import Dodo, DodoSettings
from billing.dodo.sync import sync
from billing.store import board
from cluster.dodo_sandbox.server import SandboxServer
from tests.billing.dodo.world import API_KEY, CATALOGUE, SECRET, SteppedClock, World


@pytest.fixture
def clock() -> SteppedClock:
    return SteppedClock()


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
    """Everything made at Dodo, the catalogue in force, nobody there yet."""
    async with httpx.AsyncClient(base_url=sandbox.url, trust_env=False, timeout=30) as operator:
        catalogue = Catalogue.model_validate(CATALOGUE)
        await board.publish(redis, catalogue, "gateway-1", clock())
        await sync(dodo, redis, catalogue)
        yield World(redis, dodo, operator, clock, catalogue)
