"""However a request ends it is settled once: what was delivered is billed, what was not is not."""

import asyncio
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import suppress

import httpx
import pytest
from redis.asyncio import Redis

from billing.ledger.account import Grant
from billing.money import parse_usd
from billing.store.connection import connect
from billing.store.keys import shard_for
from billing.usage import Status, TenantId, Unit, UsageRecord
from cluster import valkey
from deployments.gateway.api.application import make_app
from deployments.inference.request import EngineFailed, FinishReason
from deployments.token_stream.link import ReplicaLost
from tests.deployments.gateway.api.test_completions import records
from tests.support.gateway import House, MakeServices, events, memory_folder, until
from tests.support.scripted import ScriptedLink

ONE = parse_usd("0.002")
PROMPT = parse_usd("0.005")


def chat_body(**more: object) -> dict[str, object]:
    body = {"model": "pirate", "messages": [{"role": "user", "content": "one two three"}], "max_tokens": 10}
    return body | more


async def hang_up(house: House, key: str, after_chunks: int, stream: bool = True) -> None:
    """Speak ASGI as a server does when its client goes away: the task is cancelled."""
    import json

    seen = 0
    gone = asyncio.Event()

    async def receive() -> dict[str, object]:
        if not sent:
            sent.append(True)
            return {"type": "http.request", "body": json.dumps(chat_body(stream=stream)).encode()}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, object]) -> None:
        nonlocal seen
        seen += message["type"] == "http.response.body" and b"tok" in message["body"]
        if seen >= after_chunks > 0:
            gone.set()

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
    task = asyncio.create_task(house.app(scope, receive, send))
    if after_chunks == 0:
        await until(lambda: bool(house.link.steps))
        task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await house.settled()


async def test_a_client_that_leaves_a_stream_stops_the_engine_and_pays_until_then(
    house: House, link: ScriptedLink
) -> None:
    link.length, link.pause_s = 10, 0.01
    await hang_up(house, await house.tenant(usd="1.00"), after_chunks=3)
    [record] = await records(house)
    assert record.status is Status.CANCELLED
    assert 3 <= record.usage.completion_tokens <= 4
    assert record.charged_nanos == PROMPT + record.usage.completion_tokens * ONE
    assert link.aborted == [record.request_id]
    assert link.steps[record.request_id] <= 4
    assert await house.open_holds() == 0
    assert house.services.gateway.open_runs == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_a_call_cut_by_the_server_in_front_is_settled_as_left(
    house: House, link: ScriptedLink, stream: bool
) -> None:
    link.length, link.pause_s = 10, 0.02
    await hang_up(house, await house.tenant(usd="1.00"), after_chunks=0, stream=stream)
    [record] = await records(house)
    assert record.status is Status.CANCELLED
    assert record.usage.prompt_tokens == 5
    assert link.aborted == [record.request_id]
    assert await house.open_holds() == 0


async def test_a_client_that_leaves_while_its_hold_is_made_pays_nothing(house: House) -> None:
    key = await house.tenant(usd="1.00")
    task = asyncio.create_task(house.chat(key))
    while not house.services.gateway.settler.tasks:  # noqa: ASYNC110, a moment that no event marks
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await house.settled()
    assert await house.balance() == parse_usd("1.00")
    assert await house.open_holds() == 0
    assert all(record.charged_nanos == 0 for record in await records(house))


@pytest.mark.parametrize("failure", [ReplicaLost("gone"), EngineFailed("broke")])
async def test_a_stream_that_we_lose_is_billed_for_what_was_delivered(
    house: House, link: ScriptedLink, failure: Exception
) -> None:
    link.length, link.failure, link.fails_at = 10, failure, 3
    key = await house.tenant(usd="1.00")
    reply = await house.chat(key, stream=True)
    assert reply.status_code == 200
    assert "[DONE]" not in reply.text
    last = events(reply)[-1]
    assert last["error"]["code"] in ("replica_lost", "engine_failed")
    [record] = await records(house)
    assert record.status is Status.FAILED
    assert record.usage.completion_tokens == 3
    assert record.charged_nanos == PROMPT + 3 * ONE


