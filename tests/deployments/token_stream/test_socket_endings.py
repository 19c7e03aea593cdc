"""The endings of a request over the real token socket: each is settled once, by what was delivered."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import pytest
from redis.asyncio import Redis

from billing.money import parse_usd
from billing.usage import Status
from deployments.gateway.api.application import make_app
from deployments.inference.request import AdapterRejected, Overloaded
from tests.deployments.gateway.api.test_completions import records
from tests.deployments.gateway.test_endings import ONE, PROMPT
from tests.support.clockwork import ClockworkEngine, Path, token_path
from tests.support.gateway import House, MakeServices, events, until

UNREAD = 10


@dataclass
class Road:
    """A gateway whose tokens come over a socket."""

    house: House
    path: Path


@pytest.fixture
async def road(redis: Redis, make_services: MakeServices) -> AsyncIterator[Road]:
    async with token_path(ClockworkEngine(step_s=0.01), most_waiting_tokens=UNREAD) as path:
        services = make_services(redis, path.link)
        app = make_app(services)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://farebox") as client:
            services.gateway.start()
            yield Road(House(services, path.link, app, client, redis), path)  # type: ignore[arg-type]
            await services.gateway.stop()


def tokens_in(text: str) -> int:
    return len(re.findall(r"tok\d", text))


@pytest.mark.parametrize("stream", [True, False])
async def test_a_whole_answer_is_billed_whole(road: Road, stream: bool) -> None:
    reply = await road.house.chat(await road.house.tenant(), stream=stream)
    [record] = await records(road.house)
    assert (record.status, record.charged_nanos) == (Status.COMPLETE, PROMPT + 10 * ONE)
    assert tokens_in(reply.text) == 10


async def test_many_tenants_streams_at_once_each_have_their_own_tokens(road: Road) -> None:
    key = await road.house.tenant(usd="100")
    replies = await asyncio.gather(*(road.house.chat(key, stream=True, max_tokens=n) for n in range(1, 31)))
    for wanted, reply in enumerate(replies, 1):
        assert reply.status_code == 200, reply.text
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in events(reply) if c["choices"])  # type: ignore[index, union-attr]
        assert text == "".join(f"tok{number} " for number in range(wanted))


@pytest.mark.parametrize("stream", [True, False])
async def test_a_dropped_socket_bills_what_a_stream_was_given_and_makes_an_answer_free(
    road: Road, stream: bool
) -> None:
    task = asyncio.create_task(road.house.chat(await road.house.tenant(), stream=stream, max_tokens=50))
    await until(lambda: max(road.path.engine.emitted.values(), default=0) >= 5)
    [line] = road.path.link._listener._lines
    line.transport.abort()
    reply = await task
    error = events(reply)[-1]["error"] if stream else reply.json()["error"]
    assert error["code"] == "replica_lost"  # type: ignore[index, call-overload]
    delivered = tokens_in(reply.text)
    [record] = await records(road.house)
    assert (record.status, record.usage.completion_tokens) == (Status.FAILED, delivered)
    assert record.charged_nanos == (PROMPT + delivered * ONE if stream else 0)
    assert await road.house.open_holds() == 0
    await until(lambda: road.path.engine.aborted == [record.request_id])


@pytest.mark.parametrize("refusal", [Overloaded("full"), AdapterRejected("bad")])
async def test_a_refusal_costs_nothing(road: Road, refusal: Exception) -> None:
    road.path.engine.refusal = refusal  # type: ignore[assignment]
    reply = await road.house.chat(await road.house.tenant())
    assert reply.status_code == 503
    assert await road.house.balance() == parse_usd("1.00")
    assert await road.house.open_holds() == 0


async def test_a_client_that_stops_reading_is_settled_without_its_help(road: Road) -> None:
    """It never comes for the error: its connection stays open and takes nothing any more."""
    key = await road.house.tenant()
    body = {"model": "pirate", "messages": [{"role": "user", "content": "one two three"}], "max_tokens": 50}
    given = 0
    waits_for_ever = asyncio.Event()

    async def receive() -> dict[str, object]:
        if not sent:
            sent.append(True)
            return {"type": "http.request", "body": json.dumps(body | {"stream": True}).encode()}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, object]) -> None:
        nonlocal given
        given += tokens_in(str(message.get("body", b"")))
        if given >= 2:
            waits_for_ever.set()
            await asyncio.Event().wait()

    sent: list[bool] = []
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"authorization", f"Bearer {key}".encode()), (b"content-type", b"application/json")],
    }
    client = asyncio.create_task(road.house.app(scope, receive, send))  # type: ignore[arg-type]
    await waits_for_ever.wait()
    while not await records(road.house):  # noqa: ASYNC110, nothing there sets an event
        await asyncio.sleep(0.01)
    [record] = await records(road.house)
    assert (record.status, record.usage.completion_tokens) == (Status.FAILED, given)
    assert road.path.engine.emitted[record.request_id] < 50
    assert await road.house.open_holds() == 0
    assert road.house.services.gateway.open_runs == 0
    client.cancel()
    await asyncio.gather(client, return_exceptions=True)


async def test_a_gateway_that_stops_bills_what_was_given_and_stops_the_engine(road: Road) -> None:
    task = asyncio.create_task(road.house.chat(await road.house.tenant(), stream=True, max_tokens=50))
    await until(lambda: max(road.path.engine.emitted.values(), default=0) >= 5)
    await road.house.services.gateway.stop()
    delivered = tokens_in((await task).text)
    [record] = await records(road.house)
    assert (record.status, record.usage.completion_tokens) == (Status.FAILED, delivered)
    await until(lambda: road.path.engine.aborted == [record.request_id])
