"""Faults on demand, as Dodo or the network may have them.

A rule has a path, a rate and kinds of faults; for each request that it hits, one kind is chosen at random. Kinds:

``status:N``              answer N, nothing is done
``status_after:N``        answer N, but the work is done
``latency:S``             answer S seconds late
``drop_before``           close the connection without an answer, nothing is done
``drop_after``            close the connection without an answer, but the work is done
``timeout_after_commit``  do the work and never answer
``garbage``               do the work and answer 200 with HTML instead of JSON

Rules are kept in memory, so that a restart removes them. Pages and control routes never fail.
"""

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.dodo_sandbox.errors import body
from cluster.dodo_sandbox.state import SANDBOX_ONLY_PATHS

ABORT_EXTENSION = "farebox.abort"
"""The ASGI extension with which the application closes a connection without an answer."""

_CODES = {429: "RATE_LIMITED", 401: "UNAUTHORIZED", 404: "NOT_FOUND", 422: "UNPROCESSABLE_ENTITY"}

Kind = Annotated[
    str,
    Field(
        pattern=r"^(status:[45]\d\d|status_after:[45]\d\d|latency:\d+(\.\d+)?"
        r"|drop_before|drop_after|timeout_after_commit|garbage)$"
    ),
]


class Rule(BaseModel):
    """``path`` is a prefix, or ``*`` for all; ``count`` limits how many requests are hit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = "*"
    method: str | None = None
    rate: float = Field(default=1.0, ge=0, le=1)
    kinds: Annotated[list[Kind], Field(min_length=1)]
    count: Annotated[int, Field(ge=1)] | None = None

    def meets(self, method: str, path: str) -> bool:
        return (self.path == "*" or path.startswith(self.path)) and self.method in (None, method)


@dataclass
class Armed:
    rule: Rule
    hits: int = 0


@dataclass
class Faults:
    """The rules in force. The first rule that hits a request applies."""

    armed: list[Armed] = field(default_factory=list)
    draw: random.Random = field(default_factory=random.Random)

    def arm(self, rule: Rule) -> None:
        self.armed.append(Armed(rule))

    def clear(self) -> None:
        self.armed.clear()

    def kind_for(self, method: str, path: str) -> str | None:
        for armed in self.armed:
            spent = armed.rule.count is not None and armed.hits >= armed.rule.count
            if spent or not armed.rule.meets(method, path) or self.draw.random() >= armed.rule.rate:
                continue
            armed.hits += 1
            return self.draw.choice(armed.rule.kinds)
        return None


class FaultGate:
    """ASGI middleware before the whole API."""

    def __init__(self, app: ASGIApp, faults: Faults) -> None:
        self._app = app
        self._faults = faults

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/" or scope["path"].startswith(SANDBOX_ONLY_PATHS):
            return await self._app(scope, receive, send)
        kind = self._faults.kind_for(scope["method"], scope["path"])
        name, _, value = (kind or "").partition(":")
        match name:
            case "":
                await self._app(scope, receive, send)
            case "latency":
                await asyncio.sleep(float(value))
                await self._app(scope, receive, send)
            case "status":
                await _answer(send, int(value))
            case "drop_before":
                await _drop(scope, receive)
            case _:
                await self._app(scope, receive, _discard)
                await _fail_after(name, value, scope, receive, send)
        return None


async def _fail_after(name: str, value: str, scope: Scope, receive: Receive, send: Send) -> None:
    match name:
        case "status_after":
            await _answer(send, int(value))
        case "drop_after":
            await _drop(scope, receive)
        case "garbage":
            await _send(send, 200, b"text/html", b"<html><body>it works</body></html>")
        case "timeout_after_commit":
            await _until_client_leaves(receive)


async def _discard(_: Message) -> None:
    """Discard the answer."""


async def _answer(send: Send, status: int) -> None:
    code = _CODES.get(status, "INTERNAL_SERVER_ERROR" if status >= 500 else "BAD_REQUEST")
    await _send(send, status, b"application/json", json.dumps(body(code, f"Fault on demand: {status}")).encode())


async def _send(send: Send, status: int, content_type: bytes, content: bytes) -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def _drop(scope: Scope, receive: Receive) -> None:
    """Raises ConnectionAbortedError if the server cannot close a connection."""
    abort: Callable[[], None] | None = scope.get("extensions", {}).get(ABORT_EXTENSION, {}).get("abort")
    if abort is None:
        raise ConnectionAbortedError("fault on demand: connection dropped")
    abort()
    await _until_client_leaves(receive)


async def _until_client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
