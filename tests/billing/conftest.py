"""A store of each kind that can be had here, and short ways to write a request."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from billing.store.connection import connect
from billing.store.holds import Ledger
from cluster import valkey

SYSTEM_REDIS = Path("/usr/bin/redis-server")


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


class SteppedClock:
    """A calendar that stands still until it is moved."""

    def __init__(self, now_ms: int) -> None:
        self.now_ms = now_ms

    def __call__(self) -> int:
        return self.now_ms


@pytest.fixture
def clock() -> SteppedClock:
    return SteppedClock(1_795_000_000_000)


@pytest.fixture
def ledger(store: Redis, clock: SteppedClock) -> Ledger:
    return Ledger(store, clock)
