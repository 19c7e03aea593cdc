"""What a client sends cannot steer Ray, and what Ray answers alone looks like ours."""

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.gateway.edge import Edge, Front, middlewares


class Echo:
    """Answers with the headers that reached it, as Ray's code behind the edge would see them."""

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
async def test_headers_that_steer_ray_do_not_reach_it(name: str) -> None:
    echo = Echo()
    await get(Edge(echo), [(name, "1"), ("x-harmless", "2")])
    names = [seen for seen, _ in echo.seen]
    assert name.lower() not in names
    assert "x-harmless" in names


async def test_the_clients_request_id_is_renamed_and_ours_takes_its_place() -> None:
    echo = Echo()
    reply = await get(Edge(echo), [("x-request-id", "theirs"), ("X-REQUEST-ID", "again")])
    ids = [value for name, value in echo.seen if name == "x-request-id"]
    assert len(ids) == 1
    assert ids[0].startswith("req_")
    assert [value for name, value in echo.seen if name == "x-client-request-id"] == ["theirs", "again"]
    assert reply.headers.get_list("x-request-id") == ids


async def test_the_gateways_own_id_wins_over_rays_on_the_reply() -> None:
    echo = Echo(JSONResponse({}, headers={"x-request-id": "req_gateway"}))
    reply = await get(Edge(echo))
    assert reply.headers.get_list("x-request-id") == ["req_gateway"]


@pytest.mark.parametrize(
    ("status", "told", "code"),
    [(404, 404, "not_found"), (408, 408, "timeout"), (500, 503, "overloaded"), (503, 503, "overloaded")],
)
async def test_an_error_of_rays_own_gets_our_body(status: int, told: int, code: str) -> None:
    reply = await get(Edge(Echo(PlainTextResponse("Internal Server Error", status))))
    assert reply.status_code == told
    assert reply.json()["error"]["code"] == code
    assert reply.headers["x-request-id"].startswith("req_")
    assert ("retry-after" in reply.headers) == (told == 503)


async def test_rays_own_health_pages_stay_as_they_are() -> None:
    reply = await get(Edge(Echo(PlainTextResponse("DRAINING", 503))), path="/-/healthz")
    assert (reply.status_code, reply.text) == (503, "DRAINING")


async def test_a_refusal_of_the_gateway_passes_unchanged() -> None:
    refusal = JSONResponse({"error": {"code": "x"}}, 402, {"x-request-id": "req_1"})
    reply = await get(Edge(Front(Echo(refusal), 1024)))
    assert (reply.status_code, reply.json()) == (402, {"error": {"code": "x"}})


async def test_an_id_that_cannot_be_printed_is_not_echoed() -> None:
    reply = await get(Front(Echo(), 1024), [("x-client-request-id", "a" * 129)])
    assert "x-client-request-id" not in reply.headers


def test_ray_gets_the_edge_from_its_callback() -> None:
    [middleware] = middlewares()
    assert middleware.cls is Edge
