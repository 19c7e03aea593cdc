"""Amounts of money as whole nanos of a US dollar: how they are written, read and divided."""

import re
from typing import NewType

Nanos = NewType("Nanos", int)
"""An amount of money in 1e-9 US dollars. Never a float: sums must be exact."""

NANOS_PER_USD = 1_000_000_000
NANOS_PER_CENT = 10_000_000
MAX_BALANCE_NANOS = Nanos(2**53 - 1)
"""Lua keeps numbers as doubles; past this a sum in the store would round."""
MAX_GRANT_NANOS = Nanos(1_000_000 * NANOS_PER_USD)

MAX_AMOUNT_NANOS = Nanos(999_999_999_999_999_999)
"""The largest amount that is read, a nano below a billion dollars."""

_USD = re.compile(r"(?P<sign>-?)(?P<whole>\d{1,99})(?:\.(?P<part>\d{1,9}))?", re.ASCII)


class AmountError(ValueError):
    """The text is no amount of US dollars, or one that is too large."""


def parse_usd(text: str, most: Nanos = MAX_AMOUNT_NANOS) -> Nanos:
    """Read a decimal string of dollars, such as ``"0.000123"``, without rounding.

    Raises:
        AmountError: for anything but digits with at most nine decimals, or if it is more than ``most``.
    """
    match = _USD.fullmatch(text.strip())
    if match is None:
        raise AmountError(f'{text!r} is not an amount in dollars: write it as "12.50", nine decimals at most')
    whole, part = int(match["whole"]), int((match["part"] or "").ljust(9, "0"))
    nanos = whole * NANOS_PER_USD + part
    if abs(nanos) > most:
        raise AmountError(f"{text!r} is too large: the most is {format_usd(most, decimals=2)} dollars")
    return Nanos(-nanos if match["sign"] else nanos)


def format_usd(nanos: int, decimals: int = 6) -> str:
    """Write an amount as a decimal string with at least ``decimals`` places and no digit lost."""
    sign = "-" if nanos < 0 else ""
    whole, part = divmod(abs(nanos), NANOS_PER_USD)
    digits = f"{part:09d}".rstrip("0").ljust(decimals, "0")
    return f"{sign}{whole}.{digits}" if digits else f"{sign}{whole}"


def share_of(amount: int, part: int, whole: int) -> int:
    """The share of ``amount`` that ``part`` is of ``whole``, rounded to the nearest unit and half up; 0 of nothing.

    For amounts that Dodo has rounded, such as a refund's tax. A charge of ours is never divided by this.
    """
    assert 0 <= part <= whole, "a share is at most the whole"
    return (2 * amount * part + whole) // (2 * whole) if whole else 0


def divide_down(dividend: int, divisor: int) -> int:
    """Divide a whole amount and round down, below zero as well: the worth of a rest, of which nothing may be lost."""
    assert divisor > 0, "a rate's denominator is positive"
    return dividend // divisor


def divide_up(dividend: int, divisor: int) -> int:
    """Divide a whole amount and round up: the only division of what anyone is charged.

    Rounding up once, after everything is summed, favours the owner by less than one nano.
    """
    assert dividend >= 0, "only a charge is divided, and a charge is never negative"
    assert divisor > 0, "a rate's denominator is positive"
    return -(-dividend // divisor)
