"""Every wait for the store is bounded here, and only here: the client's own timeouts stay off.

Before Python 3.12 those may swallow a task's cancellation. Knows what an answer of the store
means for a call; knows no key and no address.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import ClassVar

from redis import exceptions

from billing.store.errors import StoreUnavailable

TICK_S = 0.04
SILENCE_S = 0.24
"""A store that answers nobody for so long is down: with the tick before it, 503 within 300 ms."""
QUEUE_S = 5.0
"""The longest that a call waits for its turn while the store answers others."""
BULK_DEADLINE_S = 10.0
"""For reading many entries, which takes longer than the hot path may wait."""

_UNFIT = ("OOM", "MISCONF", "NOREPLICAS", "LOADING", "READONLY", "MASTERDOWN", "BUSY")
_UNFIT_HERE = (
    exceptions.OutOfMemoryError,
    exceptions.ReadOnlyError,
    exceptions.NoScriptError,
    exceptions.ExecAbortError,
    exceptions.ClusterDownError,
    exceptions.TryAgainError,
    exceptions.AskError,
)
"""Answers of a store that is there and cannot write now, or not here; ``MovedError`` is an ``AskError``."""
_ONLY_NODE = ""


@asynccontextmanager
async def guarded(silence_s: float | None = None) -> AsyncIterator[None]:
    """Turn every way in which the store can fail into ``StoreUnavailable``, in time (``SILENCE_S`` unless told).

    Whether a command took effect is then unknown: every one can be sent again.
    """
    try:
        async with asyncio.timeout(None) as timeout:
            watch = _Watch(timeout, SILENCE_S if silence_s is None else silence_s)
            token = _watching.set(watch)
            try:
                yield
            finally:
                _watching.reset(token)
                watch.end()
            _Watch.answered_at[_ONLY_NODE] = watch.loop.time()
    except (exceptions.ConnectionError, exceptions.TimeoutError, TimeoutError, OSError) as error:
        raise StoreUnavailable(f"the metering store does not answer: {str(error) or 'timeout'}") from error
    except exceptions.ResponseError as error:
        if is_unfit(error):
            raise StoreUnavailable(f"the metering store cannot write: {error}") from error
        raise


def is_unfit(error: exceptions.ResponseError) -> bool:
    """Older servers wrap what a script met: ``ERR Error running script ... -READONLY You can't write``."""
    text = str(error)
    return isinstance(error, _UNFIT_HERE) or text.startswith(_UNFIT) or any(f" -{word} " in text for word in _UNFIT)


@contextmanager
def waiting_for(node: str) -> Iterator[None]:
    """Say which node of a cluster a guarded call now waits for, so that others' answers do not count for it."""
    watch = _watching.get()
    if watch is not None:
        watch.awaited[node] += 1
    try:
        yield
        _Watch.answered_at[node] = asyncio.get_running_loop().time()
    finally:
        if watch is not None:
            watch.awaited[node] -= 1


class _Watch:
    """Ends a call when the node it waits for has been silent towards this whole process for too long.

    Silence is counted in ticks of the event loop, so that a process which was itself kept from
    running, or which sent more than the store can answer at once, does not take the store for dead.
    """

    answered_at: ClassVar[dict[str, float]] = {}
    """When any call of this process was last answered, by node and the loop's clock."""

    def __init__(self, timeout: asyncio.Timeout, silence_s: float) -> None:
        self.loop = asyncio.get_running_loop()
        self.awaited: Counter[str] = Counter()
        self._timeout, self._silence_s = timeout, silence_s
        self._silent_s = self._waited_s = 0.0
        self._ticked_at = self.loop.time()
        self._timer = self.loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._waited_s += TICK_S
        self._silent_s = 0.0 if self._is_heard() else self._silent_s + TICK_S
        self._ticked_at = now = self.loop.time()
        if self._silent_s >= self._silence_s - TICK_S / 2 or self._waited_s >= max(QUEUE_S, self._silence_s):
            self._timeout.reschedule(now)
        else:
            self._timer = self.loop.call_later(TICK_S, self._tick)

    def _is_heard(self) -> bool:
        awaited = [node for node, calls in self.awaited.items() if calls] or [_ONLY_NODE]
        return all(self.answered_at.get(node, 0.0) > self._ticked_at for node in awaited)

    def end(self) -> None:
        self._timer.cancel()


_watching: ContextVar[_Watch | None] = ContextVar("watching", default=None)
