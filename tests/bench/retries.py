"""Retries for benchmarks: a disk that stalls for a moment must not end a long run."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from billing.store.errors import StoreUnavailable

TRIES = 20
T = TypeVar("T")


async def with_retries(call: Callable[[], Awaitable[T]]) -> T:
    """Make the call again while the store is unavailable, up to ``TRIES`` times; then raise StoreUnavailable.

    The caller's measured time includes all attempts.
    """
    for _ in range(TRIES - 1):
        try:
            return await call()
        except StoreUnavailable:
            continue
    return await call()
