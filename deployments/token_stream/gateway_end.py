"""The link to the replicas whose tokens come over sockets of our own, while each job stays one unary Serve call.

Serve keeps routing, backpressure, autoscaling, cancellation and drain; a replica dials this gateway's
listener back and sends all of its jobs' pieces there, one write for each engine step.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping

from ray.serve.handle import DeploymentHandle, DeploymentResponse

from deployments.inference.request import EngineError, EngineFailed, GenerateRequest, OutputDelta
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
from deployments.token_stream.link import Refused, ReplicaLost, SlowReader
from deployments.token_stream.pieces import join
from deployments.token_stream.serve_link import ServeLink, as_engine_error, identity_of

PROOF_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 5.0
MOST_LINES = 1_024
"""Replicas at once; whoever dials beyond is hung up on."""
MOST_UNSENT_BYTES = 1 << 20
"""Of deadlines: a replica that leaves this much unread is given up."""
MOST_WAITING_TOKENS = 4_096
"""Of one request, while its client does not read them."""
PACE_FOR_EACH_S, MOST_PACE_S = 0.0008, 0.025
"""After its first, each stream sends at most this seldom for every other stream that is open, and never more seldom."""
LAST_PIECE_PATIENCE_S = 5.0
"""The call and the last piece end a job on two ways; the one may be this much later than the other."""

logger = logging.getLogger(__name__)


class TokenStream:
    """Pieces of one request on their way to its reader: the first at once, then what has queued for ``pace_s()``."""

    def __init__(self, most_tokens: int, pace_s: Callable[[], float], on_overflow: Callable[[], None]) -> None:
        self._most_tokens, self._pace_s, self._on_overflow = most_tokens, pace_s, on_overflow
        self._loop = asyncio.get_running_loop()
        self._waiting: list[OutputDelta] = []
        self._waiting_tokens = 0
        self._failure: EngineError | asyncio.CancelledError | None = None
        self._is_whole = False
        self._reader: asyncio.Future[None] | None = None
        self._due: asyncio.TimerHandle | None = None
        self._read_at = 0.0
        self.source: object = None
        """The one line that it may come from, known with the first piece."""

    @property
    def is_slow(self) -> bool:
        return isinstance(self._failure, SlowReader)

    @property
    def is_whole(self) -> bool:
        return self._is_whole

    def put(self, piece: OutputDelta) -> None:
        if self._is_whole or self._failure is not None:
            return
        self._waiting.append(piece)
        self._waiting_tokens += len(piece.token_ids)
        self._is_whole = piece.finish_reason is not None
        if self._is_whole:
            self._wake()
        elif self._waiting_tokens > self._most_tokens:
            self.fail(SlowReader(f"the client left {self._waiting_tokens} tokens unread"))
            self._on_overflow()
        elif self._reader is not None and self._due is None:
            self._wake_in_time()

    def fail(self, error: EngineError | asyncio.CancelledError) -> None:
        """What has come is still read, then this is raised. A whole output can no longer fail."""
        if not self._is_whole and self._failure is None:
            self._failure = error
            self._wake()

    async def next(self) -> OutputDelta:
        while not self._waiting or self._is_early:
            if self._failure is not None and not self._waiting:
                raise self._failure
            self._reader = self._loop.create_future()
            if self._waiting:
                self._wake_in_time()
            await self._reader
        pieces, self._waiting, self._waiting_tokens = self._waiting, [], 0
        self._read_at = self._loop.time()
        return join(pieces)

    @property
    def _is_early(self) -> bool:
        is_over = self._is_whole or self._failure is not None
        return not is_over and self._loop.time() < self._read_at + self._pace_s()

    def _wake_in_time(self) -> None:
        when = self._read_at + self._pace_s()
        if when <= self._loop.time():
            self._wake()
        else:
            self._due = self._loop.call_at(when, self._wake)

    def _wake(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class Listener:
    """Where replicas bring this gateway's tokens. Only who proves to know its secret is heard."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(SECRET_BYTES)
        self._inflows: dict[str, TokenStream] = {}
        self._lines: dict[asyncio.StreamWriter, asyncio.Task[object] | None] = {}
        self._proven: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._address: Address | None = None

    async def start(self, host: str) -> None:
        self._server = await asyncio.start_server(self._receive, host, 0)
        self._address = Address(host, self._server.sockets[0].getsockname()[1], self._secret)

    @property
    def is_listening(self) -> bool:
        return self._server is not None and self._server.is_serving()

    @property
    def address(self) -> Address:
        assert self._address is not None, "nothing is sent before the listener listens"
        return self._address

    def open(self, request_id: str, inflow: TokenStream) -> None:
        self._inflows[request_id] = inflow

    def pace_s(self) -> float:
        """How long tokens wait for company: alone not at all, in a crowd a little, for a send costs more than they."""
        return min(MOST_PACE_S, PACE_FOR_EACH_S * (len(self._inflows) - 1))

    def close(self, request_id: str) -> None:
        self._inflows.pop(request_id, None)

    @property
    def slow(self) -> frozenset[str]:
        """Requests that were given up because nobody read their tokens."""
        return frozenset(request_id for request_id, inflow in self._inflows.items() if inflow.is_slow)

    def extend(self, deadlines: Mapping[str, float]) -> None:
        """Tell each replica of its jobs, and of those that have not said where they run.

        One that is still proving itself hears of the next change: until then a job has the deadline it came with.
        """
        for line in self._proven:
            own = {
                request_id: seconds
                for request_id, seconds in deadlines.items()
                if (inflow := self._inflows.get(request_id)) is not None and inflow.source in (None, line)
            }
            if line.transport.get_write_buffer_size() > MOST_UNSENT_BYTES:
                line.transport.abort()
            elif own:
                line.write(pack_deadlines(own))

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for inflow in list(self._inflows.values()):
            inflow.fail(ReplicaLost("this gateway listens no more"))
        ending = {task for task in self._lines.values() if task is not None}
        for line in self._lines:
            line.transport.abort()
        if ending:
            await asyncio.wait(ending, timeout=STOP_TIMEOUT_S)

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One replica's line, from its proof to its end: then all that came over it has failed."""
        if len(self._lines) >= MOST_LINES:
            writer.transport.abort()
            return
        self._lines[writer] = asyncio.current_task()
        try:
            if not await self._greet(reader, writer):
                logger.warning("somebody without the secret dialled the token listener")
                return
            self._proven.add(writer)
            while True:
                for request_id, piece in await read_batch(reader):
                    self._deliver(request_id, piece, writer)
        except (OSError, EOFError, TimeoutError) as end:
            logger.debug("a replica's line ended: %r", end)
        except BadFrame as error:
            logger.error("a replica's line is closed: %s", error)
        finally:
            del self._lines[writer]
            self._proven.discard(writer)
            writer.transport.abort()
            self._lose(writer)

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        nonce = new_nonce()
        writer.write(nonce)
        async with asyncio.timeout(PROOF_TIMEOUT_S):
            claimed = await reader.readexactly(PROOF_BYTES)
            theirs = await reader.readexactly(NONCE_BYTES)
        if not is_proof(claimed, self._secret, "replica", nonce):
            return False
        writer.write(proof(self._secret, "gateway", theirs))
        return True

    def _deliver(self, request_id: str, piece: OutputDelta, source: object) -> None:
        inflow = self._inflows.get(request_id)
        if inflow is None:
            return  # its client left; the engine is being told on the call's own way
        if inflow.source not in (None, source):
            raise BadFrame(f"pieces of request {request_id}, which runs elsewhere")
        inflow.source = source
        inflow.put(piece)

    def _lose(self, source: object) -> None:
        for inflow in list(self._inflows.values()):
            if inflow.source is source:
                inflow.fail(ReplicaLost("the socket to the replica that ran this request was lost"))


