"""What is left of a key's limits, in the two families of headers that clients read.

Knows how they are written: OpenAI's ``x-ratelimit-*``, and ``RateLimit-Policy`` and ``RateLimit`` of
draft-ietf-httpapi-ratelimit-headers-11. What is left was counted by the hold.
"""

import math
from dataclasses import dataclass

from billing.catalog.plans import Limits
from billing.ledger.account import LimitsLeft
from billing.ledger.errors import RateLimited

MINUTE_S = 60
UNITS = {"requests": "requests", "tokens": "tokens", "concurrency": "concurrent-requests"}
"""The draft's names for what a quota counts; tokens are not among them."""


@dataclass(frozen=True, slots=True)
class _Left:
    name: str
    limit: int
    """A minute's worth."""
    at_once: int
    rest: int
    """What may come now."""
    reset_s: float
    """Until all that may come at once may come again."""
    wait_s: float
    """Until more than ``rest`` may come."""


def of_hold(limits: Limits, left: LimitsLeft) -> dict[str, str]:
    """For a reply that was admitted; nothing where no limit is counted by the minute."""
    found = []
    if limits.requests_per_minute and left.requests is not None:
        limit, reset_s = limits.requests_per_minute, left.requests_reset_s
        found.append(_Left("requests", limit, limits.requests_at_once, left.requests, reset_s, reset_s))
    if limits.tokens_per_minute and left.tokens is not None:
        limit, reset_s = limits.tokens_per_minute, left.tokens_reset_s
        found.append(_Left("tokens", limit, limit, left.tokens, reset_s, reset_s))
    return _written(found)


def of_refusal(error: RateLimited) -> dict[str, str]:
    """For a 429: nothing is left, and ``t`` is when to come again."""
    reset_s = error.reset_s or error.retry_after_s
    return _written([_Left(error.kind, error.limit, error.at_once, 0, reset_s, error.retry_after_s)])


def _written(limits: list[_Left]) -> dict[str, str]:
    headers = {}
    for one in limits:
        if one.name != "concurrency":
            headers[f"x-ratelimit-limit-{one.name}"] = str(one.limit)
            headers[f"x-ratelimit-remaining-{one.name}"] = str(one.rest)
            headers[f"x-ratelimit-reset-{one.name}"] = duration(one.reset_s)
    if limits:
        headers["ratelimit-policy"] = ", ".join(map(_policy, limits))
        headers["ratelimit"] = ", ".join(f'"{one.name}";r={one.rest};t={math.ceil(one.wait_s)}' for one in limits)
    return headers


def _policy(one: _Left) -> str:
    """So many at once, and the seconds in which as many are there again."""
    unit = f';qu="{UNITS[one.name]}"'
    if one.name == "concurrency":
        return f'"{one.name}";q={one.limit}{unit}'
    return f'"{one.name}";q={one.at_once};w={math.ceil(one.at_once * MINUTE_S / one.limit)}{unit}'


def duration(seconds: float) -> str:
    """As OpenAI writes it: ``12ms``, ``8.64s``, ``6m0s``; rounded up."""
    ms = math.ceil(seconds * 1_000)
    if ms < 1_000:
        return f"{ms}ms"
    minutes, rest_ms = divmod(ms, 60_000)
    text = f"{rest_ms / 1_000:.3f}".rstrip("0").rstrip(".")
    return f"{minutes}m{text}s" if minutes else f"{text}s"
