"""Read one field of the JSON that Dodo sends, leniently: a number or a string, a null, a moment."""

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation

Wire = Mapping[str, object]
"""A JSON object as it came."""

MS_PER_SECOND = 1_000
MAX_DIGITS = 30
"""Of a whole number: ``1e999999`` would take minutes to write out."""


class WireError(ValueError):
    """A required field is missing or unreadable; the message names it."""


def read_json(body: bytes | str) -> Wire:
    """The JSON object in ``body``.

    Raises:
        WireError: it is no JSON object.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:  # RecursionError: lists nested too deep
        raise WireError(f"no JSON: {error}") from None
    if not isinstance(value, dict):
        raise WireError("no JSON object")
    return value


def text(wire: Wire, name: str, default: str | None = None) -> str:
    value = wire.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str | int | float) or value == "":
        if default is not None:
            return default
        raise WireError(f"{name} is missing")
    return str(value)


def one_of(wire: Wire, name: str, known: Collection[str]) -> str:
    """A word that this version knows. Raises WireError for any other: what it would mean is not guessed."""
    word = text(wire, name)
    if word not in known:
        raise WireError(f"{name} {word[:50]!r} is unknown to this version of farebox")
    return word


def integer(wire: Wire, name: str, default: int | None = None) -> int:
    """A whole number that came as a number or as a string, ``"12"`` or ``12.0``."""
    value = wire.get(name)
    if value is None and default is not None:
        return default
    try:
        number = Decimal(str(value))
        if number.adjusted() > MAX_DIGITS:
            raise OverflowError
        whole = int(number)
    except (InvalidOperation, ValueError, OverflowError):
        raise WireError(f"{name} is no number: {str(value)[:50]!r}") from None
    if whole != number:
        raise WireError(f"{name} is no whole number: {value!r}")
    return whole


def moment_ms(wire: Wire, name: str) -> int | None:
    """An ISO 8601 moment in Unix milliseconds; ``None`` where there is none."""
    value = wire.get(name)
    if value is None:
        return None
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    except ValueError:
        raise WireError(f"{name} is no moment: {value!r}") from None
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return round(aware.timestamp() * MS_PER_SECOND)


def to_iso(ms: int) -> str:
    """Unix milliseconds as an ISO 8601 moment in UTC."""
    seconds, rest = divmod(ms, MS_PER_SECOND)
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{rest:03d}Z"


def inner(wire: Wire, name: str) -> Wire:
    """The object under ``name``; empty where there is none."""
    return as_object(wire.get(name))


def moment(wire: Wire, name: str) -> int:
    value = moment_ms(wire, name)
    if value is None:
        raise WireError(f"{name} is missing")
    return value


def as_object(value: object) -> Wire:
    return value if isinstance(value, Mapping) else {}


def as_list(value: object) -> Sequence[object]:
    return value if isinstance(value, list | tuple) else ()
