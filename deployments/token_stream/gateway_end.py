"""The gateway's end of the token stream: a Serve call for each request, and a socket on which its tokens arrive.

Serve does the routing, backpressure, autoscaling, cancellation and draining. The replica connects back to this
gateway's listener and sends there the deltas of all of this gateway's requests, with one write for each engine step.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress

from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from deployments.inference.request import (
    EngineError,
    EngineFailed,
    EngineStats,
    GenerateRequest,
    OutputDelta,
    Overloaded,
)
from deployments.token_stream.errors import Refused, ReplicaLost
from deployments.token_stream.frames import (
    NONCE_BYTES,
    PROOF_BYTES,
    SECRET_BYTES,
    Address,
    BadFrame,
    is_proof,
    new_nonce,
    pack_deadlines,
    proof,
    read_batch,
)
from deployments.token_stream.stream import TokenStream

READY_TIMEOUT_S = 1.0
BROADCAST_TIMEOUT_S = 2.0
PROOF_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 1_024
"""Replicas at once; further connections are closed."""
MAX_UNSENT_BYTES = 1 << 20
"""Of deadlines: a replica that leaves more than this unread is disconnected."""
MAX_UNREAD_TOKENS = 4_096
"""Of one request, while its client does not read them."""
PACE_PER_STREAM_S, MAX_PACE_S = 0.0008, 0.025
"""A stream waits this long between two deltas for every other stream that is open, up to the maximum."""
LAST_DELTA_TIMEOUT_S = 5.0
"""The last delta may arrive this much later than the end of the Serve call: they come by two ways."""

logger = logging.getLogger(__name__)


class TokenListener:
    """Accepts connections of replicas that prove knowledge of its secret, and hands deltas to their streams."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(SECRET_BYTES)
        self._streams: dict[str, TokenStream] = {}
        self._connections: dict[asyncio.StreamWriter, asyncio.Task[object] | None] = {}
        self._proven: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._address: Address | None = None

    async def start(self, host: str) -> None:
        """Listen on a port of ``host`` that the system chooses."""
        self._server = await asyncio.start_server(self._receive, host, 0)
        self._address = Address(host, self._server.sockets[0].getsockname()[1], self._secret)

    @property
    def address(self) -> Address:
        assert self._address is not None, "no request is sent before the listener has started"
        return self._address

    @property
    def connections(self) -> int:
        """Open connections, whether or not the replica has proved knowledge of the secret."""
        return len(self._connections)

    def open(self, request_id: str, stream: TokenStream) -> None:
        self._streams[request_id] = stream

    def close(self, request_id: str) -> None:
        self._streams.pop(request_id, None)

    def pace_s(self) -> float:
        """Seconds between two deltas of a stream: 0 for a single stream, more for many."""
        return min(MAX_PACE_S, PACE_PER_STREAM_S * (len(self._streams) - 1))

    @property
    def slow(self) -> frozenset[str]:
        """Requests that were cancelled because their client does not read."""
        return frozenset(request_id for request_id, stream in self._streams.items() if stream.is_slow)

    def extend(self, deadlines: Mapping[str, float]) -> None:
        """Send each replica the deadlines of its requests, and of those whose replica has not answered yet.

        A replica that has not proved knowledge of the secret is left out until the next call: until then its requests
        have the deadline that they came with.
        """
        for connection in self._proven:
            own = {
                request_id: seconds
                for request_id, seconds in deadlines.items()
                if (stream := self._streams.get(request_id)) is not None and stream.source in (None, connection)
            }
            if connection.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
                connection.transport.abort()
            elif own:
                connection.write(pack_deadlines(own))

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for stream in list(self._streams.values()):
            stream.fail(ReplicaLost("this gateway no longer accepts tokens"))
        ending = {task for task in self._connections.values() if task is not None}
        self.drop_connections()
        if ending:
            await asyncio.wait(ending, timeout=STOP_TIMEOUT_S)

    def drop_connections(self) -> None:
        """Close every connection; the requests whose tokens came over them fail, and replicas may connect again."""
        for connection in self._connections:
            connection.transport.abort()

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one replica's connection; when it ends, the requests whose deltas came over it fail."""
        if len(self._connections) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._connections[writer] = asyncio.current_task()
        try:
            if not await self._handshake(reader, writer):
                logger.warning("a connection to the token listener was closed: wrong secret")
                return
            self._proven.add(writer)
            while True:
                for request_id, delta in await read_batch(reader):
                    self._deliver(request_id, delta, writer)
        except (OSError, EOFError, TimeoutError) as end:
            logger.debug("a replica's connection ended: %r", end)
        except BadFrame as error:
            logger.error("a replica's connection was closed: %s", error)
        finally:
            del self._connections[writer]
            self._proven.discard(writer)
            writer.transport.abort()
            self._fail_streams_of(writer)

    async def _handshake(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Both sides prove knowledge of the secret: the replica first."""
        nonce = new_nonce()
        writer.write(nonce)
        async with asyncio.timeout(PROOF_TIMEOUT_S):
            claimed = await reader.readexactly(PROOF_BYTES)
            theirs = await reader.readexactly(NONCE_BYTES)
        if not is_proof(claimed, self._secret, "replica", nonce):
            return False
        writer.write(proof(self._secret, "gateway", theirs))
        return True

    def _deliver(self, request_id: str, delta: OutputDelta, source: object) -> None:
        stream = self._streams.get(request_id)
        if stream is None:
            return  # its client left; the Serve call's cancellation is on its way to the engine
        if stream.source not in (None, source):
            raise BadFrame(f"deltas of request {request_id}, which runs on another replica")
        stream.source = source
        stream.put(delta)

    def _fail_streams_of(self, source: object) -> None:
        for stream in list(self._streams.values()):
            if stream.source is source:
                stream.fail(ReplicaLost("the connection to the replica that ran this request was lost"))


class ServeReplicaLink:
    """A ``ReplicaLink`` to the replicas behind one Serve handle."""

    def __init__(self, handle: DeploymentHandle[object], max_unread_tokens: int = MAX_UNREAD_TOKENS) -> None:
        self._handle, self._max_unread_tokens = handle, max_unread_tokens
        self._calls: set[asyncio.Task[None]] = set()
        self.listener = TokenListener()

    async def start(self, host: str) -> None:
        """Listen for tokens on this node's address, on a port that the system chooses."""
        await self.listener.start(host)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[OutputDelta, None]:
        routed = self._handle.options(multiplexed_model_id=_routing_key(request))
        call = routed.run.remote(request, self.listener.address)
        stream = TokenStream(self._max_unread_tokens, self.listener.pace_s, call.cancel)
        self.listener.open(request.request_id, stream)
        self._watch(call, stream)
        is_over = False
        try:
            while not is_over:
                delta = await stream.next()
                is_over = delta.finish_reason is not None
                yield delta
        finally:
            self.listener.close(request.request_id)
            if not is_over:
                call.cancel()

    async def extend(self, deadlines: Mapping[str, float]) -> frozenset[str]:
        """Over the sockets: Serve's broadcast leaves out a replica that drains, which has requests to finish."""
        self.listener.extend(deadlines)
        return self.listener.slow

    async def is_ready(self) -> bool:
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                return bool(await self._handle.ping.remote())
        except (TimeoutError, RayError, BackPressureError, DeploymentUnavailableError):
            return False

    async def stats(self) -> Mapping[str, EngineStats]:
        with suppress(RayError, TimeoutError, DeploymentUnavailableError):
            calls = self._handle.broadcast("stats")
            answers = await calls.results_async(timeout_s=BROADCAST_TIMEOUT_S, return_exceptions=True)
            return dict(answer for answer in answers if isinstance(answer, tuple))
        return {}

    async def close(self) -> None:
        await self.listener.stop()
        for watching in self._calls:
            watching.cancel()

    def _watch(self, call: DeploymentResponse[object], stream: TokenStream) -> None:
        """Await the call in a task of its own, also after the last delta."""
        watching = asyncio.get_running_loop().create_task(_follow(call, stream))
        self._calls.add(watching)
        watching.add_done_callback(self._calls.discard)


async def _follow(call: DeploymentResponse[object], stream: TokenStream) -> None:
    """Fail the stream with what ended the call, where the deltas do not say it."""
    try:
        answer = await call
    except asyncio.CancelledError as cancelled:  # by Serve, which saw the client disconnect
        stream.fail(cancelled)
        return
    except Exception as error:  # noqa: BLE001, whatever it is, the reader must not wait for ever
        stream.fail(_as_engine_error(error))
        return
    if isinstance(answer, Refused):
        stream.fail(answer.as_error())
    elif not stream.is_complete:
        await asyncio.sleep(LAST_DELTA_TIMEOUT_S)
        stream.fail(EngineFailed("the replica ended this request without its last delta"))


def _routing_key(request: GenerateRequest) -> str:
    """The adapter's name for Serve's router; empty for the base model, which every replica has."""
    adapter = request.adapter
    return f"{adapter.name}@{adapter.digest[:12]}" if adapter else ""


def _as_engine_error(error: Exception) -> EngineError:
    """The engine error that stands for an exception of a Serve call."""
    if isinstance(error, BackPressureError | DeploymentUnavailableError):
        return Overloaded("every replica is busy or starting: retry shortly")
    if isinstance(error, RayActorError | ReplicaUnavailableError | TaskCancelledError):
        return ReplicaLost("the replica that ran this request is gone: retry")
    if not isinstance(error, RayError):
        logger.error("a call to a replica failed: %r", error)
    return EngineFailed("the replica failed on this request: retry, and tell the operator if it stays")
