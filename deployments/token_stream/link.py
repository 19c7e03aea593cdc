"""The Gateway's narrow face to the replicas, so that the transport can change behind it.

Knows how a job travels and how its loss shows; knows no tenant and no money.
"""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from deployments.inference.request import (
    AdapterRejected,
    EngineError,
    EngineFailed,
    EngineStats,
    GenerateRequest,
    OutputDelta,
    Overloaded,
    RequestRejected,
)


class ReplicaLost(EngineError):
    """The replica or the way to it is gone; what it would have generated is lost."""


class SlowReader(EngineError):
    """The client left so many tokens unread that the request was cancelled rather than buffered on."""


class RefusalKind(StrEnum):
    OVERLOADED = "overloaded"
    REQUEST = "request"
    ADAPTER = "adapter"
    LOST = "lost"
    FAILED = "failed"


REFUSALS: Mapping[RefusalKind, type[EngineError]] = {
    RefusalKind.OVERLOADED: Overloaded,
    RefusalKind.REQUEST: RequestRejected,
    RefusalKind.ADAPTER: AdapterRejected,
    RefusalKind.LOST: ReplicaLost,
    RefusalKind.FAILED: EngineFailed,
}


@dataclass(frozen=True, slots=True)
class Refused:
    """A replica's refusal as a value: an exception would travel with a traceback and fill the logs."""

    kind: RefusalKind
    reason: str

    @classmethod
    def of(cls, error: EngineError) -> "Refused":
        kinds = (kind for kind, shape in REFUSALS.items() if isinstance(error, shape))
        return cls(next(kinds, RefusalKind.FAILED), str(error))

    def as_error(self) -> EngineError:
        return REFUSALS[self.kind](self.reason)


class ReplicaLink(Protocol):
    """Runs jobs somewhere. Closing the iterator of a job aborts it."""

    def generate(self, job: GenerateRequest) -> AsyncGenerator[OutputDelta, None]:
        """Pieces of the job's output; the last one has a finish reason.

        Raises:
            Overloaded: nothing was computed.
            RequestRejected, AdapterRejected: it cannot run.
            ReplicaLost, EngineFailed: our fault, at any point.
            SlowReader: the client's, after pieces that it had read.
        """
        ...

    async def extend(self, deadlines: Mapping[str, float]) -> frozenset[str]:
        """Give running jobs that many more seconds from now, by request id; best effort.

        Returns those that were cancelled because their client does not read: it may never come for the error.
        """
        ...

    async def is_ready(self) -> bool:
        """Does a replica answer?"""
        ...

    async def stats(self) -> Mapping[str, EngineStats]:
        """Every replica's own counters, by the replica's id; those that do not answer are left out."""
        ...
