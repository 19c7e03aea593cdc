"""The replica's end of the token sockets: one line to each gateway that sends it jobs, one write per engine step.

Knows pieces, sockets and when a job is over for its gateway; knows no Serve.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from deployments.inference.request import Emit, GenerateRequest, OutputDelta
from deployments.token_stream.frames import (
    NONCE_BYTES,
    PROOF_BYTES,
    Address,
    BadFrame,
    Deadlines,
    is_proof,
    new_nonce,
    pack,
    proof,
    read_deadlines,
)
from deployments.token_stream.link import ReplicaLost

DIAL_TIMEOUT_S = 5.0
MOST_UNSENT_BYTES = 8 << 20
"""A gateway that leaves this much unread is given up, and with it all that it asked for."""

logger = logging.getLogger(__name__)
Extend = Callable[[Deadlines], None]
"""As ``Engine.extend``."""


class Jobs(Protocol):
    """The part of an engine that runs jobs."""

    def submit(self, request: GenerateRequest, emit: Emit) -> object: ...

    def abort(self, request_id: str) -> None: ...


class Line:
    """One gateway's socket. Every job on it ends when it does."""

    def __init__(self, writer: asyncio.StreamWriter, reader: asyncio.StreamReader, extend: Extend) -> None:
        self._loop, self._extend = asyncio.get_running_loop(), extend
        self._writer, self._reader = writer, reader
        self._unsent: deque[tuple[str, OutputDelta]] = deque()
        self._is_due = False
        self._open: dict[str, asyncio.Future[None]] = {}
        self._watching = self._loop.create_task(self._watch())

    @property
    def is_up(self) -> bool:
        return not self._watching.done()

    async def carry(self, job: GenerateRequest, engine: Jobs) -> None:
        """Run a job and send all of its pieces; returns when the last one is on its way. Cancelling aborts it.

        Raises:
            ReplicaLost: the gateway can no longer be reached; the job was aborted.
            EngineError: as ``Engine.submit``.
        """
        if not self.is_up:
            raise ReplicaLost("the gateway's socket was lost")
        engine.submit(job, partial(self.put, job.request_id))
        over = self._open[job.request_id] = self._loop.create_future()
        try:
            await over
        except BaseException:
            engine.abort(job.request_id)
            raise
        finally:
            del self._open[job.request_id]

    def put(self, request_id: str, piece: OutputDelta) -> None:
        """Called from the engine's thread, once for each row of a step; the first call wakes the event loop."""
        self._unsent.append((request_id, piece))
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        self._is_due = False  # before the queue is emptied: what comes from now on asks for a flush of its own
        batch = [self._unsent.popleft() for _ in range(len(self._unsent))]
        if not batch or not self.is_up:
            return
        self._writer.write(pack(batch))
        for request_id, piece in batch:
            over = self._open.get(request_id)
            if piece.finish_reason is not None and over is not None and not over.done():
                over.set_result(None)
        if self._writer.transport.get_write_buffer_size() > MOST_UNSENT_BYTES:
            logger.warning("a gateway reads too slowly: its %d jobs are aborted", len(self._open))
            self._writer.transport.abort()

    async def _watch(self) -> None:
        """Until the socket ends; meanwhile the gateway moves its jobs' deadlines, also while this replica drains."""
        try:
            while True:
                self._extend(await read_deadlines(self._reader))
        except (OSError, EOFError) as end:
            logger.debug("a gateway's socket ended: %r", end)
        except BadFrame as error:
            logger.error("a gateway's socket is closed: %s", error)
        finally:
            self._writer.transport.abort()
            for over in self._open.values():
                if not over.done():
                    over.set_exception(ReplicaLost("the gateway's socket was lost"))

    async def close(self) -> None:
        """Send what is written already, then end; what is still open fails."""
        self._writer.close()
        await asyncio.wait([self._watching], timeout=DIAL_TIMEOUT_S)
        self._watching.cancel()


class Lines:
    """A replica's lines, dialled when a gateway's first job comes and again after one was lost."""

    def __init__(self, extend: Extend) -> None:
        self._extend = extend
        self._lines: dict[Address, asyncio.Task[Line]] = {}

    async def to(self, gateway: Address) -> Line:
        """The line to a gateway. Raises ReplicaLost where it cannot be reached or does not know its own secret."""
        dialling = self._lines.get(gateway)
        if dialling is None or (dialling.done() and not _is_up(dialling)):
            self._forget_lost()
            dialling = self._lines[gateway] = asyncio.create_task(_dial(gateway, self._extend))
        try:
            return await asyncio.shield(dialling)
        except (OSError, EOFError, TimeoutError) as error:
            raise ReplicaLost(f"the gateway at {gateway.host}:{gateway.port} cannot be reached") from error

    def _forget_lost(self) -> None:
        self._lines = {key: task for key, task in self._lines.items() if not task.done() or _is_up(task)}

    async def close(self) -> None:
        for dialling in self._lines.values():
            if dialling.done() and _is_up(dialling):
                await dialling.result().close()
            dialling.cancel()


def _is_up(dialling: asyncio.Task[Line]) -> bool:
    return not dialling.cancelled() and dialling.exception() is None and dialling.result().is_up


async def _dial(gateway: Address, extend: Extend) -> Line:
    async with asyncio.timeout(DIAL_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(gateway.host, gateway.port)
        try:
            ours = new_nonce()
            theirs = await reader.readexactly(NONCE_BYTES)
            writer.write(proof(gateway.secret, "replica", theirs) + ours)
            if not is_proof(await reader.readexactly(PROOF_BYTES), gateway.secret, "gateway", ours):
                raise ConnectionRefusedError("whoever listens there is not the gateway that asked")
        except BaseException:
            writer.transport.abort()
            raise
        return Line(writer, reader, extend)
