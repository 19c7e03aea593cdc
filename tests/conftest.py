"""Real parts shared by all tests: a real store, emptied between tests."""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from redis.asyncio import Redis

from cluster import valkey

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported, by whomever

settings.register_profile("farebox", deadline=None)  # a busy machine is no bug
settings.load_profile("farebox")


@pytest.fixture(scope="session")
def store_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real Valkey with the durability of production."""
    server = valkey.start(tmp_path_factory.mktemp("v"))
    yield server.url
    server.stop()


@pytest.fixture
async def redis(store_url: str) -> AsyncIterator[Redis]:
    """A client of an empty store."""
    client = Redis.from_url(store_url, decode_responses=True)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
def repo() -> Path:
    return Path(__file__).parent.parent
