"""What a gateway needs of the replicas. ``ServeReplicaLink`` calls them through Serve; tests have a scripted one."""

from collections.abc import AsyncGenerator, Mapping
from typing import Protocol

from deployments.inference.request import EngineStats, GenerateRequest, OutputDelta


class ReplicaLink(Protocol):
    """Runs requests on replicas. Closing the iterator of a request aborts it."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[OutputDelta, None]:
        """Deltas of the request's output; the last one has a finish reason.

        Raises:
            Overloaded: nothing was computed.
            RequestRejected, AdapterRejected: the request cannot run.
            ReplicaLost, EngineFailed: our fault, at any point.
            SlowReader: the client's fault, after the deltas that it read.
        """
        ...

    async def extend(self, deadlines: Mapping[str, float]) -> frozenset[str]:
        """Set the deadlines of running requests, in seconds from now, by request id; best effort.

        Returns the requests that were cancelled because their client does not read, and so may never see the error.
        """
        ...

    async def is_ready(self) -> bool:
        """Whether a replica answers."""
        ...

    async def stats(self) -> Mapping[str, EngineStats]:
        """Every replica's own counters, by the replica's id; those that do not answer are left out."""
        ...
