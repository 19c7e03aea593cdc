"""What the benchmark of the token path serves: the product's token stream, Serve's streaming, and their floor.

At one end is a gateway that only streams (no key, no hold, no settlement), at the other an engine that computes nothing
behind the product's own ``LoraReplica``. ``FLOOR`` has the engine in the gateway's process. ``SERVE`` sends each token
over Serve's streaming calls, which the product does not do.
"""

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator
from functools import partial

import ray
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from deployments.gateway.edge import new_request_id
from deployments.inference.request import GenerateRequest, OutputDelta, SamplingParams
from deployments.replica.replica import LoraReplica
from deployments.token_stream.gateway_end import ServeReplicaLink
from deployments.token_stream.replica_end import GatewayConnections
from deployments.token_stream.stream import TokenStream
from tests.support.clockwork import ClockworkEngine

FLOOR, SOCKET, SERVE = "floor", "socket", "serve"
STEP_S = 0.005
PROMPT = tuple(range(100))


class Replica(LoraReplica):
    """The product's replica around an engine that computes nothing."""

    async def __init__(self) -> None:  # type: ignore[misc]
        engine = ClockworkEngine(step_s=STEP_S)
        engine.start()
        self._engine, self._gateways = engine, GatewayConnections(engine.extend)  # type: ignore[assignment]

    async def check_health(self) -> None:
        """This engine does not fail."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[OutputDelta, None]:
        """Every delta at once, over Serve's streaming call."""
        loop, deltas = asyncio.get_running_loop(), asyncio.Queue[OutputDelta]()
        self._engine.submit(request, lambda delta: loop.call_soon_threadsafe(deltas.put_nowait, delta))
        while True:
            delta = await deltas.get()
            yield delta
            if delta.finish_reason is not None:
                return


class InProcess:
    """A link to an engine in this process, with one wake-up of the event loop for each step."""

    def __init__(self) -> None:
        self._engine = ClockworkEngine(step_s=STEP_S)
        self._engine.start()
        self._loop = asyncio.get_running_loop()
        self._unsent: deque[tuple[TokenStream, OutputDelta]] = deque()
        self._is_flush_due = False

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[OutputDelta, None]:
        stream = TokenStream(4096, lambda: 0.0, lambda: None)
        self._engine.submit(request, partial(self._put, stream))
        while True:
            delta = await stream.next()
            yield delta
            if delta.finish_reason is not None:
                return

    def _put(self, stream: TokenStream, delta: OutputDelta) -> None:
        self._unsent.append((stream, delta))
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        self._is_flush_due = False
        for stream, delta in [self._unsent.popleft() for _ in range(len(self._unsent))]:
            stream.put(delta)


class ServeStreaming:
    """A link over Serve's streaming calls."""

    def __init__(self, handle: "DeploymentHandle[object]") -> None:
        self._handle = handle

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[OutputDelta, None]:
        async for delta in self._handle.options(stream=True).generate.remote(request):
            yield delta


class Gateway:
    """Streams a request's deltas as OpenAI's chunks."""

    async def __init__(self, transport: str, handle: "DeploymentHandle[object] | None" = None) -> None:  # type: ignore[misc]
        self._link: InProcess | ServeStreaming | ServeReplicaLink
        if handle is None:
            self._link = InProcess()
        elif transport == SERVE:
            self._link = ServeStreaming(handle)
        else:
            self._link = ServeReplicaLink(handle)
            await self._link.start(ray.util.get_node_ip_address())

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return Starlette(routes=[Route("/{tokens:int}", self._answer, methods=["POST"])])

    async def _answer(self, request: Request) -> StreamingResponse:
        await request.body()
        tokens = int(request.path_params["tokens"])
        asked = GenerateRequest(new_request_id(), PROMPT, SamplingParams(max_tokens=tokens))
        return StreamingResponse(_events(self._link.generate(asked), asked.request_id), media_type="text/event-stream")


async def _events(deltas: AsyncGenerator[OutputDelta, None], request_id: str) -> AsyncGenerator[str, None]:
    base = {"id": request_id, "created": 0, "model": "base", "object": "chat.completion.chunk"}
    async for delta in deltas:
        reason = delta.finish_reason.value if delta.finish_reason else None
        choice = {"index": 0, "delta": {"content": delta.text}, "logprobs": None, "finish_reason": reason}
        yield f"data: {json.dumps(base | {'choices': [choice]}, separators=(',', ':'))}\n\n"
    yield "data: [DONE]\n\n"


def build(args: dict[str, str]) -> Application:
    """One transport, and its two ends."""
    transport = args["transport"]
    gateway = serve.deployment(name="Gateway", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.1})(
        serve.ingress()(Gateway)
    )
    if transport == FLOOR:
        return gateway.bind(transport)
    replica = serve.deployment(name="LoraReplica", max_ongoing_requests=300, ray_actor_options={"num_cpus": 0.1})(
        Replica
    )
    return gateway.bind(transport, replica.bind())
