"""The middleware in front of Ray and in front of the Gateway."""

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.gateway.edge import Edge, Front, middlewares


class Echo:
    """Records the headers that reach it, as Ray's code would see them."""

    def __init__(self, reply: Response | None = None) -> None:
        self.reply = reply
        self.seen: list[tuple[str, str]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen = Request(scope).headers.items()
        await (self.reply or JSONResponse({}))(scope, receive, send)


async def get(app: ASGIApp, headers: list[tuple[str, str]] | None = None, path: str = "/") -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://farebox") as client:
        return await client.get(path, headers=headers or [])


@pytest.mark.parametrize(
    "name",
    [
        "x-request-timeout-seconds",
        "X-Request-Disconnect-Disabled",
        "serve_multiplexed_model_id",
        "serve-multiplexed-model-id",
        "Serve-Multiplexed_Model-Id",
        "x-session-id",
        "x_session_id",
        "x-serve-router-anything",
    ],
)
async def test_steering_headers_removed(name: str) -> None:
    echo = Echo()
    await get(Edge(echo), [(name, "1"), ("x-harmless", "2")])
    names = [seen for seen, _ in echo.seen]
    assert name.lower() not in names
    assert "x-harmless" in names


async def test_client_request_id_is_renamed() -> None:
    echo = Echo()
    reply = await get(Edge(echo), [("x-request-id", "theirs"), ("X-REQUEST-ID", "again")])
    ids = [value for name, value in echo.seen if name == "x-request-id"]
    assert len(ids) == 1
    assert ids[0].startswith("req_")
    assert [value for name, value in echo.seen if name == "x-client-request-id"] == ["theirs", "again"]
    assert reply.headers.get_list("x-request-id") == ids


async def test_reply_has_request_id_of_gateway() -> None:
    echo = Echo(JSONResponse({}, headers={"x-request-id": "req_gateway"}))
    reply = await get(Edge(echo))
    assert reply.headers.get_list("x-request-id") == ["req_gateway"]


@pytest.mark.parametrize(
    ("status", "expected", "code"),
    [(404, 404, "not_found"), (408, 408, "timeout"), (500, 503, "overloaded"), (503, 503, "overloaded")],
)
async def test_error_of_ray_gets_our_body(status: int, expected: int, code: str) -> None:
    reply = await get(Edge(Echo(PlainTextResponse("Internal Server Error", status))))
    assert reply.status_code == expected
    assert reply.json()["error"]["code"] == code
    assert reply.headers["x-request-id"].startswith("req_")
    assert ("retry-after" in reply.headers) == (expected == 503)


async def test_health_pages_of_ray_unchanged() -> None:
    reply = await get(Edge(Echo(PlainTextResponse("DRAINING", 503))), path="/-/healthz")
    assert (reply.status_code, reply.text) == (503, "DRAINING")


async def test_refusal_of_gateway_unchanged() -> None:
    refusal = JSONResponse({"error": {"code": "x"}}, 402, {"x-request-id": "req_1"})
    reply = await get(Edge(Front(Echo(refusal), 1024)))
    assert (reply.status_code, reply.json()) == (402, {"error": {"code": "x"}})


async def test_long_client_request_id_not_echoed() -> None:
    reply = await get(Front(Echo(), 1024), [("x-client-request-id", "a" * 129)])
    assert "x-client-request-id" not in reply.headers


def test_callback_returns_edge() -> None:
    [middleware] = middlewares()
    assert middleware.cls is Edge
