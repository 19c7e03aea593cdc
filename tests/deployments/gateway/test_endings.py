"""The endings of a request: it is settled once, and what was delivered is billed."""

import asyncio
import re
from contextlib import suppress

import pytest

from billing.ledger.account import Grant
from billing.money import parse_usd
from billing.store.keys import shard_for
from billing.usage import Status, TenantId, Unit, UsageRecord
from deployments.inference.request import EngineFailed, FinishReason
from deployments.token_stream.errors import ReplicaLost
from tests.support.gateway import PROMPT_NANOS, TOKEN_NANOS, Harness, IsolatedGateway, events
from tests.support.scripted import ScriptedLink
from tests.support.waiting import until


async def test_disconnected_stream_is_billed_for_generated(harness: Harness, link: ScriptedLink) -> None:
    link.length, link.pause_s = 10, 0.01
    await harness.disconnect(await harness.tenant(usd="1.00"), after_chunks=3)
    [record] = await harness.records()
    assert record.status is Status.CANCELLED
    assert 3 <= record.usage.completion_tokens <= 4
    assert record.charged_nanos == PROMPT_NANOS + record.usage.completion_tokens * TOKEN_NANOS
    assert link.aborted == [record.request_id]
    assert link.steps[record.request_id] <= 4
    assert await harness.open_holds() == 0
    assert harness.gateway.running == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_call_cancelled_by_server_is_billed_as_disconnected(
    harness: Harness, link: ScriptedLink, stream: bool
) -> None:
    link.length, link.pause_s = 10, 0.02
    await harness.disconnect(await harness.tenant(usd="1.00"), after_chunks=0, stream=stream)
    [record] = await harness.records()
    assert record.status is Status.CANCELLED
    assert record.usage.prompt_tokens == 5
    assert link.aborted == [record.request_id]
    assert await harness.open_holds() == 0


async def test_disconnect_during_hold_is_free(harness: Harness) -> None:
    key = await harness.tenant(usd="1.00")
    task = asyncio.create_task(harness.chat(key))
    while not harness.gateway.parts.settler.tasks:  # noqa: ASYNC110, no event marks this moment
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await harness.settled()
    assert await harness.balance() == parse_usd("1.00")
    assert await harness.open_holds() == 0
    assert all(record.charged_nanos == 0 for record in await harness.records())


@pytest.mark.parametrize("failure", [ReplicaLost("gone"), EngineFailed("broke")])
async def test_failed_stream_is_billed_for_delivered(harness: Harness, link: ScriptedLink, failure: Exception) -> None:
    link.length, link.failure, link.fails_at = 10, failure, 3
    key = await harness.tenant(usd="1.00")
    reply = await harness.chat(key, stream=True)
    assert reply.status_code == 200
    assert "[DONE]" not in reply.text
    last = events(reply)[-1]
    assert last["error"]["code"] in ("replica_lost", "engine_failed")
    [record] = await harness.records()
    assert record.status is Status.FAILED
    assert record.usage.completion_tokens == 3
    assert record.charged_nanos == PROMPT_NANOS + 3 * TOKEN_NANOS


@pytest.mark.parametrize("failure", [ReplicaLost("gone"), EngineFailed("broke")])
async def test_failed_answer_is_free(harness: Harness, link: ScriptedLink, failure: Exception) -> None:
    link.length, link.failure, link.fails_at = 10, failure, 3
    reply = await harness.chat(await harness.tenant(usd="1.00"))
    assert reply.status_code in (500, 503)
    [record] = await harness.records()
    assert (record.status, record.charged_nanos) == (Status.FAILED, 0)
    assert await harness.balance() == parse_usd("1.00")


@pytest.mark.parametrize("fails_at", [0, 3])
@pytest.mark.parametrize("stream", [True, False])
async def test_bug_leaves_no_hold_open(harness: Harness, link: ScriptedLink, stream: bool, fails_at: int) -> None:
    link.length, link.failure, link.fails_at = 10, RuntimeError("a bug"), fails_at
    key = await harness.tenant(usd="1.00")
    with suppress(RuntimeError):
        reply = await harness.chat(key, stream=stream)
        assert stream or reply.status_code == 500
    await harness.settled()
    assert await harness.open_holds() == 0
    [record] = await harness.records()
    assert record.charged_nanos == (PROMPT_NANOS + 3 * TOKEN_NANOS if stream and fails_at else 0)


