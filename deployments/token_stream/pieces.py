"""Pieces of one request on their way from the engine's thread to the event loop, joined where they wait.

Knows that a send costs Serve more than a token costs us; knows no Serve.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import replace

from deployments.inference.request import OutputDelta

SEND_INTERVAL_S = 0.015
"""After the first piece, tokens wait this long for company: each send costs Serve more than a token costs us."""


class Outbox:
    """Pieces of one request on their way from the engine's thread to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: list[OutputDelta] = []
        self._arrived = asyncio.Event()
        self._finished = asyncio.Event()

    def put(self, piece: OutputDelta) -> None:
        """Called from the engine's thread."""
        with suppress(RuntimeError):  # the loop closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._take, piece)

    def _take(self, piece: OutputDelta) -> None:
        self._waiting.append(piece)
        self._arrived.set()
        if piece.finish_reason is not None:
            self._finished.set()

    async def pieces(self) -> AsyncGenerator[OutputDelta, None]:
        while True:
            await self._arrived.wait()
            piece = join(self._waiting)
            self._waiting = []
            self._arrived.clear()
            yield piece
            if piece.finish_reason is not None:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(SEND_INTERVAL_S):
                    await self._finished.wait()


def join(pieces: list[OutputDelta]) -> OutputDelta:
    """Several pieces of one request as one: new tokens and text in order, totals of the last."""
    if len(pieces) == 1:
        return pieces[0]
    token_ids = tuple(token for piece in pieces for token in piece.token_ids)
    choices = tuple(choice for piece in pieces for choice in piece.choices)
    return replace(pieces[-1], token_ids=token_ids, text="".join(piece.text for piece in pieces), choices=choices)
