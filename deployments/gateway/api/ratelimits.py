"""What is left of a key's limits, as headers.

Clients read OpenAI's ``x-ratelimit-*``, or ``RateLimit-Policy`` and ``RateLimit`` of
draft-ietf-httpapi-ratelimit-headers-11.
"""

import math
from dataclasses import dataclass

from billing.catalog.plans import Limits
from billing.ledger.account import LimitsLeft
from billing.ledger.errors import RateLimited

MINUTE_S = 60
UNITS = {"requests": "requests", "tokens": "tokens", "concurrency": "concurrent-requests"}
"""The draft's names for what a quota counts; it has none for tokens."""


@dataclass(frozen=True, slots=True)
class _Left:
    name: str
    limit: int
    """In a minute."""
    burst: int
    remaining: int
    reset_s: float
    """Until the whole burst is there again."""
    wait_s: float
    """Until there is more than ``remaining``."""


def of_hold(limits: Limits, left: LimitsLeft) -> dict[str, str]:
    """Headers of a request that was admitted; none where no limit counts by the minute."""
    found = []
    if limits.requests_per_minute and left.requests is not None:
        limit, reset_s = limits.requests_per_minute, left.requests_reset_s
        found.append(_Left("requests", limit, limits.requests_at_once, left.requests, reset_s, reset_s))
    if limits.tokens_per_minute and left.tokens is not None:
        limit, reset_s = limits.tokens_per_minute, left.tokens_reset_s
        found.append(_Left("tokens", limit, limit, left.tokens, reset_s, reset_s))
    return _written(found)


def of_refusal(error: RateLimited) -> dict[str, str]:
    """Headers of a 429: nothing is left, and ``t`` says when to retry."""
    reset_s = error.reset_s or error.retry_after_s
    return _written([_Left(error.kind, error.limit, error.at_once, 0, reset_s, error.retry_after_s)])


def _written(limits: list[_Left]) -> dict[str, str]:
    headers = {}
    for one in limits:
        if one.name != "concurrency":
            headers[f"x-ratelimit-limit-{one.name}"] = str(one.limit)
            headers[f"x-ratelimit-remaining-{one.name}"] = str(one.remaining)
            headers[f"x-ratelimit-reset-{one.name}"] = duration(one.reset_s)
    if limits:
        headers["ratelimit-policy"] = ", ".join(map(_policy, limits))
        headers["ratelimit"] = ", ".join(f'"{one.name}";r={one.remaining};t={math.ceil(one.wait_s)}' for one in limits)
    return headers


def _policy(one: _Left) -> str:
    """The burst, and the seconds after which it is there again."""
    unit = f';qu="{UNITS[one.name]}"'
    if one.name == "concurrency":
        return f'"{one.name}";q={one.limit}{unit}'
    return f'"{one.name}";q={one.burst};w={math.ceil(one.burst * MINUTE_S / one.limit)}{unit}'


def duration(seconds: float) -> str:
    """As OpenAI writes it: ``12ms``, ``8.64s``, ``6m0s``; rounded up."""
    ms = math.ceil(seconds * 1_000)
    if ms < 1_000:
        return f"{ms}ms"
    minutes, rest_ms = divmod(ms, 60_000)
    text = f"{rest_ms / 1_000:.3f}".rstrip("0").rstrip(".")
    return f"{minutes}m{text}s" if minutes else f"{text}s"
