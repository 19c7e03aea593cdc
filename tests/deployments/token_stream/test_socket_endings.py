"""The endings of a request whose tokens come over a real socket: it is settled once, by what was delivered."""

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from redis.asyncio import Redis

from billing.money import parse_usd
from billing.usage import Status
from deployments.inference.request import AdapterRejected, Overloaded
from tests.support.clockwork import ClockworkEngine, TokenPath, token_path
from tests.support.gateway import PROMPT_NANOS, TOKEN_NANOS, Harness, MakeGateway, chat_body, events, running
from tests.support.waiting import until

UNREAD = 10


@dataclass
class SocketGateway:
    """A gateway whose tokens come over a socket."""

    harness: Harness
    path: TokenPath


@pytest.fixture
async def over_socket(redis: Redis, make_gateway: MakeGateway) -> AsyncIterator[SocketGateway]:
    async with (
        token_path(ClockworkEngine(step_s=0.01), max_unread_tokens=UNREAD) as path,
        running(make_gateway(redis, path.link), path.link) as harness,
    ):
        yield SocketGateway(harness, path)


def tokens_in(text: str) -> int:
    return len(re.findall(r"tok\d", text))


@pytest.mark.parametrize("stream", [True, False])
async def test_complete_answer_is_billed(over_socket: SocketGateway, stream: bool) -> None:
    reply = await over_socket.harness.chat(await over_socket.harness.tenant(), stream=stream)
    [record] = await over_socket.harness.records()
    assert (record.status, record.charged_nanos) == (Status.COMPLETE, PROMPT_NANOS + 10 * TOKEN_NANOS)
    assert tokens_in(reply.text) == 10


async def test_concurrent_streams_get_own_tokens(over_socket: SocketGateway) -> None:
    key = await over_socket.harness.tenant(usd="100")
    replies = await asyncio.gather(*(over_socket.harness.chat(key, stream=True, max_tokens=n) for n in range(1, 31)))
    for wanted, reply in enumerate(replies, 1):
        assert reply.status_code == 200, reply.text
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in events(reply) if c["choices"])  # type: ignore[index, union-attr]
        assert text == "".join(f"tok{number} " for number in range(wanted))


@pytest.mark.parametrize("stream", [True, False])
async def test_dropped_socket_bills_delivered(over_socket: SocketGateway, stream: bool) -> None:
    task = asyncio.create_task(
        over_socket.harness.chat(await over_socket.harness.tenant(), stream=stream, max_tokens=50)
    )
    await until(lambda: max(over_socket.path.engine.emitted.values(), default=0) >= 5)
    over_socket.path.link.listener.drop_connections()
    reply = await task
    error = events(reply)[-1]["error"] if stream else reply.json()["error"]
    assert error["code"] == "replica_lost"  # type: ignore[index, call-overload]
    delivered = tokens_in(reply.text)
    [record] = await over_socket.harness.records()
    assert (record.status, record.usage.completion_tokens) == (Status.FAILED, delivered)
    assert record.charged_nanos == (PROMPT_NANOS + delivered * TOKEN_NANOS if stream else 0)
    assert await over_socket.harness.open_holds() == 0
    await until(lambda: over_socket.path.engine.aborted == [record.request_id])


@pytest.mark.parametrize("refusal", [Overloaded("full"), AdapterRejected("bad")])
async def test_refusal_is_free(over_socket: SocketGateway, refusal: Exception) -> None:
    over_socket.path.engine.refusal = refusal  # type: ignore[assignment]
    reply = await over_socket.harness.chat(await over_socket.harness.tenant())
    assert reply.status_code == 503
    assert await over_socket.harness.balance() == parse_usd("1.00")
    assert await over_socket.harness.open_holds() == 0


async def test_client_that_stops_reading_is_settled(over_socket: SocketGateway) -> None:
    """Its connection stays open, and ``send`` never returns: it does not see the error."""
    harness = over_socket.harness
    key = await harness.tenant()
    delivered = 0
    is_stuck = asyncio.Event()

    async def never() -> dict[str, object]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, object]) -> None:
        nonlocal delivered
        delivered += tokens_in(str(message.get("body", b"")))
        if delivered >= 2:
            is_stuck.set()
            await asyncio.Event().wait()

    client = asyncio.create_task(harness.call(key, chat_body(max_tokens=50, stream=True), never, send))
    await is_stuck.wait()
    while not await harness.records():  # noqa: ASYNC110, no event marks this moment
        await asyncio.sleep(0.01)
    [record] = await harness.records()
    assert (record.status, record.usage.completion_tokens) == (Status.FAILED, delivered)
    assert over_socket.path.engine.emitted[record.request_id] < 50
    assert await harness.open_holds() == 0
    assert harness.gateway.running == 0
    client.cancel()
    await asyncio.gather(client, return_exceptions=True)


async def test_stopped_gateway_bills_delivered_and_aborts(over_socket: SocketGateway) -> None:
    task = asyncio.create_task(over_socket.harness.chat(await over_socket.harness.tenant(), stream=True, max_tokens=50))
    await until(lambda: max(over_socket.path.engine.emitted.values(), default=0) >= 5)
    await over_socket.harness.gateway.stop()
    delivered = tokens_in((await task).text)
    [record] = await over_socket.harness.records()
    assert (record.status, record.usage.completion_tokens) == (Status.FAILED, delivered)
    await until(lambda: over_socket.path.engine.aborted == [record.request_id])
