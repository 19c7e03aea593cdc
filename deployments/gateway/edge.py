"""ASGI middleware: request ids of our own, a limit on bodies, and no headers by which a client could steer Ray.

``Edge`` wraps Ray's HTTP code, in its proxy and in replicas that take requests themselves, through
``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deployments.gateway.edge:middlewares``: when a request reaches the Gateway,
Ray has acted on its headers already. ``Front`` wraps the Gateway's own application.
"""

import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID = "x-request-id"
CLIENT_REQUEST_ID = "x-client-request-id"
STEERING = frozenset(
    (
        "x-request-id",
        "x-request-timeout-seconds",
        "x-request-disconnect-disabled",
        "serve-multiplexed-model-id",
        "x-session-id",
    )
)
"""Headers by which a client could choose Ray's request id, time limit, cancellation and replica."""
ROUTER_PREFIX = "x-serve-router-"
LONGEST_CLIENT_ID = 128
OURS = "req_"


def middlewares() -> list[Middleware]:
    """Ray calls this when it starts an HTTP server, and makes these its outermost middleware."""
    return [Middleware(Edge)]


def new_request_id() -> str:
    """96 random bits. A client's own id is never used for billing."""
    return OURS + secrets.token_hex(12)


class Edge:
    """Removes steering headers, gives every reply one request id, and replaces the bodies of Ray's own errors."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        reply = _Reply(send, new_request_id(), is_health=scope["path"].startswith("/-/"))
        scope = {**scope, "headers": _without_steering(scope, reply.request_id)}
        await self._app(scope, receive, reply)


class _Reply:
    """One reply on its way out. An error without a request id of ours is Ray's own, and gets our body."""

    def __init__(self, send: Send, request_id: str, is_health: bool) -> None:
        self.request_id = request_id
        self._send = send
        self._is_health = is_health
        self._is_replaced = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            theirs = headers.getlist(REQUEST_ID)
            ours = next((value for value in theirs if value.startswith(OURS) and value != self.request_id), None)
            del headers[REQUEST_ID]
            headers[REQUEST_ID] = ours or self.request_id
            if message["status"] >= 400 and ours is None and not self._is_health:
                self._is_replaced = True
                await self._replace(message["status"], headers.get("retry-after"))
                return
        if not self._is_replaced:
            await self._send(message)

    async def _replace(self, status: int, retry_after: str | None) -> None:
        body, status = _ray_error(status)
        headers = {REQUEST_ID: self.request_id} | ({"retry-after": retry_after or "1"} if status == 503 else {})
        for message in _messages(JSONResponse(body, status, headers)):
            await self._send(message)


def _messages(response: JSONResponse) -> tuple[Message, Message]:
    start = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
    return start, {"type": "http.response.body", "body": response.body}


def _ray_error(status: int) -> tuple[dict[str, object], int]:
    """Our body and status. Ray says 500 where a replica died under a request; a retry helps, so ours is 503."""
    codes = {404: ("not_found", "Not Found"), 408: ("timeout", "Request Timeout")}
    code, title = codes.get(status, ("overloaded", "Overloaded"))
    status = status if status in codes else 503
    message = {404: "nothing is served at this path", 408: "the request took too long"}.get(
        status, "no gateway could take this request: retry shortly"
    )
    kind = "server_error" if status == 503 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    urn = f"urn:farebox:problem:{code.replace('_', '-')}"
    return {"type": urn, "title": title, "status": status, "detail": message, "error": error}, status


def _without_steering(scope: Scope, request_id: str) -> list[tuple[bytes, bytes]]:
    kept: list[tuple[bytes, bytes]] = []
    for name, value in scope["headers"]:
        plain = name.decode("latin-1").lower().replace("_", "-")
        if plain == REQUEST_ID:
            kept.append((CLIENT_REQUEST_ID.encode(), value))
        elif plain not in STEERING and not plain.startswith(ROUTER_PREFIX):
            kept.append((name, value))
    return [*kept, (REQUEST_ID.encode(), request_id.encode())]


class Front:
    """Makes the request's id, returns the client's own id as a header, and bounds the body."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_request_id()
        headers = Headers(scope=scope)
        client_id = _printable(headers.get(CLIENT_REQUEST_ID, ""))
        scope = {**scope, "farebox.request_id": request_id}

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                out = MutableHeaders(scope=message)
                out[REQUEST_ID] = request_id
                if client_id:
                    out[CLIENT_REQUEST_ID] = client_id
            await send(message)

        await self._app(scope, self._bounded(headers, receive), send_named)

    def _bounded(self, headers: Headers, receive: Receive) -> Receive:
        """Raise 413 as soon as the body is known to be too long."""
        seen = 0
        announced = headers.get("content-length", "")

        async def receive_bounded() -> Message:
            nonlocal seen
            if announced.isdecimal() and int(announced) > self._max_body_bytes:
                raise HTTPException(413, f"the body is longer than {self._max_body_bytes} bytes")
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_body_bytes:
                raise HTTPException(413, f"the body is longer than {self._max_body_bytes} bytes")
            return message

        return receive_bounded


def _printable(text: str) -> str:
    return text if len(text) <= LONGEST_CLIENT_ID and text.isascii() and text.isprintable() else ""
