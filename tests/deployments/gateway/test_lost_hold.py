"""Requests whose hold the store has lost: what was delivered is charged once."""

import asyncio

import pytest

from billing.money import parse_usd
from billing.store.keys import shard_for
from billing.usage import Status, TenantId
from tests.support.gateway import PROMPT_NANOS, TOKEN_NANOS, Harness, events
from tests.support.scripted import ScriptedLink
from tests.support.waiting import until


async def lose_hold(harness: Harness, request_id: str) -> None:
    """Undo a hold, as a failover of the store does whose replica had not received it."""
    shard, tenant = shard_for(TenantId("acme")), TenantId("acme")
    await harness.redis.hdel(shard.holds, request_id)
    await harness.redis.zrem(shard.leases, request_id)
    for bucket, text in (await harness.redis.hgetall(shard.buckets(tenant))).items():
        unit, remaining, held, *rest = text.split("|")
        back = "|".join([unit, str(int(remaining) + int(held)), "0", *rest])
        await harness.redis.hset(shard.buckets(tenant), bucket, back)
    await harness.redis.hset(shard.account(tenant), "open", "0")


@pytest.mark.parametrize("stream", [True, False])
async def test_hold_lost_before_checkpoint_charges_delivered_once(
    harness: Harness, link: ScriptedLink, stream: bool
) -> None:
    link.length, link.pause_s = 60, 0.02
    key = await harness.tenant(usd="1.00")
    task = asyncio.create_task(harness.chat(key, stream=stream, max_tokens=50))
    await until(lambda: max(link.steps.values(), default=0) >= 5)
    [request_id] = link.steps
    await lose_hold(harness, request_id)
    await harness.gateway.leases.renew_once()
    reply = await task
    assert link.steps[request_id] < 50
    [record] = await harness.records()
    assert record.status is Status.FAILED
    if stream:
        assert events(reply)[-1]["error"]["code"] == "metering_unavailable"
        delivered = sum("tok" in str(chunk) for chunk in events(reply))
        assert record.charged_nanos == PROMPT_NANOS + delivered * TOKEN_NANOS
    else:
        assert (reply.status_code, record.charged_nanos) == (503, 0)
    account = await harness.gateway.parts.ledger.account(TenantId("acme"))
    assert (account.balance_nanos, account.held_nanos) == (parse_usd("1.00") - record.charged_nanos, 0)


async def test_hold_lost_after_checkpoint_is_charged(harness: Harness, link: ScriptedLink) -> None:
    link.length, link.pause_s = 20, 0.02
    key = await harness.tenant(usd="1.00")
    task = asyncio.create_task(harness.chat(key, max_tokens=20))
    await until(lambda: max(link.steps.values(), default=0) >= 10)
    [request_id] = link.steps
    await harness.checkpoint_and_die()
    await lose_hold(harness, request_id)
    reply = await task
    assert reply.status_code == 200
    [record] = await harness.records()
    assert (record.charged_nanos, record.status) == (PROMPT_NANOS + 20 * TOKEN_NANOS, Status.COMPLETE)
    assert reply.json()["receipt"]["record_id"] == record.record_id


@pytest.mark.parametrize("stream", [True, False])
async def test_undelivered_answer_leaves_no_unresolved_settlement(
    harness: Harness, link: ScriptedLink, stream: bool
) -> None:
    """The store lost the credit too: whether the settlement may be charged is unresolved."""
    link.length, link.pause_s = 20, 0.02
    task = asyncio.create_task(harness.chat(await harness.tenant(usd="1.00"), stream=stream, max_tokens=20))
    await until(lambda: max(link.steps.values(), default=0) >= 10)
    [request_id] = link.steps
    await harness.checkpoint_and_die()
    await lose_hold(harness, request_id)
    await harness.redis.delete(shard_for(TenantId("acme")).buckets(TenantId("acme")))
    reply = await task
    kept = [one.settlement.request_id for one in await harness.gateway.parts.ledger.recovery.kept()]
    assert "metering_unavailable" in reply.text
    assert kept == ([request_id] if stream else [])
