"""Autoscaling policy: how many replicas the queued tokens ask for.

``serve_config.yaml`` names it as a deployment's ``autoscaling_config.policy``; Serve applies its own bounds, delays and
factors to the result. Only the standard library is imported here: Serve's controller loads this module.
"""

from collections.abc import Mapping
from typing import Protocol

QUEUED_TOKENS = "queued_tokens"


class Context(Protocol):
    """The part of Serve's ``AutoscalingContext`` that this policy reads."""

    target_num_replicas: int
    aggregated_metrics: Mapping[str, Mapping[object, float]] | None
    """By metric and replica, over the look-back period."""
    total_num_requests: float
    total_queued_requests: float
    """Requests that wait in the gateways because every replica is full."""


class QueuedTokens:
    """As many replicas as bring each of them to ``target_queued_tokens``.

    A request counts with the tokens of its prompt and the most it may generate, from its arrival to its end: one long
    request counts as much as many short ones.
    """

    def __init__(self, target_queued_tokens: int) -> None:
        if not isinstance(target_queued_tokens, int) or target_queued_tokens < 1:
            raise ValueError(f"target_queued_tokens must be a whole number, at least 1, not {target_queued_tokens!r}")
        self._target = target_queued_tokens

    def __call__(self, ctx: Context) -> tuple[float, dict[str, object]]:
        """The number of replicas, a fraction that Serve rounds up, and an empty state."""
        by_replica = (ctx.aggregated_metrics or {}).get(QUEUED_TOKENS)
        if not by_replica:
            return ctx.target_num_replicas, {}
        tokens = sum(by_replica.values())
        running = max(0.0, ctx.total_num_requests - ctx.total_queued_requests)
        each = tokens / running if running >= 1 else self._target
        return (tokens + ctx.total_queued_requests * each) / self._target, {}