class SocketLink(ServeLink):
    """A ``ReplicaLink`` on one deployment's handle and a listener of its own."""

    def __init__(self, handle: DeploymentHandle[object], most_waiting_tokens: int = MOST_WAITING_TOKENS) -> None:
        super().__init__(handle)
        self._listener = Listener()
        self._most_waiting_tokens = most_waiting_tokens
        self._calls: set[asyncio.Task[None]] = set()

    async def start(self, host: str) -> None:
        """Listen on this node's address, on a port that the system chooses."""
        await self._listener.start(host)

    async def generate(self, job: GenerateRequest) -> AsyncGenerator[OutputDelta, None]:
        call = self._handle.options(multiplexed_model_id=identity_of(job)).run.remote(job, self._listener.address)
        inflow = TokenStream(self._most_waiting_tokens, self._listener.pace_s, call.cancel)
        self._listener.open(job.request_id, inflow)
        self._watch(call, inflow)
        is_over = False
        try:
            while not is_over:
                piece = await inflow.next()
                is_over = piece.finish_reason is not None
                yield piece
        finally:
            self._listener.close(job.request_id)
            if not is_over:
                call.cancel()

    async def extend(self, deadlines: Mapping[str, float]) -> frozenset[str]:
        """Over the sockets: Serve's broadcast passes over a replica that drains, which has jobs to finish."""
        self._listener.extend(deadlines)
        return self._listener.slow

    async def close(self) -> None:
        await self._listener.stop()
        for watching in self._calls:
            watching.cancel()

    def _watch(self, call: DeploymentResponse[object], inflow: TokenStream) -> None:
        """The call's end is kept in sight for as long as it takes, also after the last piece."""
        watching = asyncio.get_running_loop().create_task(_follow(call, inflow))
        self._calls.add(watching)
        watching.add_done_callback(self._calls.discard)


async def _follow(call: DeploymentResponse[object], inflow: TokenStream) -> None:
    """Tell the reader how the call ended, where the pieces do not say it."""
    try:
        answer = await call
    except asyncio.CancelledError as left:  # by Serve, which saw the client leave: the reader is about to know
        inflow.fail(left)
        return
    except Exception as error:  # noqa: BLE001, whatever it is, the reader waits for an answer
        inflow.fail(as_engine_error(error))
        return
    if isinstance(answer, Refused):
        inflow.fail(answer.as_error())
    elif not inflow.is_whole:
        await asyncio.sleep(LAST_PIECE_PATIENCE_S)
        inflow.fail(EngineFailed("the replica ended this request without its last piece"))
