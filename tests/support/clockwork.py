"""An engine of clockwork and a Serve handle that calls in process: the token sockets without Ray.

The engine's thread steps like a real one: each step emits one token for every job, in the order of their coming.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from deployments.inference.request import Emit, EngineError, FinishReason, GenerateRequest, OutputDelta, SamplingParams
from deployments.token_stream.frames import Address
from deployments.token_stream.gateway_end import SocketLink
from deployments.token_stream.link import Refused
from deployments.token_stream.replica_end import Lines


@dataclass
class ClockworkEngine:
    """Every job gets ``max_tokens`` tokens, one in each step; a step comes when ``step_s`` is over."""

    step_s: float = 0.001
    refusal: EngineError | None = None
    aborted: list[str] = field(default_factory=list)
    emitted: dict[str, int] = field(default_factory=dict)
    extended: list[dict[str, float]] = field(default_factory=list)
    _jobs: dict[str, tuple[GenerateRequest, Emit]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def submit(self, request: GenerateRequest, emit: Emit) -> None:
        if self.refusal is not None:
            raise self.refusal
        with self._lock:
            self._jobs[request.request_id] = request, emit

    def abort(self, request_id: str) -> None:
        with self._lock:
            if self._jobs.pop(request_id, None) is not None:
                self.aborted.append(request_id)

    def extend(self, deadlines: Mapping[str, float]) -> None:
        """Kept to be looked at: clockwork has no deadlines."""
        self.extended.append(dict(deadlines))

    @property
    def running(self) -> int:
        return len(self._jobs)

    def _run(self) -> None:
        while not self._stopping.is_set():
            time.sleep(self.step_s)
            with self._lock:
                for request_id, (request, emit) in list(self._jobs.items()):
                    emit(self._piece(request))
                    if self.emitted[request_id] == request.sampling.max_tokens:
                        del self._jobs[request_id]

    def _piece(self, request: GenerateRequest) -> OutputDelta:
        number = self.emitted.get(request.request_id, 0)
        self.emitted[request.request_id] = number + 1
        is_last = number + 1 == request.sampling.max_tokens
        return OutputDelta(
            token_ids=(number,),
            text=f"tok{number} ",
            prompt_tokens=len(request.prompt_token_ids),
            cached_tokens=0,
            completion_tokens=number + 1,
            compute_ms=number + 1,
            finish_reason=FinishReason.LENGTH if is_last else None,
        )


class Call:
    """A running unary call: awaited for its answer, or cancelled, as Serve's ``DeploymentResponse``."""

    def __init__(self, work: Coroutine[None, None, object]) -> None:
        self._task = asyncio.get_running_loop().create_task(work)

    def __await__(self):  # type: ignore[no-untyped-def]
        return asyncio.shield(self._task).__await__()

    def cancel(self) -> None:
        self._task.cancel()


@dataclass
class ClockworkHandle:
    """One replica in this process behind a handle of Serve's shape."""

    engine: ClockworkEngine
    lines: Lines
    ends_silently: bool = False
    """The call returns at once and nothing is ever sent."""
    failure: BaseException | None = None
    calls: int = 0

    def options(self, **_: object) -> "ClockworkHandle":
        return self

    @property
    def run(self) -> "ClockworkHandle":
        return self

    def remote(self, job: GenerateRequest, gateway: Address) -> Call:
        self.calls += 1
        return Call(self._serve(job, gateway))

    async def _serve(self, job: GenerateRequest, gateway: Address) -> object:
        if self.failure is not None:
            raise self.failure
        if self.ends_silently:
            return None
        try:
            await (await self.lines.to(gateway)).carry(job, self.engine)
        except EngineError as error:
            return Refused.of(error)
        return None


@dataclass
class Path:
    """A whole way from engine to gateway over a real socket."""

    engine: ClockworkEngine
    handle: ClockworkHandle
    link: SocketLink

    async def read(self, request_id: str, max_tokens: int = 5) -> list[OutputDelta]:
        return [piece async for piece in self.link.generate(job_of(request_id, max_tokens))]


@asynccontextmanager
async def token_path(engine: ClockworkEngine, most_waiting_tokens: int = 4096) -> AsyncIterator[Path]:
    handle = ClockworkHandle(engine, Lines(engine.extend))
    link = SocketLink(handle, most_waiting_tokens)  # type: ignore[arg-type]
    await link.start("127.0.0.1")
    engine.start()
    try:
        yield Path(engine, handle, link)
    finally:
        await handle.lines.close()
        await link.close()
        engine.stop()


def job_of(request_id: str, max_tokens: int = 5) -> GenerateRequest:
    return GenerateRequest(request_id, (1, 2, 3), SamplingParams(max_tokens=max_tokens))
