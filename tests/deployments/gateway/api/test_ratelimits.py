"""The headers of rate limits."""

import pytest

from billing.catalog.plans import Limits
from billing.ledger.account import LimitsLeft
from billing.ledger.errors import RateLimited
from deployments.gateway.api.ratelimits import duration, of_hold, of_refusal


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0001, "1ms"),
        (0.999, "999ms"),
        (1, "1s"),
        (8.64, "8.64s"),
        (59.9991, "1m0s"),
        (360, "6m0s"),
        (61.5, "1m1.5s"),
    ],
)
def test_duration_in_openai_format(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_no_header_without_limit() -> None:
    assert of_hold(Limits(concurrent_requests=3), LimitsLeft()) == {}


def test_headers_of_both_limits() -> None:
    limits = Limits(requests_per_minute=60, burst=6, tokens_per_minute=90_000)
    assert of_hold(limits, LimitsLeft(3, 2.2, 1_234, 17.01)) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "3",
        "x-ratelimit-reset-requests": "2.2s",
        "x-ratelimit-limit-tokens": "90000",
        "x-ratelimit-remaining-tokens": "1234",
        "x-ratelimit-reset-tokens": "17.01s",
        "ratelimit-policy": '"requests";q=6;w=6;qu="requests", "tokens";q=90000;w=60;qu="tokens"',
        "ratelimit": '"requests";r=3;t=3, "tokens";r=1234;t=18',
    }


def test_headers_of_refusal() -> None:
    headers = of_refusal(RateLimited("requests", 60, retry_after_s=0.4, reset_s=5.4, at_once=6))
    assert headers["ratelimit"] == '"requests";r=0;t=1'
    assert headers["x-ratelimit-reset-requests"] == "5.4s"


def test_concurrency_has_no_per_minute_header() -> None:
    assert of_refusal(RateLimited("concurrency", 4, retry_after_s=1, reset_s=1, at_once=4)) == {
        "ratelimit-policy": '"concurrency";q=4;qu="concurrent-requests"',
        "ratelimit": '"concurrency";r=0;t=1',
    }
