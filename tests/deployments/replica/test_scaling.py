"""The autoscaling policy, and the router by adapter."""

import ast
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.request_router.common import ReplicaQueueLengthCache, RequestRoutingContext

from deployments import autoscaling
from deployments.autoscaling import QueuedTokens
from deployments.replica.routing import AdapterRouter, Candidate, rank


@dataclass
class Context:
    """What Serve's controller would pass."""

    tokens: tuple[float, ...] = ()
    total_num_requests: float = 0.0
    total_queued_requests: float = 0.0
    target_num_replicas: int = 2
    aggregated_metrics: Mapping[str, Mapping[object, float]] | None = field(default=None)

    def __post_init__(self) -> None:
        if self.tokens and self.aggregated_metrics is None:
            self.aggregated_metrics = {"queued_tokens": dict(enumerate(self.tokens))}


@pytest.mark.parametrize(
    ("context", "wanted"),
    [
        (Context(tokens=(0.0,)), 0.0),  # Serve's min_replicas is the floor
        (Context(tokens=(999.0,)), 0.999),
        (Context(tokens=(1_000.0,)), 1.0),
        (Context(tokens=(1_001.0,)), 1.001),  # Serve rounds up
        (Context(tokens=(2_900.0,)), 2.9),
        (Context(tokens=(900.0, 900.0, 900.0)), 2.7),
        (Context(), 2),  # nothing is known yet: as it was
        (Context(aggregated_metrics={"other": {1: 5.0}}), 2),
        # Ten run with 100 tokens each, ten wait in the gateways and will need as much.
        (Context(tokens=(1_000.0,), total_num_requests=20.0, total_queued_requests=10.0), 2.0),
        (Context(tokens=(0.0,), total_num_requests=3.0, total_queued_requests=3.0), 3.0),
    ],
)
def test_replicas_follow_queued_tokens(context: Context, wanted: float) -> None:
    assert QueuedTokens(target_queued_tokens=1_000)(context) == (wanted, {})


def test_long_request_counts_as_many_short_ones() -> None:
    policy = QueuedTokens(1_000)
    long, short = Context(tokens=(4_000.0,), total_num_requests=1), Context(tokens=(4_000.0,), total_num_requests=100)
    assert policy(long) == policy(short)


def test_target_below_one_token_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        QueuedTokens(0)


def test_policy_needs_only_standard_library() -> None:
    """Serve's controller loads it by value, on whatever node that runs."""
    assert autoscaling.__file__ is not None
    tree = ast.parse(Path(autoscaling.__file__).read_text())
    imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    assert imported
    assert {name.partition(".")[0] for name in imported} <= set(sys.stdlib_module_names)


def candidate(name: str, requests: int, *adapters: str) -> Candidate:
    return Candidate(name, frozenset(adapters), requests)


def test_request_routed_to_resident_adapter() -> None:
    assert rank("a", [candidate("x", 5), candidate("y", 5, "a"), candidate("z", 0, "b")], spread_after=8)[0] == [1]


def test_two_holders_share_by_load() -> None:
    assert rank("a", [candidate("x", 5, "a"), candidate("y", 0), candidate("z", 2, "a")], spread_after=8)[0] == [0, 2]


def test_hot_adapter_spreads_to_idle_replica() -> None:
    for requests, first in ((7, [0]), (8, [1])):
        assert rank("hot", [candidate("x", requests, "hot"), candidate("y", 0)], spread_after=8)[0] == first


def test_new_adapter_goes_to_replica_with_fewest() -> None:
    assert rank("new", [candidate("x", 0, "a", "b"), candidate("y", 3, "c")], spread_after=8)[0] == [1]


def test_gateways_agree_on_replica_of_new_adapter() -> None:
    replicas = [candidate("x", 0), candidate("y", 0), candidate("z", 0)]
    firsts = [rank(f"adapter{number}", replicas, spread_after=8)[0][0] for number in range(300)]
    assert all(firsts.count(position) > 50 for position in range(3))
    backwards = [rank(f"adapter{number}", replicas[::-1], spread_after=8)[0][0] for number in range(300)]
    assert [2 - position for position in backwards] == firsts


@pytest.mark.parametrize("adapter", ["", "a"])
def test_every_replica_is_ranked_once(adapter: str) -> None:
    replicas = [candidate("x", 90, "a"), candidate("y", 0), candidate("z", 3, "a"), candidate("w", 50)]
    ranked = rank(adapter, replicas, spread_after=8)
    assert sorted(position for positions in ranked for position in positions) == [0, 1, 2, 3]


def test_base_model_ranks_replicas_equally() -> None:
    assert rank("", [candidate("x", 9), candidate("y", 0, "a")], spread_after=8) == [[0, 1]]


async def test_router_lists_every_replica_and_backs_off() -> None:
    """Where all are full Serve asks again: without a wait between, it would ask for ever and do nothing else."""
    router = AdapterRouter.__new__(AdapterRouter)
    router.initialize_state(spread_after=2)
    router._replica_queue_len_cache = ReplicaQueueLengthCache()
    replicas = [Replica(ReplicaID(name, DeploymentID("LoraReplica")), set()) for name in ("x", "y")]
    replicas[1].multiplexed_model_ids.add("a@1")
    pending = Pending(Metadata("a@1"))
    assert await router.choose_replicas(replicas, pending) == [[replicas[1]], [replicas[0]]]  # type: ignore[arg-type]
    assert pending.routing_context.should_backoff
    router.replica_queue_len_cache.update(replicas[1].replica_id, 2)
    assert await router.choose_replicas(replicas, pending) == [[replicas[0]], [replicas[1]]]  # type: ignore[arg-type]
    assert await router.choose_replicas(replicas, None) == [replicas]  # type: ignore[arg-type]


@dataclass
class Replica:
    """What the router reads of Serve's ``RunningReplica``."""

    replica_id: ReplicaID
    multiplexed_model_ids: set[str]


@dataclass
class Metadata:
    multiplexed_model_id: str


@dataclass
class Pending:
    metadata: Metadata
    routing_context: RequestRoutingContext = field(default_factory=RequestRoutingContext)
