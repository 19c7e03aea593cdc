"""How many LoRA replicas there should be. Standard library only: Serve's controller imports it.

Serve applies the bounds, delays and factors of ``autoscaling_config`` around what this says.
"""

import math
from collections.abc import Mapping
from typing import Protocol

QUEUED = "queued"
"""What ``LoraReplica.record_autoscaling_stats`` reports: requests that wait inside its engine."""
FULL_SHARE = 0.9


class Load(Protocol):
    """What is read of Serve's context."""

    current_num_replicas: int

    @property
    def total_num_requests(self) -> float: ...
    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[object, float]] | None: ...


def replicas_for(load: Load, requests_per_replica: float = 16.0) -> tuple[int, dict[str, object]]:
    """Enough replicas that each runs ``requests_per_replica`` at once, and one more while an engine's queue stands."""
    wanted = math.ceil(load.total_num_requests / requests_per_replica)
    queued = sum((load.aggregated_metrics or {}).get(QUEUED, {}).values())
    if queued > FULL_SHARE * requests_per_replica * max(1, load.current_num_replicas):
        wanted = max(wanted, load.current_num_replicas + 1)
    return wanted, {}
