"""Real parts shared by all tests: a real store, emptied between tests."""

import os
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from redis.asyncio import Redis

from billing.store import guard
from cluster import valkey

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported, by whomever

os.environ["COLUMNS"] = "200"  # tables that commands print are not cut, whatever terminal runs the tests

settings.register_profile("farebox", deadline=None)  # a busy machine is no bug
settings.load_profile("farebox")


STORE_PATIENCE_S = 10.0
"""A machine that stalls for a quarter of a second is no bug either, except where that law is what a test shows."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    law = guard.SILENCE_S
    if item.get_closest_marker("prompt") is None:
        guard.SILENCE_S = STORE_PATIENCE_S
    try:
        return (yield)
    finally:
        guard.SILENCE_S = law


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
