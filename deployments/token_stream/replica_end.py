"""The replica's end of the token stream: one connection to each gateway that sends it requests."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from deployments.inference.request import Emit, GenerateRequest, OutputDelta
from deployments.token_stream.errors import ReplicaLost
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

CONNECT_TIMEOUT_S = 5.0
MAX_UNSENT_BYTES = 8 << 20
"""A gateway that leaves more than this unread is disconnected, and its requests are aborted."""

logger = logging.getLogger(__name__)
Extend = Callable[[Deadlines], None]
"""As ``Engine.extend``."""


class RequestRunner(Protocol):
    """The part of an engine that runs requests."""

    def submit(self, request: GenerateRequest, emit: Emit) -> object: ...

    def abort(self, request_id: str) -> None: ...


class GatewayConnection:
    """One gateway's socket. When it ends, every request that came from that gateway does."""

    def __init__(self, writer: asyncio.StreamWriter, reader: asyncio.StreamReader, extend: Extend) -> None:
        self._loop, self._extend = asyncio.get_running_loop(), extend
        self._writer, self._reader = writer, reader
        self._unsent: deque[tuple[str, OutputDelta]] = deque()
        self._is_flush_due = False
        self._running: dict[str, asyncio.Future[None]] = {}
        self._watching = self._loop.create_task(self._watch())

    @property
    def is_up(self) -> bool:
        return not self._watching.done()

    async def run(self, request: GenerateRequest, engine: RequestRunner) -> None:
        """Run a request and send its deltas. Returns once the last one is written; cancelling aborts the request.

        Raises:
            ReplicaLost: the connection ended; the request was aborted.
            EngineError: as ``Engine.submit``.
        """
        if not self.is_up:
            raise ReplicaLost("the connection to the gateway was lost")
        engine.submit(request, partial(self.put, request.request_id))
        over = self._running[request.request_id] = self._loop.create_future()
        try:
            await over
        except BaseException:
            engine.abort(request.request_id)
            raise
        finally:
            del self._running[request.request_id]

    def put(self, request_id: str, delta: OutputDelta) -> None:
        """Queue a delta. The engine's thread calls this for each row of a step; the first call wakes the event loop."""
        self._unsent.append((request_id, delta))
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        self._is_flush_due = False  # before the queue is emptied: a later delta asks for a flush of its own
        batch = [self._unsent.popleft() for _ in range(len(self._unsent))]
        if not batch or not self.is_up:
            return
        self._writer.write(pack(batch))
        for request_id, delta in batch:
            over = self._running.get(request_id)
            if delta.finish_reason is not None and over is not None and not over.done():
                over.set_result(None)
        if self._writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            logger.warning("a gateway reads too slowly: its %d requests are aborted", len(self._running))
            self._writer.transport.abort()

    async def _watch(self) -> None:
        """Read deadlines until the connection ends, also while this replica drains; then fail what is running."""
        try:
            while True:
                self._extend(await read_deadlines(self._reader))
        except (OSError, EOFError) as end:
            logger.debug("a gateway's connection ended: %r", end)
        except BadFrame as error:
            logger.error("a gateway's connection was closed: %s", error)
        finally:
            self._writer.transport.abort()
            for over in self._running.values():
                if not over.done():
                    over.set_exception(ReplicaLost("the connection to the gateway was lost"))

    async def close(self) -> None:
        """Send what is written already, then close; requests that still run fail."""
        self._writer.close()
        await asyncio.wait([self._watching], timeout=CONNECT_TIMEOUT_S)
        self._watching.cancel()


class GatewayConnections:
    """A replica's connections: made when a gateway's first request comes, and again after one was lost."""

    def __init__(self, extend: Extend) -> None:
        self._extend = extend
        self._connecting: dict[Address, asyncio.Task[GatewayConnection]] = {}

    async def to(self, gateway: Address) -> GatewayConnection:
        """The connection to a gateway. Raises ReplicaLost if it cannot be reached or does not prove its secret."""
        connecting = self._connecting.get(gateway)
        if connecting is None or (connecting.done() and not _is_up(connecting)):
            self._forget_lost()
            connecting = self._connecting[gateway] = asyncio.create_task(_connect(gateway, self._extend))
        try:
            return await asyncio.shield(connecting)
        except (OSError, EOFError, TimeoutError) as error:
            raise ReplicaLost(f"the gateway at {gateway.host}:{gateway.port} cannot be reached") from error

    def _forget_lost(self) -> None:
        self._connecting = {key: task for key, task in self._connecting.items() if not task.done() or _is_up(task)}

    async def close(self) -> None:
        for connecting in self._connecting.values():
            if connecting.done() and _is_up(connecting):
                await connecting.result().close()
            connecting.cancel()


def _is_up(connecting: asyncio.Task[GatewayConnection]) -> bool:
    return not connecting.cancelled() and connecting.exception() is None and connecting.result().is_up


async def _connect(gateway: Address, extend: Extend) -> GatewayConnection:
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(gateway.host, gateway.port)
        try:
            ours = new_nonce()
            theirs = await reader.readexactly(NONCE_BYTES)
            writer.write(proof(gateway.secret, "replica", theirs) + ours)
            if not is_proof(await reader.readexactly(PROOF_BYTES), gateway.secret, "gateway", ours):
                raise ConnectionRefusedError("the listener at this address is not the gateway that sent the request")
        except BaseException:
            writer.transport.abort()
            raise
        return GatewayConnection(writer, reader, extend)
