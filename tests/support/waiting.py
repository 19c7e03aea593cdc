"""Wait for a condition of something that runs elsewhere, and find a port for it."""

import asyncio
import socket
import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")

POLL_S = 0.01
SLOWEST_POLL_S = 0.2
"""The pause of ``eventually`` doubles up to this, because a probe may cost as much as starting a process."""


async def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    """Let the event loop run until ``condition()`` is true; raise AssertionError after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not (seen := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s; last seen: {seen!r}"
        await asyncio.sleep(POLL_S)


def eventually(probe: Callable[[], Found], timeout_s: float = 30.0) -> Found:
    """Block until ``probe()`` is true, and return what it returned; raise AssertionError after ``timeout_s``."""
    deadline, pause_s = time.monotonic() + timeout_s, POLL_S
    while not (seen := probe()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s; last seen: {seen!r}"
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, SLOWEST_POLL_S)
    return seen


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