@pytest.mark.parametrize("stream", [True, False])
async def test_bug_after_output_leaves_no_hold_open(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """The request is settled although no code of its own failed."""

    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("deployments.gateway.api.openai.merged", broken)
    monkeypatch.setattr("deployments.gateway.api.openai.Shape.delta", broken)
    key = await harness.tenant(usd="1.00")
    with suppress(RuntimeError):
        await harness.chat(key, stream=stream)
    await harness.settled()
    assert (await harness.open_holds(), harness.gateway.running) == (0, 0)


@pytest.mark.parametrize("reason", [FinishReason.ERROR, FinishReason.ABORT])
async def test_request_ended_by_engine_is_free(harness: Harness, link: ScriptedLink, reason: FinishReason) -> None:
    link.ends_with = reason
    reply = await harness.chat(await harness.tenant(usd="1.00"))
    assert reply.status_code == 500
    assert await harness.balance() == parse_usd("1.00")


async def test_expired_hold_ends_stream_billed_once(harness: Harness, link: ScriptedLink) -> None:
    link.length, link.pause_s = 60, 0.02
    key = await harness.tenant(usd="1.00")
    task = asyncio.create_task(harness.chat(key, stream=True, max_tokens=50))
    await until(lambda: bool(link.steps))
    [request_id] = link.steps
    shard = shard_for(TenantId("acme"))
    expired = 0
    while not expired:  # a checkpoint may renew it in between
        await harness.redis.zadd(shard.leases, {request_id: 1})
        expired = await harness.gateway.parts.ledger.expire()
    reply = await task
    assert events(reply)[-1]["error"]["code"] == "metering_unavailable"
    assert link.steps[request_id] < 50
    delivered = sum("tok" in str(chunk) for chunk in events(reply))
    expired, late = await harness.records()
    assert (expired.status, late.status) == (Status.EXPIRED, Status.FAILED)
    assert expired.usage.completion_tokens + late.usage.completion_tokens == delivered
    assert expired.charged_nanos + late.charged_nanos == PROMPT_NANOS + delivered * TOKEN_NANOS


@pytest.mark.parametrize("stream", [True, False])
async def test_dead_gateway_bills_last_checkpoint(harness: Harness, link: ScriptedLink, stream: bool) -> None:
    link.length, link.pause_s = 60, 0.02
    key = await harness.tenant(usd="1.00")
    task = asyncio.create_task(harness.chat(key, stream=stream, max_tokens=50))
    await until(lambda: max(link.steps.values(), default=0) >= 5)
    [request_id] = link.steps
    await harness.checkpoint_and_die()
    await harness.redis.zadd(shard_for(TenantId("acme")).leases, {request_id: 1})
    assert await harness.gateway.parts.ledger.expire() == 1
    [record] = await harness.records()
    assert record.status is Status.EXPIRED
    assert (record.usage.completion_tokens >= 4) is stream
    assert record.charged_nanos == (PROMPT_NANOS + record.usage.completion_tokens * TOKEN_NANOS if stream else 0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await harness.settled()


async def test_dead_gateway_bills_nothing_of_queued_stream(harness: Harness, link: ScriptedLink) -> None:
    link.pause_s = 30
    key = await harness.tenant(usd="1.00")
    task = asyncio.create_task(harness.chat(key, model="acme/private:1", stream=True))
    await until(lambda: bool(link.requests))
    await harness.checkpoint_and_die()
    request_id = link.requests[0].request_id
    assert await harness.redis.zadd(shard_for(TenantId("acme")).leases, {request_id: 1}) == 0
    assert await harness.gateway.parts.ledger.expire() == 1
    [record] = await harness.records()
    assert (record.status, record.charged_nanos) == (Status.EXPIRED, 0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_slow_reader_is_billed_for_delivered(harness: Harness, link: ScriptedLink) -> None:
    link.length, link.pause_s = 60, 0.02
    key = await harness.tenant(usd="1.00")
    task = asyncio.create_task(harness.chat(key, stream=True, max_tokens=50))
    await until(lambda: max(link.steps.values(), default=0) >= 3)
    link.slow = frozenset(link.steps)
    chunks = events(await task)
    assert "error" in chunks[-1]
    delivered = sum("tok" in str(chunk) for chunk in chunks)
    [record] = await harness.records()
    assert (record.status, record.usage.completion_tokens) == (Status.FAILED, delivered)
    assert record.charged_nanos == PROMPT_NANOS + delivered * TOKEN_NANOS
    assert link.aborted == [record.request_id]
    assert await harness.open_holds() == 0


async def test_shutdown_bills_stream_for_delivered(harness: Harness, link: ScriptedLink) -> None:
    link.length, link.pause_s = 60, 0.02
    key = await harness.tenant(usd="1.00")
    task = asyncio.create_task(harness.chat(key, stream=True, max_tokens=50))
    await until(lambda: max(link.steps.values(), default=0) >= 3)
    await harness.gateway.stop()
    chunks = events(await task)
    assert chunks[-1]["error"]["code"] == "replica_lost"
    delivered = sum("tok" in str(chunk) for chunk in chunks)
    [record] = await harness.records()
    assert (record.status, record.usage.completion_tokens) == (Status.FAILED, delivered)
    assert record.charged_nanos == PROMPT_NANOS + delivered * TOKEN_NANOS
    assert link.aborted == [record.request_id]
    assert await harness.open_holds() == 0


async def test_shutdown_makes_unfinished_answer_free(harness: Harness, link: ScriptedLink) -> None:
    link.length, link.pause_s = 60, 0.02
    key = await harness.tenant(usd="1.00")
    task = asyncio.create_task(harness.chat(key, max_tokens=50))
    await until(lambda: max(link.steps.values(), default=0) >= 3)
    await harness.gateway.stop()
    reply = await task
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "replica_lost")
    [record] = await harness.records()
    assert (record.status, record.charged_nanos) == (Status.FAILED, 0)
    assert link.aborted == [record.request_id]
    assert (await harness.balance(), await harness.open_holds()) == (parse_usd("1.00"), 0)


async def test_request_beyond_its_credit_ends_with_length(harness: Harness, link: ScriptedLink) -> None:
    link.length, link.compute_ms = 60, 25_000
    key = await harness.tenant(usd="1.00")
    reply = await harness.chat(key, model="metered", max_tokens=50)
    assert reply.json()["choices"][0]["finish_reason"] == "length"
    [record] = await harness.records()
    assert record.status is Status.COMPLETE
    assert record.usage.completion_tokens == 4  # a dollar pays for a hundred seconds
    assert record.charged_nanos == record.list_nanos == parse_usd("1.00")
    assert link.aborted == [record.request_id]


async def test_request_covered_by_requests_bucket_runs_to_its_end(harness: Harness, link: ScriptedLink) -> None:
    link.length, link.compute_ms = 6, 25_000
    key = await harness.tenant(usd="1.00")
    await harness.gateway.parts.ledger.grant(Grant("test:calls", TenantId("acme"), Unit.REQUESTS, 1))
    reply = await harness.chat(key, model="metered", max_tokens=50)
    assert reply.json()["choices"][0]["finish_reason"] == "stop"
    assert await harness.balance() == parse_usd("1.00")


@pytest.mark.prompt
async def test_hung_store_refuses_requests_in_time(isolated: IsolatedGateway) -> None:
    harness = isolated.harness
    key = await harness.tenant()
    assert (await harness.chat(key)).status_code == 200
    isolated.hang()
    started = asyncio.get_running_loop().time()
    reply = await harness.chat(key)
    assert asyncio.get_running_loop().time() - started < 0.9
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "metering_unavailable"
    assert int(reply.headers["retry-after"]) >= 1
    assert "retry shortly" in reply.json()["detail"]
    assert (await harness.client.get("/readyz")).json()["checks"]["store"] is False
    assert len(harness.link.requests) == 1
    isolated.resume()


@pytest.mark.prompt
async def test_error_does_not_describe_store(isolated: IsolatedGateway) -> None:
    key = await isolated.harness.tenant()
    isolated.server.kill()
    reply = await isolated.harness.chat(key)
    assert reply.status_code == 503
    assert "retry shortly" in reply.json()["error"]["message"]
    assert not {"sock", "connect", "Error"} & set(re.findall("[A-Za-z]+", reply.text))


@pytest.mark.prompt
async def test_stream_outlives_store_and_record_is_replayed(isolated: IsolatedGateway, link: ScriptedLink) -> None:
    harness = isolated.harness
    key = await harness.tenant(usd="1.00")
    link.length, link.pause_s = 10, 0.02
    task = asyncio.create_task(harness.chat(key, stream=True))
    await until(lambda: bool(link.steps))
    isolated.hang()
    reply = await task
    chunks = events(reply)
    assert sum("tok" in str(chunk) for chunk in chunks) == 10
    assert chunks[-1]["error"]["code"] == "metering_unavailable"
    assert "[DONE]" not in reply.text
    assert harness.gateway.parts.settler.spooled == 1
    isolated.resume()
    await until(lambda: not harness.gateway.parts.settler.spooled)
    [record] = await harness.records()
    assert (record.status, record.usage.completion_tokens) == (Status.COMPLETE, 10)
    assert await harness.balance() == parse_usd("1.00") - PROMPT_NANOS - 10 * TOKEN_NANOS


@pytest.mark.prompt
async def test_answer_withheld_when_it_cannot_be_recorded(isolated: IsolatedGateway, link: ScriptedLink) -> None:
    harness = isolated.harness
    key = await harness.tenant(usd="1.00")
    link.length, link.pause_s = 10, 0.02
    task = asyncio.create_task(harness.chat(key))
    await until(lambda: bool(link.steps))
    isolated.hang()
    reply = await task
    assert reply.status_code == 503
    assert "tok" not in reply.text
    isolated.resume()
    await until(lambda: not harness.gateway.parts.settler.spooled)
    assert sum(record.charged_nanos for record in await harness.records()) in (0, PROMPT_NANOS + 10 * TOKEN_NANOS)
    assert await harness.balance() == parse_usd("1.00"), "what the store charged when it resumed is given back"


async def test_one_record_for_each_of_many(harness: Harness, link: ScriptedLink) -> None:
    link.pause_s = 0.001
    key = await harness.tenant(usd="100")
    replies = await asyncio.gather(*(harness.chat(key, stream=bool(number % 2)) for number in range(100)))
    assert {reply.status_code for reply in replies} == {200}
    found: list[UsageRecord] = await harness.records()
    assert len({record.record_id for record in found}) == 100
    assert await harness.balance() == parse_usd("100") - 100 * parse_usd("0.015")
