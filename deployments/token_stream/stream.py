"""The output deltas of one request between the socket they arrive on and the request that reads them."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from deployments.inference.request import EngineError, OutputDelta
from deployments.token_stream.errors import SlowReader


def coalesce(deltas: Sequence[OutputDelta]) -> OutputDelta:
    """Several deltas of one request as one: new tokens and text in order, the totals of the last."""
    if len(deltas) == 1:
        return deltas[0]
    token_ids = tuple(token for delta in deltas for token in delta.token_ids)
    choices = tuple(choice for delta in deltas for choice in delta.choices)
    return replace(deltas[-1], token_ids=token_ids, text="".join(delta.text for delta in deltas), choices=choices)


class TokenStream:
    """The deltas of one request: the reader gets the first at once, then at most one every ``pace_s()`` seconds.

    What arrives in between is coalesced: sending an event to a client costs more than the tokens in it.
    """

    def __init__(self, max_unread_tokens: int, pace_s: Callable[[], float], on_overflow: Callable[[], None]) -> None:
        """``on_overflow`` is called when the reader leaves more than ``max_unread_tokens`` tokens unread."""
        self._max_unread_tokens, self._pace_s, self._on_overflow = max_unread_tokens, pace_s, on_overflow
        self._loop = asyncio.get_running_loop()
        self._unread: list[OutputDelta] = []
        self._unread_tokens = 0
        self._failure: EngineError | asyncio.CancelledError | None = None
        self._is_complete = False
        self._reader: asyncio.Future[None] | None = None
        self._wake_up: asyncio.TimerHandle | None = None
        self._read_at = 0.0
        self.source: object = None
        """The only connection that its deltas may come from: that of the first."""

    @property
    def is_slow(self) -> bool:
        return isinstance(self._failure, SlowReader)

    @property
    def is_complete(self) -> bool:
        return self._is_complete

    def put(self, delta: OutputDelta) -> None:
        if self._is_complete or self._failure is not None:
            return
        self._unread.append(delta)
        self._unread_tokens += len(delta.token_ids)
        self._is_complete = delta.finish_reason is not None
        if self._is_complete:
            self._wake()
        elif self._unread_tokens > self._max_unread_tokens:
            self.fail(SlowReader(f"the client left {self._unread_tokens} tokens unread"))
            self._on_overflow()
        elif self._reader is not None and self._wake_up is None:
            self._wake_in_time()

    def fail(self, error: EngineError | asyncio.CancelledError) -> None:
        """Raise ``error`` in the reader after the deltas that have arrived, unless the stream is complete."""
        if not self._is_complete and self._failure is None:
            self._failure = error
            self._wake()

    async def next(self) -> OutputDelta:
        while not self._unread or self._is_early:
            if self._failure is not None and not self._unread:
                raise self._failure
            self._reader = self._loop.create_future()
            if self._unread:
                self._wake_in_time()
            await self._reader
        deltas, self._unread, self._unread_tokens = self._unread, [], 0
        self._read_at = self._loop.time()
        return coalesce(deltas)

    @property
    def _is_early(self) -> bool:
        is_over = self._is_complete or self._failure is not None
        return not is_over and self._loop.time() < self._read_at + self._pace_s()

    def _wake_in_time(self) -> None:
        when = self._read_at + self._pace_s()
        if when <= self._loop.time():
            self._wake()
        else:
            self._wake_up = self._loop.call_at(when, self._wake)

    def _wake(self) -> None:
        if self._wake_up is not None:
            self._wake_up.cancel()
            self._wake_up = None
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
