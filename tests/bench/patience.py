"""A benchmark outlasts a disk that stalls: a call is sent again, as any caller may, and its time goes on."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from billing.store.errors import StoreUnavailable

TRIES = 20
T = TypeVar("T")


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """Raises StoreUnavailable where the store stays away."""
    for _ in range(TRIES - 1):
        try:
            return await call()
        except StoreUnavailable:
            continue
    return await call()
