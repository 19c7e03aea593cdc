"""Turn what the SDK returns or raises into our values, or one of two kinds of failure."""

import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar, cast

import httpx
from dodopayments import APIConnectionError, APIResponseValidationError, APIStatusError
from pydantic import BaseModel

from billing.dodo.errors import DodoRefused, DodoUnavailable, DodoUnreadable
from billing.dodo.fields import Wire, WireError

TRANSIENT = (408, 409, 425, 429)
"""Statuses below 500 that a later try may change."""

_UNREADABLE = (APIConnectionError, APIResponseValidationError, httpx.HTTPError, ValueError, TypeError, AttributeError)
"""No answer, or none that the SDK can read: it trips over a list that is no JSON with an AttributeError."""

T = TypeVar("T")
log = logging.getLogger("farebox.billing.dodo.reply")


async def listed(call: Awaitable[object]) -> list[Wire]:
    """One page's items. Raises DodoUnavailable, DodoRefused."""
    items = as_wire(await answered(call)).get("items")
    if not isinstance(items, list):
        raise DodoUnavailable("no items in the reply")
    return cast(list[Wire], items)


async def answered(call: Awaitable[T]) -> T:
    """The call's answer. Raises DodoUnavailable where none came or a later try may differ, else DodoRefused."""
    try:
        return await call
    except APIStatusError as error:
        raise _refusal(error) from error
    except httpx.InvalidURL as error:  # an id that fits into no address: nothing at Dodo has it
        raise DodoRefused(httpx.codes.NOT_FOUND, "UNUSABLE_ID", str(error)) from error
    except _UNREADABLE as error:
        raise DodoUnavailable(f"{type(error).__name__}: {error}") from error


def _refusal(error: APIStatusError) -> DodoUnavailable | DodoRefused:
    body = error.body if isinstance(error.body, dict) else {}
    message = str(body.get("message") or error.message)[:500]
    if error.status_code in TRANSIENT or error.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
        return DodoUnavailable(f"{error.status_code}: {message}", _retry_after(error.response))
    return DodoRefused(error.status_code, str(body.get("code") or ""), message)


def _retry_after(response: httpx.Response) -> float:
    try:
        return max(float(response.headers.get("retry-after", "0")), 0.0)
    except ValueError:
        return 0.0


def as_wire(reply: object) -> Wire:
    if not isinstance(reply, BaseModel):
        raise DodoUnavailable(f"no JSON object in the reply: {str(reply)[:100]!r}")
    try:
        return reply.model_dump(mode="json", warnings=False)
    except ValueError as error:
        raise DodoUnavailable(f"unreadable reply: {error}") from error


def read_as(read: Callable[[Wire], T], reply: object) -> T:
    return parsed(read, as_wire(reply))


def parsed(read: Callable[[Wire], T], wire: Wire) -> T:
    """Raises DodoUnreadable."""
    try:
        return read(wire)
    except WireError as error:
        raise DodoUnreadable(f"unreadable reply: {error}") from error


def readable(read: Callable[[Wire], T], wires: Iterable[Wire]) -> list[T]:
    """Without those that cannot be read, which the log names."""
    found = []
    for wire in wires:
        try:
            found.append(read(wire))
        except WireError as error:
            log.warning("left out of a list of Dodo's: %s", error)
    return found


def text_in(wire: Wire, name: str) -> str:
    value = wire.get(name)
    if not isinstance(value, str) or not value:
        raise DodoUnavailable(f"no {name} in the reply")
    return value
