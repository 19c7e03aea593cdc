"""Amounts are whole nanos: written, read and divided without losing one."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.money import MAX_BALANCE_NANOS, AmountError, Nanos, divide_up, format_usd, parse_usd


@given(st.integers(-MAX_BALANCE_NANOS, MAX_BALANCE_NANOS))
def test_amount_written_reads_back_the_same(nanos: int) -> None:
    assert parse_usd(format_usd(nanos)) == nanos
    assert parse_usd(format_usd(nanos, decimals=0)) == nanos


@pytest.mark.parametrize(
    ("text", "nanos"),
    [("0", 0), ("1", 10**9), ("0.000000001", 1), ("-0.5", -500_000_000), (" 12.50 ", 12_500_000_000)],
)
def test_amount_is_read_to_the_nano(text: str, nanos: int) -> None:
    assert parse_usd(text) == nanos


@pytest.mark.parametrize("text", ["", "1.", ".5", "1e3", "1,5", "0.0000000001", "+1", "NaN", "--1", "1 2", "٣"])
def test_text_that_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(AmountError):
        parse_usd(text)


@pytest.mark.parametrize("text", ["1000000000", "99999999999", "-99999999999", "9" * 80])
def test_amount_that_is_too_large_is_refused_with_the_bound(text: str) -> None:
    with pytest.raises(AmountError, match=re.escape("too large: the most is 999999999.999999999 dollars")):
        parse_usd(text)
    with pytest.raises(AmountError, match=re.escape("too large: the most is 5.00 dollars")):
        parse_usd("5.000000001", Nanos(5 * 10**9))
    assert parse_usd("5", Nanos(5 * 10**9)) == 5 * 10**9


@pytest.mark.parametrize(
    ("nanos", "decimals", "text"),
    [
        (0, 6, "0.000000"),
        (123_000, 6, "0.000123"),
        (1, 6, "0.000000001"),
        (-1_500_000_000, 2, "-1.50"),
        (10**9, 0, "1"),
    ],
)
def test_no_digit_is_lost_in_writing(nanos: int, decimals: int, text: str) -> None:
    assert format_usd(nanos, decimals) == text


@given(st.integers(0, 10**30), st.integers(1, 10**12))
def test_division_rounds_up_by_less_than_one(dividend: int, divisor: int) -> None:
    assert 0 <= divide_up(dividend, divisor) * divisor - dividend < divisor


def test_negative_charge_is_an_assertion_error() -> None:
    with pytest.raises(AssertionError):
        divide_up(-1, 10)
