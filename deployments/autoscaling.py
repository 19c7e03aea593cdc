"""How many replicas the work in the engines asks for. Standard library only: Serve's controller imports it.

Named in ``serve_config.yaml`` as a deployment's ``autoscaling_config.policy``; Serve puts its own bounds,
delays and factors around the answer.
"""

from collections.abc import Mapping
from typing import Protocol

QUEUED_TOKENS = "queued_tokens"


class Context(Protocol):
    """What this policy reads of Serve's ``AutoscalingContext``."""

    target_num_replicas: int
    aggregated_metrics: Mapping[str, Mapping[object, float]] | None
    """By metric and replica, over the look-back period."""
    total_num_requests: float
    total_queued_requests: float
    """Those that wait in the gateways, because every replica is full."""


class QueuedTokens:
    """As many replicas as keep each at ``target_queued_tokens``.

    A request counts with its prompt and the most it may generate, from its arrival to its answer: one long
    request asks for as much as many short ones.
    """

    def __init__(self, target_queued_tokens: int) -> None:
        if not isinstance(target_queued_tokens, int) or target_queued_tokens < 1:
            raise ValueError(f"target_queued_tokens must be a whole number, at least 1, not {target_queued_tokens!r}")
        self._target = target_queued_tokens

    def __call__(self, ctx: Context) -> tuple[float, dict[str, object]]:
        """The number wanted, a fraction rounded up by Serve, and no state."""
        told = (ctx.aggregated_metrics or {}).get(QUEUED_TOKENS)
        if not told:
            return ctx.target_num_replicas, {}
        tokens = sum(told.values())
        running = max(0.0, ctx.total_num_requests - ctx.total_queued_requests)
        each = tokens / running if running >= 1 else self._target
        return (tokens + ctx.total_queued_requests * each) / self._target, {}
