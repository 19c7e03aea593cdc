"""How many replicas there are follows the tokens that wait, and which takes a request follows its adapter."""

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
from deployments.replica.routing import AdapterRouter, Seen, rank


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
def test_replicas_follow_the_tokens_that_wait(context: Context, wanted: float) -> None:
    assert QueuedTokens(target_queued_tokens=1_000)(context) == (wanted, {})


def test_one_long_request_asks_for_as_much_as_many_short_ones() -> None:
    policy = QueuedTokens(1_000)
    long, short = Context(tokens=(4_000.0,), total_num_requests=1), Context(tokens=(4_000.0,), total_num_requests=100)
    assert policy(long) == policy(short)


def test_a_target_below_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        QueuedTokens(0)


def test_the_policy_needs_the_standard_library_alone() -> None:
    """Serve's controller loads it by value, on whatever node that runs."""
    assert autoscaling.__file__ is not None
    tree = ast.parse(Path(autoscaling.__file__).read_text())
    imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    assert imported
    assert {name.partition(".")[0] for name in imported} <= set(sys.stdlib_module_names)


def seen(name: str, requests: int, *adapters: str) -> Seen:
    return Seen(name, frozenset(adapters), requests)


def test_a_request_goes_where_its_adapter_lies() -> None:
    assert rank("a", [seen("x", 5), seen("y", 5, "a"), seen("z", 0, "b")], spread_after=8)[0] == [1]


def test_two_holders_share_by_load() -> None:
    assert rank("a", [seen("x", 5, "a"), seen("y", 0), seen("z", 2, "a")], spread_after=8)[0] == [0, 2]


def test_a_hot_adapter_moves_in_with_the_idle_and_a_busy_one_does_not() -> None:
    for requests, first in ((7, [0]), (8, [1])):
        assert rank("hot", [seen("x", requests, "hot"), seen("y", 0)], spread_after=8)[0] == first


def test_an_adapter_that_is_nowhere_goes_to_the_replica_with_the_fewest() -> None:
    assert rank("new", [seen("x", 0, "a", "b"), seen("y", 3, "c")], spread_after=8)[0] == [1]


def test_every_gateway_sends_a_new_adapter_to_the_same_replica() -> None:
    replicas = [seen("x", 0), seen("y", 0), seen("z", 0)]
    firsts = [rank(f"adapter{number}", replicas, spread_after=8)[0][0] for number in range(300)]
    assert all(firsts.count(position) > 50 for position in range(3))
    backwards = [rank(f"adapter{number}", replicas[::-1], spread_after=8)[0][0] for number in range(300)]
    assert [2 - position for position in backwards] == firsts


@pytest.mark.parametrize("adapter", ["", "a"])
def test_every_replica_is_named_once_so_that_a_full_one_has_an_alternative(adapter: str) -> None:
    replicas = [seen("x", 90, "a"), seen("y", 0), seen("z", 3, "a"), seen("w", 50)]
    ranked = rank(adapter, replicas, spread_after=8)
    assert sorted(position for positions in ranked for position in positions) == [0, 1, 2, 3]


def test_the_base_model_is_at_home_everywhere() -> None:
    assert rank("", [seen("x", 9), seen("y", 0, "a")], spread_after=8) == [[0, 1]]


async def test_the_router_names_every_replica_and_waits_before_it_names_them_again() -> None:
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
