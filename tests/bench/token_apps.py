"""What the token path's benchmark serves: the product's two transports and its floor, each between the same ends.

The ends are a gateway that only streams (no key, no hold, no settle) and an engine of clockwork behind the
product's own ``LoraReplica``. In the floor the engine stands in the gateway: nothing travels.
"""

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator
from functools import partial

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from deployments.gateway.edge import new_request_id
from deployments.gateway.ingress import open_link
from deployments.inference.request import GenerateRequest, OutputDelta, SamplingParams
from deployments.replica.replica import LoraReplica
from deployments.token_stream import pieces
from deployments.token_stream.gateway_end import TokenStream
from deployments.token_stream.replica_end import Lines
from tests.support.clockwork import ClockworkEngine

FLOOR, SOCKET, SERVE, SERVE_EACH = "floor", "socket", "serve", "serve-each"
STEP_S = 0.005
PROMPT = tuple(range(100))


class Replica(LoraReplica):
    """The product's, around clockwork."""

    async def __init__(self, transport: str) -> None:  # type: ignore[misc]
        engine = ClockworkEngine(step_s=STEP_S)
        engine.start()
        self._engine, self._lines = engine, Lines(engine.extend)  # type: ignore[assignment]
        if transport == SERVE_EACH:
            pieces.SEND_INTERVAL_S = 0.0

    async def check_health(self) -> None:
        """Clockwork does not fail."""


class InProcess:
    """A link to an engine in this process: one wake-up of the event loop for each step, and nothing else."""

    def __init__(self) -> None:
        self._engine = ClockworkEngine(step_s=STEP_S)
        self._engine.start()
        self._loop = asyncio.get_running_loop()
        self._unsent: deque[tuple[TokenStream, OutputDelta]] = deque()
        self._is_due = False

    async def generate(self, job: GenerateRequest) -> AsyncGenerator[OutputDelta, None]:
        inflow = TokenStream(4096, lambda: 0.0, lambda: None)
        self._engine.submit(job, partial(self._put, inflow))
        while True:
            piece = await inflow.next()
            yield piece
            if piece.finish_reason is not None:
                return

    def _put(self, inflow: TokenStream, piece: OutputDelta) -> None:
        self._unsent.append((inflow, piece))
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        self._is_due = False
        for inflow, piece in [self._unsent.popleft() for _ in range(len(self._unsent))]:
            inflow.put(piece)


class Gateway:
    """Streams a job's pieces as OpenAI's chunks."""

    async def __init__(self, transport: str, handle: "DeploymentHandle[object] | None" = None) -> None:  # type: ignore[misc]
        self._link = InProcess() if handle is None else await open_link(handle, transport.partition("-")[0])

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return Starlette(routes=[Route("/{tokens:int}", self._answer, methods=["POST"])])

    async def _answer(self, request: Request) -> StreamingResponse:
        await request.body()
        tokens = int(request.path_params["tokens"])
        job = GenerateRequest(new_request_id(), PROMPT, SamplingParams(max_tokens=tokens))
        return StreamingResponse(_events(self._link.generate(job), job.request_id), media_type="text/event-stream")


async def _events(pieces: AsyncGenerator[OutputDelta, None], request_id: str) -> AsyncGenerator[str, None]:
    base = {"id": request_id, "created": 0, "model": "base", "object": "chat.completion.chunk"}
    async for piece in pieces:
        reason = piece.finish_reason.value if piece.finish_reason else None
        choice = {"index": 0, "delta": {"content": piece.text}, "logprobs": None, "finish_reason": reason}
        yield f"data: {json.dumps(base | {'choices': [choice]}, separators=(',', ':'))}\n\n"
    yield "data: [DONE]\n\n"


def build(args: dict[str, str]) -> Application:
    """One transport between its two ends."""
    transport = args["transport"]
    gateway = serve.deployment(name="Gateway", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.1})(
        serve.ingress()(Gateway)
    )
    if transport == FLOOR:
        return gateway.bind(transport)
    replica = serve.deployment(name="LoraReplica", max_ongoing_requests=300, ray_actor_options={"num_cpus": 0.1})(
        Replica
    )
    return gateway.bind(transport, replica.bind(transport))
