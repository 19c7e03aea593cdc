"""Which replica takes a request: the one where its adapter lies, unless another is idle enough to take a share.

Knows what replicas advertise and how many requests each has; what an adapter is does not matter here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from ray.serve.request_router import (
    FIFOMixin,
    MultiplexMixin,
    PendingRequest,
    RequestRouter,
    RunningReplica,
)

SPREAD_AFTER = 8


@dataclass(frozen=True, slots=True)
class Seen:
    """One replica as a router sees it."""

    id: str
    adapters: frozenset[str]
    """What it advertises."""
    requests: int
    """Running or waiting there, as far as this router knows."""


def rank(adapter: str, replicas: Sequence[Seen], spread_after: int) -> list[list[int]]:
    """Positions of replicas in order of preference; those in one list are equally good, the least busy wins.

    A replica that holds the adapter is asked first, unless it has ``spread_after`` more requests than the
    least busy one: then a hot adapter moves in there as well. An adapter that is nowhere yet goes to the
    replica with the fewest, and among those always to the same one, whichever gateway asks.
    """
    if not adapter or not replicas:
        return [list(range(len(replicas)))]
    least = min(seen.requests for seen in replicas)
    near = [position for position, seen in enumerate(replicas) if seen.requests < least + spread_after]
    holders = [position for position in near if adapter in replicas[position].adapters]
    others = [position for position in range(len(replicas)) if position not in holders]
    others.sort(key=lambda p: (p not in near, len(replicas[p].adapters), _lot(adapter, replicas[p].id)))
    return [ranked for ranked in (holders, *([position] for position in others)) if ranked]


def _lot(adapter: str, replica_id: str) -> bytes:
    """Alike in every process, and another order for each adapter."""
    return blake2b(f"{adapter} {replica_id}".encode(), digest_size=8).digest()


class AdapterRouter(FIFOMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]
    """Serve's router for ``LoraReplica``: ``rank`` on what Serve tells of its replicas."""

    _spread_after = SPREAD_AFTER

    def initialize_state(self, spread_after: int = SPREAD_AFTER) -> None:
        """Serve passes ``request_router_kwargs`` here."""
        self._spread_after = spread_after

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        adapter = ""
        if pending_request is not None:
            adapter = pending_request.metadata.multiplexed_model_id
            pending_request.routing_context.should_backoff = True  # every replica was named: wait before the next try
        seen = [self._see(replica) for replica in candidate_replicas]
        return [[candidate_replicas[p] for p in ranked] for ranked in rank(adapter, seen, self._spread_after)]

    def _see(self, replica: RunningReplica) -> Seen:
        requests = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return Seen(replica.replica_id.unique_id, frozenset(replica.multiplexed_model_ids), requests)
