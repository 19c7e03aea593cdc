"""Prices charge what was counted, rounded up once, and never more than was announced."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from billing.pricing.prices import Price
from billing.usage import NOTHING, Usage

TOKENS = st.integers(0, 200_000)
RATES = st.integers(0, 10**12)


@st.composite
def prices(draw: st.DrawFn) -> Price:
    rate = draw(RATES)
    cached = draw(st.none() | st.integers(0, rate))
    output, once, second = draw(RATES), draw(RATES), draw(RATES)
    is_free = not any((rate, output, once, second))
    return Price.model_construct(
        input_per_1m=rate, cached_input_per_1m=cached, output_per_1m=output, per_request=once,
        per_compute_second=second, free=is_free,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rates", "usage", "nanos"),
    [
        ({"input_per_1m": "0.50"}, Usage(prompt_tokens=1), 500),
        ({"input_per_1m": "0.000001"}, Usage(prompt_tokens=1), 1),
        ({"input_per_1m": "0.0001", "output_per_1m": "0.0001"}, Usage(prompt_tokens=5, completion_tokens=5), 1),
        ({"input_per_1m": "1", "cached_input_per_1m": "0.1"}, Usage(prompt_tokens=10, cached_tokens=4), 6_400),
        ({"input_per_1m": "1"}, Usage(prompt_tokens=10, cached_tokens=4), 10_000),
        ({"per_request": "0.005"}, Usage(), 5_000_000),
        ({"per_request": "0.005"}, NOTHING, 0),
        ({"per_compute_second": "0.01"}, Usage(compute_ms=1_500), 15_000_000),
        ({"free": True}, Usage(prompt_tokens=10**6, compute_ms=10**6), 0),
    ],
)
def test_charge_follows_the_rates(rates: dict[str, object], usage: Usage, nanos: int) -> None:
    assert Price.model_validate(rates).charge(usage) == nanos


@given(prices(), TOKENS, TOKENS, st.integers(0, 1_000), st.integers(0, 200_000))
def test_request_never_costs_more_than_its_max_cost(
    price: Price, prompt: int, limit: int, cached: int, generated: int
) -> None:
    usage = Usage(prompt, min(cached, prompt), min(generated, limit))
    assert price.charge(usage) <= price.at_most(prompt, limit)


@given(prices(), TOKENS, st.integers(0, 10**15), TOKENS)
def test_affordable_is_the_most_that_the_budget_pays(price: Price, prompt: int, budget: int, ceiling: int) -> None:
    tokens = price.affordable_tokens(prompt, budget, ceiling)
    if tokens < 0:
        assert price.at_most(prompt, 0) > budget
        return
    assert price.at_most(prompt, tokens) <= budget
    assert tokens == ceiling or price.at_most(prompt, tokens + 1) > budget


@pytest.mark.parametrize(
    ("rates", "reason"),
    [
        ({}, "no rate above 0"),
        ({"input_per_1m": "0"}, "no rate above 0"),
        ({"free": True, "per_request": "1"}, "no rates"),
        ({"input_per_1m": "1", "cached_input_per_1m": "2"}, "never cost more"),
        ({"input_per_1m": 0.5}, "decimal string"),
        ({"input_per_1m": "-1"}, "greater than or equal"),
        ({"input_per_1M": "1"}, "Extra inputs"),
    ],
)
def test_invalid_price_is_refused_with_its_reason(rates: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Price.model_validate(rates)


def test_equal_rates_are_one_version_and_others_another() -> None:
    first = Price.model_validate({"input_per_1m": "0.5", "output_per_1m": "1"})
    same = Price.model_validate({"output_per_1m": "1.00", "input_per_1m": "0.50"})
    other = Price.model_validate({"input_per_1m": "0.5", "output_per_1m": "1.000000001"})
    assert first.version == same.version != other.version
