"""Route a request to a replica where its adapter is resident, unless that replica is much busier than another."""

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
class Candidate:
    """One replica as the router sees it."""

    id: str
    adapters: frozenset[str]
    """Adapters that it advertises as resident."""
    requests: int
    """Running or waiting there, by this router's own count."""


def rank(adapter: str, replicas: Sequence[Candidate], spread_after: int) -> list[list[int]]:
    """Positions of replicas in order of preference; of those in one list the least busy is taken.

    Replicas that have the adapter come first, unless they have ``spread_after`` more requests than the least busy one:
    then a hot adapter is loaded there too. An adapter that is resident nowhere goes to the replica with the fewest
    adapters; every gateway breaks ties in the same way.
    """
    if not adapter or not replicas:
        return [list(range(len(replicas)))]
    least = min(replica.requests for replica in replicas)
    near = [position for position, replica in enumerate(replicas) if replica.requests < least + spread_after]
    holders = [position for position in near if adapter in replicas[position].adapters]
    others = [position for position in range(len(replicas)) if position not in holders]
    others.sort(key=lambda p: (p not in near, len(replicas[p].adapters), _tie_break(adapter, replicas[p].id)))
    return [ranked for ranked in (holders, *([position] for position in others)) if ranked]


def _tie_break(adapter: str, replica_id: str) -> bytes:
    """The same in every process, and a different order for each adapter."""
    return blake2b(f"{adapter} {replica_id}".encode(), digest_size=8).digest()


class AdapterRouter(FIFOMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]
    """Serve's router for ``LoraReplica``: applies ``rank`` to Serve's replicas."""

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
            pending_request.routing_context.should_backoff = True  # every replica is listed: wait before the next try
        candidates = [self._candidate(replica) for replica in candidate_replicas]
        return [[candidate_replicas[p] for p in ranked] for ranked in rank(adapter, candidates, self._spread_after)]

    def _candidate(self, replica: RunningReplica) -> Candidate:
        requests = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return Candidate(replica.replica_id.unique_id, frozenset(replica.multiplexed_model_ids), requests)
