"""A hold that the store has lost: its stream ends with a word of why, and what was delivered is charged once."""

import asyncio

import pytest

from billing.money import parse_usd
from billing.store.keys import shard_for
from billing.usage import Status, TenantId
from tests.deployments.gateway.api.test_completions import records
from tests.deployments.gateway.test_endings import tell_and_fall_silent
from tests.support.gateway import House, events, until
from tests.support.scripted import ScriptedLink

ONE = parse_usd("0.002")
PROMPT = parse_usd("0.005")


async def lose_hold(house: House, request_id: str) -> None:
    """As a failover does: the hold never reached the replica, and neither did what it drew."""
    shard, tenant = shard_for(TenantId("acme")), TenantId("acme")
    await house.redis.hdel(shard.holds, request_id)
    await house.redis.zrem(shard.leases, request_id)
    for bucket, text in (await house.redis.hgetall(shard.buckets(tenant))).items():
        unit, remaining, held, *rest = text.split("|")
        back = "|".join([unit, str(int(remaining) + int(held)), "0", *rest])
        await house.redis.hset(shard.buckets(tenant), bucket, back)
    await house.redis.hset(shard.account(tenant), "open", "0")


@pytest.mark.parametrize("stream", [True, False])
async def test_the_next_checkpoint_notices_and_what_was_delivered_is_charged_once(
    house: House, link: ScriptedLink, stream: bool
) -> None:
    link.length, link.pause_s = 60, 0.02
    key = await house.tenant(usd="1.00")
    task = asyncio.create_task(house.chat(key, stream=stream, max_tokens=50))
    await until(lambda: max(link.steps.values(), default=0) >= 5)
    [request_id] = link.steps
    await lose_hold(house, request_id)
    await house.services.gateway.leases.renew_once()
    reply = await task
    assert link.steps[request_id] < 50
    [record] = await records(house)
    assert record.status is Status.FAILED
    if stream:
        assert events(reply)[-1]["error"]["code"] == "metering_unavailable"
        delivered = sum("tok" in str(chunk) for chunk in events(reply))
        assert record.charged_nanos == PROMPT + delivered * ONE
    else:
        assert (reply.status_code, record.charged_nanos) == (503, 0)
    account = await house.services.ledger.account(TenantId("acme"))
    assert (account.balance_nanos, account.held_nanos) == (parse_usd("1.00") - record.charged_nanos, 0)


async def test_one_that_is_lost_after_the_last_checkpoint_is_charged_and_receipted(
    house: House, link: ScriptedLink
) -> None:
    link.length, link.pause_s = 20, 0.02
    key = await house.tenant(usd="1.00")
    task = asyncio.create_task(house.chat(key, max_tokens=20))
    await until(lambda: max(link.steps.values(), default=0) >= 10)
    [request_id] = link.steps
    await tell_and_fall_silent(house)
    await lose_hold(house, request_id)
    reply = await task
    assert reply.status_code == 200
    [record] = await records(house)
    assert (record.charged_nanos, record.status) == (PROMPT + 20 * ONE, Status.COMPLETE)
    assert reply.json()["receipt"]["record_id"] == record.record_id


@pytest.mark.parametrize("stream", [True, False])
async def test_what_was_not_delivered_waits_for_no_person_to_charge_it(
    house: House, link: ScriptedLink, stream: bool
) -> None:
    """The credit is lost as well, so that nobody can be sure of what was delivered."""
    link.length, link.pause_s = 20, 0.02
    task = asyncio.create_task(house.chat(await house.tenant(usd="1.00"), stream=stream, max_tokens=20))
    await until(lambda: max(link.steps.values(), default=0) >= 10)
    [request_id] = link.steps
    await tell_and_fall_silent(house)
    await lose_hold(house, request_id)
    await house.redis.delete(shard_for(TenantId("acme")).buckets(TenantId("acme")))
    reply = await task
    kept = [one.settlement.request_id for one in await house.services.ledger.recovery.kept()]
    assert "metering_unavailable" in reply.text
    assert kept == ([request_id] if stream else [])
