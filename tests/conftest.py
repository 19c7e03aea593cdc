"""What all tests share: a real store, emptied between tests, and the order of the tests."""

import os
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from redis.asyncio import Redis

from billing.store import guard
from cluster import valkey

pytest_plugins = ["tests.support.skips"]

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported

os.environ["COLUMNS"] = "200"  # so that the tables of commands are not cut to the width of a terminal

settings.register_profile("farebox", settings.get_profile("default"), deadline=None)  # a slow machine is not a failure
settings.load_profile("farebox")

STORE_PATIENCE_S = 10.0
"""How long a test waits for a silent store, so that a machine which stalls does not fail it. A test that is marked
``prompt`` waits as long as production does."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    silence_s = guard.SILENCE_S
    if item.get_closest_marker("prompt") is None:
        guard.SILENCE_S = STORE_PATIENCE_S
    try:
        return (yield)
    finally:
        guard.SILENCE_S = silence_s


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker starts one when the others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


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
