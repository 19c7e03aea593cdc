"""How a request ends when a replica refuses it, or is lost on the way."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from deployments.inference.request import (
    AdapterRejected,
    EngineError,
    EngineFailed,
    Overloaded,
    RequestRejected,
)


class ReplicaLost(EngineError):
    """The replica or the connection to it is gone; what it would have generated is lost."""


class SlowReader(EngineError):
    """The client left so many tokens unread that its request was cancelled."""


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
    """A replica's refusal as the value of a Serve call: an exception would fill the logs with tracebacks."""

    kind: RefusalKind
    reason: str

    @classmethod
    def of(cls, error: EngineError) -> "Refused":
        kinds = (kind for kind, shape in REFUSALS.items() if isinstance(error, shape))
        return cls(next(kinds, RefusalKind.FAILED), str(error))

    def as_error(self) -> EngineError:
        return REFUSALS[self.kind](self.reason)
