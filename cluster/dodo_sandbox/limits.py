"""The API's limits: requests per minute (off by default) and the size of a body."""

import time
from collections import deque

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.dodo_sandbox.errors import body
from cluster.dodo_sandbox.state import SANDBOX_ONLY_PATHS, Sandbox

_WINDOW_S = 60.0


class Limits:
    """ASGI middleware that answers 429 with Dodo's ``X-RateLimit-*`` headers, or 413."""

    def __init__(self, app: ASGIApp, sandbox: Sandbox) -> None:
        self._app = app
        self._sandbox = sandbox
        self._taken: deque[float] = deque()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/" or scope["path"].startswith(SANDBOX_ONLY_PATHS):
            return await self._app(scope, receive, send)
        refusal = self._refusal(scope)
        return await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        settings = self._sandbox.settings
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and int(length) > settings.max_body_bytes:
            return JSONResponse(body("PAYLOAD_TOO_LARGE", f"At most {settings.max_body_bytes} bytes"), 413)
        if settings.rate_limit_per_min is not None:
            return self._counted(settings.rate_limit_per_min)
        return None

    def _counted(self, limit: int) -> JSONResponse | None:
        now = time.monotonic()
        while self._taken and self._taken[0] <= now - _WINDOW_S:
            self._taken.popleft()
        if len(self._taken) < limit:
            self._taken.append(now)
            return None
        reset = str(max(1, round(self._taken[0] + _WINDOW_S - now)))
        headers = {"X-RateLimit-Limit": str(limit), "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": reset}
        return JSONResponse(body("RATE_LIMITED", "Too many requests"), 429, headers)
