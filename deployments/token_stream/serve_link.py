"""The link to the replicas over Serve's own streaming calls: its routing, backpressure, cancellation and drain.

Knows Ray's errors and what each means for a job.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress

from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.inference.request import (
    EngineError,
    EngineFailed,
    EngineStats,
    GenerateRequest,
    OutputDelta,
    Overloaded,
)
from deployments.token_stream.link import Refused, ReplicaLost

READY_TIMEOUT_S = 1.0
BROADCAST_TIMEOUT_S = 2.0

logger = logging.getLogger(__name__)


class ServeLink:
    """A ``ReplicaLink`` on one deployment's handle."""

    def __init__(self, handle: DeploymentHandle[object]) -> None:
        self._handle = handle

    async def generate(self, job: GenerateRequest) -> AsyncGenerator[OutputDelta, None]:
        call = self._handle.options(stream=True, multiplexed_model_id=identity_of(job)).generate.remote(job)
        is_over = False
        try:
            async for piece in call:
                if isinstance(piece, Refused):
                    is_over = True
                    raise piece.as_error()
                is_over = piece.finish_reason is not None
                yield piece
        except (RayError, BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError) as error:
            raise as_engine_error(error) from error
        finally:
            if not is_over:
                call.cancel()

    async def extend(self, deadlines: Mapping[str, float]) -> frozenset[str]:
        with suppress(RayError, TimeoutError, DeploymentUnavailableError):
            calls = self._handle.broadcast("extend", dict(deadlines))
            await calls.results_async(timeout_s=BROADCAST_TIMEOUT_S, return_exceptions=True)
        return frozenset()

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
        """Nothing here outlives its calls."""


def identity_of(job: GenerateRequest) -> str:
    """The adapter's name for Serve's router; empty for the base model, which is at home everywhere."""
    adapter = job.adapter
    return f"{adapter.name}@{adapter.digest[:12]}" if adapter else ""


def as_engine_error(error: Exception) -> EngineError:
    """What an error of Serve's means for a job."""
    if isinstance(error, BackPressureError | DeploymentUnavailableError):
        return Overloaded("every replica is busy or starting: retry shortly")
    if isinstance(error, RayActorError | ReplicaUnavailableError | TaskCancelledError):
        return ReplicaLost("the replica that ran this request is gone: retry")
    if not isinstance(error, RayError):
        logger.error("a call to a replica failed: %r", error)
    return EngineFailed("the replica failed on this request: retry, and tell the operator if it stays")