@pytest.mark.parametrize("failure", [ReplicaLost("gone"), EngineFailed("broke")])
async def test_an_answer_that_we_lose_is_free(house: House, link: ScriptedLink, failure: Exception) -> None:
    link.length, link.failure, link.fails_at = 10, failure, 3
    reply = await house.chat(await house.tenant(usd="1.00"))
    assert reply.status_code in (500, 503)
    [record] = await records(house)
    assert (record.status, record.charged_nanos) == (Status.FAILED, 0)
    assert await house.balance() == parse_usd("1.00")


@pytest.mark.parametrize("fails_at", [0, 3])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_bug_of_ours_leaves_no_hold_open(house: House, link: ScriptedLink, stream: bool, fails_at: int) -> None:
    link.length, link.failure, link.fails_at = 10, RuntimeError("nobody foresaw this"), fails_at
    key = await house.tenant(usd="1.00")
    with suppress(RuntimeError):
        reply = await house.chat(key, stream=stream)
        assert stream or reply.status_code == 500
    await house.settled()
    assert await house.open_holds() == 0
    [record] = await records(house)
    assert record.charged_nanos == (PROMPT + 3 * ONE if stream and fails_at else 0)


@pytest.mark.parametrize("reason", [FinishReason.ERROR, FinishReason.ABORT])
async def test_an_engine_that_gives_up_on_a_request_counts_as_our_failure(
    house: House, link: ScriptedLink, reason: FinishReason
) -> None:
    link.ends_with = reason
    reply = await house.chat(await house.tenant(usd="1.00"))
    assert reply.status_code == 500
    assert await house.balance() == parse_usd("1.00")


async def test_a_hold_that_expired_elsewhere_ends_the_stream_and_what_was_delivered_is_billed_once(
    house: House, link: ScriptedLink
) -> None:
    link.length, link.pause_s = 60, 0.02
    key = await house.tenant(usd="1.00")
    task = asyncio.create_task(house.chat(key, stream=True, max_tokens=50))
    await until(lambda: bool(link.steps))
    [request_id] = link.steps
    shard = shard_for(TenantId("acme"))
    expired = 0
    while not expired:  # a checkpoint may renew it in between
        await house.redis.zadd(shard.leases, {request_id: 1})
        expired = await house.services.ledger.expire()
    reply = await task
    assert events(reply)[-1]["error"]["code"] == "metering_unavailable"
    assert link.steps[request_id] < 50
    delivered = sum("tok" in str(chunk) for chunk in events(reply))
    expired, late = await records(house)
    assert (expired.status, late.status) == (Status.EXPIRED, Status.FAILED)
    assert expired.usage.completion_tokens + late.usage.completion_tokens == delivered
    assert expired.charged_nanos + late.charged_nanos == PROMPT + delivered * ONE


