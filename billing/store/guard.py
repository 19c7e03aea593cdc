"""Bounds every wait for the store, and turns each of its failures into ``StoreUnavailable``.

All access to the store goes through ``guarded``. The client's own timeouts stay off: they start anew with each retry,
they count the time in which this process was suspended, and before Python 3.12 they may swallow a cancellation.
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
"""A node that answers no call for so long is down: with the tick before it, a request gets its 503 within 300 ms."""
QUEUE_S = 5.0
"""The longest that a call waits while the store answers others."""
BULK_DEADLINE_S = 10.0
"""The silence allowed where many entries are read, which no request waits for."""

_UNFIT = ("OOM", "MISCONF", "NOREPLICAS", "LOADING", "READONLY", "MASTERDOWN", "BUSY", "SCHEMA")
"""First words of errors. ``SCHEMA`` is our scripts' own: the store has another version of the stored forms."""
_UNFIT_CLASSES = (
    exceptions.OutOfMemoryError,
    exceptions.ReadOnlyError,
    exceptions.NoScriptError,
    exceptions.ExecAbortError,
    exceptions.ClusterDownError,
    exceptions.TryAgainError,
    exceptions.AskError,
)
"""Errors of a store that runs and cannot write now, or not on this node; ``MovedError`` is an ``AskError``."""
_ONLY_NODE = ""


@asynccontextmanager
async def guarded(silence_s: float | None = None) -> AsyncIterator[None]:
    """Around calls of the store: end them after ``silence_s`` without an answer, ``SILENCE_S`` by default.

    Raises:
        StoreUnavailable: the store does not answer, or cannot write. Whether the command took effect is unknown;
            every command may be sent again.
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
    """Does the error mean that the store cannot write now?

    Servers before Redis 7 wrap an error inside a script: ``ERR Error running script ... -READONLY You can't write``.
    """
    text = str(error)
    return isinstance(error, _UNFIT_CLASSES) or text.startswith(_UNFIT) or any(f" -{word} " in text for word in _UNFIT)


@contextmanager
def waiting_for(node: str) -> Iterator[None]:
    """Inside ``guarded``: name the cluster node that is awaited, so that answers of other nodes do not count for it."""
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
    """Ends one guarded call when the node it awaits has answered no call of this process for too long.

    Silence is counted in ticks of the event loop. A process that was suspended, or that sent more than the store can
    answer at once, therefore does not take the store for down.
    """

    answered_at: ClassVar[dict[str, float]] = {}
    """Time of the last answer to any call of this process, by node, in seconds of the loop's clock."""

    def __init__(self, timeout: asyncio.Timeout, silence_s: float) -> None:
        self.loop = asyncio.get_running_loop()
        self.awaited: Counter[str] = Counter()
        self._timeout, self._silence_s = timeout, silence_s
        self._silent_s = self._waited_s = 0.0
        self._ticked_at = self.loop.time()
        self._timer = self.loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._waited_s += TICK_S
        self._silent_s = 0.0 if self._has_answered() else self._silent_s + TICK_S
        self._ticked_at = now = self.loop.time()
        if self._silent_s >= self._silence_s - TICK_S / 2 or self._waited_s >= max(QUEUE_S, self._silence_s):
            self._timeout.reschedule(now)
        else:
            self._timer = self.loop.call_later(TICK_S, self._tick)

    def _has_answered(self) -> bool:
        """Has each awaited node answered some call since the last tick?"""
        awaited = [node for node, calls in self.awaited.items() if calls] or [_ONLY_NODE]
        return all(self.answered_at.get(node, 0.0) > self._ticked_at for node in awaited)

    def end(self) -> None:
        self._timer.cancel()


_watching: ContextVar[_Watch | None] = ContextVar("watching", default=None)