async def tell_and_fall_silent(house: House) -> None:
    """As a gateway does that is killed right after a checkpoint."""
    await house.services.gateway.leases.renew_once()
    for loop in house.services.gateway._loops:
        loop.cancel()
    await asyncio.gather(*house.services.gateway._loops, return_exceptions=True)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_gateway_that_dies_bills_what_a_stream_was_given_and_nothing_of_an_answer(
    house: House, link: ScriptedLink, stream: bool
) -> None:
    link.length, link.pause_s = 60, 0.02
    key = await house.tenant(usd="1.00")
    task = asyncio.create_task(house.chat(key, stream=stream, max_tokens=50))
    await until(lambda: max(link.steps.values(), default=0) >= 5)
    [request_id] = link.steps
    await tell_and_fall_silent(house)
    await house.redis.zadd(shard_for(TenantId("acme")).leases, {request_id: 1})
    assert await house.services.ledger.expire() == 1
    [record] = await records(house)
    assert record.status is Status.EXPIRED
    assert (record.usage.completion_tokens >= 4) is stream
    assert record.charged_nanos == (PROMPT + record.usage.completion_tokens * ONE if stream else 0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await house.settled()


async def test_a_gateway_that_dies_while_a_stream_is_queued_bills_nothing(house: House, link: ScriptedLink) -> None:
    link.pause_s = 30
    key = await house.tenant(usd="1.00")
    task = asyncio.create_task(house.chat(key, model="acme/private:1", stream=True))
    await until(lambda: bool(link.jobs))
    await tell_and_fall_silent(house)
    request_id = link.jobs[0].request_id
    assert await house.redis.zadd(shard_for(TenantId("acme")).leases, {request_id: 1}) == 0
    assert await house.services.ledger.expire() == 1
    [record] = await records(house)
    assert (record.status, record.charged_nanos) == (Status.EXPIRED, 0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_client_that_does_not_read_is_billed_for_what_it_was_given_and_holds_nothing_open(
    house: House, link: ScriptedLink
) -> None:
    link.length, link.pause_s = 60, 0.02
    key = await house.tenant(usd="1.00")
    task = asyncio.create_task(house.chat(key, stream=True, max_tokens=50))
    await until(lambda: max(link.steps.values(), default=0) >= 3)
    link.slow = frozenset(link.steps)
    chunks = events(await task)
    assert "error" in chunks[-1]
    delivered = sum("tok" in str(chunk) for chunk in chunks)
    [record] = await records(house)
    assert (record.status, record.usage.completion_tokens) == (Status.FAILED, delivered)
    assert record.charged_nanos == PROMPT + delivered * ONE
    assert link.aborted == [record.request_id]
    assert await house.open_holds() == 0


async def test_a_shutdown_bills_a_stream_for_what_was_yielded_and_tells_it(house: House, link: ScriptedLink) -> None:
    link.length, link.pause_s = 60, 0.02
    key = await house.tenant(usd="1.00")
    task = asyncio.create_task(house.chat(key, stream=True, max_tokens=50))
    await until(lambda: max(link.steps.values(), default=0) >= 3)
    await house.services.gateway.stop()
    chunks = events(await task)
    assert chunks[-1]["error"]["code"] == "replica_lost"
    delivered = sum("tok" in str(chunk) for chunk in chunks)
    [record] = await records(house)
    assert (record.status, record.usage.completion_tokens) == (Status.FAILED, delivered)
    assert record.charged_nanos == PROMPT + delivered * ONE
    assert link.aborted == [record.request_id]
    assert await house.open_holds() == 0


async def test_a_shutdown_makes_an_unfinished_answer_free(house: House, link: ScriptedLink) -> None:
    link.length, link.pause_s = 60, 0.02
    key = await house.tenant(usd="1.00")
    task = asyncio.create_task(house.chat(key, max_tokens=50))
    await until(lambda: max(link.steps.values(), default=0) >= 3)
    await house.services.gateway.stop()
    reply = await task
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "replica_lost")
    [record] = await records(house)
    assert (record.status, record.charged_nanos) == (Status.FAILED, 0)
    assert link.aborted == [record.request_id]
    assert (await house.balance(), await house.open_holds()) == (parse_usd("1.00"), 0)


async def test_a_request_that_outlives_its_hold_ends_with_length_and_costs_the_hold(
    house: House, link: ScriptedLink
) -> None:
    link.length, link.compute_ms = 60, 25_000
    key = await house.tenant(usd="1.00")
    reply = await house.chat(key, model="metered", max_tokens=50)
    assert reply.json()["choices"][0]["finish_reason"] == "length"
    [record] = await records(house)
    assert record.status is Status.COMPLETE
    assert record.usage.completion_tokens == 4  # a hundred seconds are all that a dollar pays for
    assert record.charged_nanos == record.list_nanos == parse_usd("1.00")
    assert link.aborted == [record.request_id]


async def test_a_request_that_a_bucket_of_requests_covers_runs_to_its_end(house: House, link: ScriptedLink) -> None:
    link.length, link.compute_ms = 6, 25_000
    key = await house.tenant(usd="1.00")
    await house.services.ledger.grant(Grant("test:calls", TenantId("acme"), Unit.REQUESTS, 1))
    reply = await house.chat(key, model="metered", max_tokens=50)
    assert reply.json()["choices"][0]["finish_reason"] == "stop"
    assert await house.balance() == parse_usd("1.00")


class Fragile:
    """A gateway on a store of its own, which a test may hang or end."""

    def __init__(self, server: valkey.Valkey, redis: Redis, house: House) -> None:
        self.server, self.redis, self.house = server, redis, house

    def hang(self) -> None:
        os.kill(self.server.pid, signal.SIGSTOP)

    def resume(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.server.pid, signal.SIGCONT)


@pytest.fixture
async def fragile(link: ScriptedLink, make_services: MakeServices) -> AsyncIterator[Fragile]:
    folder = memory_folder("w")
    server = valkey.start(folder)
    redis = await connect(server.url)
    services = make_services(redis, link)
    app = make_app(services)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://farebox") as client:
        services.gateway.start()
        made = Fragile(server, redis, House(services, link, app, client, redis))
        yield made
        made.resume()
        await services.gateway.stop()
    await redis.aclose()
    server.stop()
    shutil.rmtree(folder)


@pytest.mark.prompt
async def test_a_hung_store_refuses_new_requests_in_time(fragile: Fragile) -> None:
    house = fragile.house
    key = await house.tenant()
    assert (await house.chat(key)).status_code == 200
    fragile.hang()
    started = asyncio.get_running_loop().time()
    reply = await house.chat(key)
    assert asyncio.get_running_loop().time() - started < 0.9
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "metering_unavailable"
    assert int(reply.headers["retry-after"]) >= 1
    assert "retry shortly" in reply.json()["detail"]
    assert (await house.client.get("/readyz")).json()["checks"]["store"] is False
    assert len(house.link.jobs) == 1
    fragile.resume()


@pytest.mark.prompt
async def test_a_store_that_is_gone_is_not_described_to_clients(fragile: Fragile) -> None:
    key = await fragile.house.tenant()
    fragile.server.kill()
    reply = await fragile.house.chat(key)
    assert reply.status_code == 503
    assert "retry shortly" in reply.json()["error"]["message"]
    assert not {"sock", "connect", "Error"} & set(re.findall("[A-Za-z]+", reply.text))


@pytest.mark.prompt
async def test_a_running_stream_outlives_the_store_and_its_record_is_replayed(
    fragile: Fragile, link: ScriptedLink
) -> None:
    house = fragile.house
    key = await house.tenant(usd="1.00")
    link.length, link.pause_s = 10, 0.02
    task = asyncio.create_task(house.chat(key, stream=True))
    await until(lambda: bool(link.steps))
    fragile.hang()
    reply = await task
    chunks = events(reply)
    assert sum("tok" in str(chunk) for chunk in chunks) == 10
    assert chunks[-1]["error"]["code"] == "metering_unavailable"
    assert "[DONE]" not in reply.text
    assert house.services.gateway.settler.spooled == 1
    fragile.resume()
    await until(lambda: not house.services.gateway.settler.spooled)
    [record] = await records(house)
    assert (record.status, record.usage.completion_tokens) == (Status.COMPLETE, 10)
    assert await house.balance() == parse_usd("1.00") - PROMPT - 10 * ONE


@pytest.mark.prompt
async def test_an_answer_that_cannot_be_recorded_is_withheld_and_free(fragile: Fragile, link: ScriptedLink) -> None:
    house = fragile.house
    key = await house.tenant(usd="1.00")
    link.length, link.pause_s = 10, 0.02
    task = asyncio.create_task(house.chat(key))
    await until(lambda: bool(link.steps))
    fragile.hang()
    reply = await task
    assert reply.status_code == 503
    assert "tok" not in reply.text
    fragile.resume()
    await until(lambda: not house.services.gateway.settler.spooled)
    assert sum(record.charged_nanos for record in await records(house)) in (0, PROMPT + 10 * ONE)
    assert await house.balance() == parse_usd("1.00"), "what the store did when it woke up is given back"


async def test_one_record_for_each_of_many_at_once(house: House, link: ScriptedLink) -> None:
    link.pause_s = 0.001
    key = await house.tenant(usd="100")
    replies = await asyncio.gather(*(house.chat(key, stream=bool(number % 2)) for number in range(100)))
    assert {reply.status_code for reply in replies} == {200}
    found: list[UsageRecord] = await records(house)
    assert len({record.record_id for record in found}) == 100
    assert await house.balance() == parse_usd("100") - 100 * parse_usd("0.015")
