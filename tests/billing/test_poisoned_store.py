"""One record of each kind that cannot be read: every periodic task does its work for everything else, and names it."""

from collections.abc import AsyncIterator

import pytest

from billing.commerce.auto_refill.refill import Refill
from billing.commerce.auto_refill.store import Refills
from billing.dodo.settings import DodoSettings
from billing.export.outbox import Outbox
from billing.ledger.account import Grant
from billing.notices.log import Notices
from billing.periodic import Intervals, Parts, PeriodicTask, PeriodicTasks, assemble
from billing.reports.unsettled import unsettled
from billing.store.connection import connect
from billing.store.keys import REFILLS, TENANTS, shard_for
from billing.usage import TenantId, Unit
from cluster.dodo_sandbox.server import SandboxServer
from tests.support.samples import request
from tests.support.world import API_KEY, SECRET, World

ACME, BAD = TenantId("acme"), TenantId("aaa")
USD = 1_000_000_000
NAMES = [task.name for task in PeriodicTasks(lambda: None, Intervals()).tasks]  # type: ignore[arg-type, return-value]


@pytest.fixture
async def parts(world: World, store_url: str, sandbox: SandboxServer) -> AsyncIterator[Parts]:
    settings = DodoSettings(API_KEY, SECRET, base_url=sandbox.url)
    opened = assemble(await connect(store_url), settings, 100_000)
    yield opened
    await opened.close()


@pytest.fixture
async def poisoned(world: World) -> World:
    """A tenant that works, and beside it, in the same shard where that is possible, what cannot be read."""
    await world.tenant("acme")
    await world.tenant("aaa")
    redis, ours, theirs = world.redis, shard_for(ACME), shard_for(BAD)
    await world.ledger.grant(Grant("payment:1", ACME, Unit.NANOS, 5 * USD))
    await world.use("acme", overage=50)
    await redis.xadd(ours.stream, {"nothing": "of ours"})
    await redis.xadd(ours.stream, {"k": "usage", "t": "zeta", "p": "no JSON", "c": "none"})
    await redis.hset(ours.outbox, "unreadable", "no JSON")
    await redis.hset(ours.withheld, "1-1", "no JSON")
    await redis.hset(ours.dead, "unreadable", "{}")
    await redis.hset(ours.unresolved, "unreadable", "{}")
    await redis.hset(ours.holds, "unreadable", "no JSON")
    await redis.zadd(ours.leases, {"unreadable": 1})
    await redis.set(theirs.account(BAD), "no hash")
    await redis.sadd(TENANTS, "ghost")
    await redis.sadd(REFILLS, "aaa")
    await redis.set(theirs.refill(BAD), "{}")
    await world.spoil("aaa")
    return world


def task_named(name: str) -> PeriodicTask:
    (found,) = [task for task in PeriodicTasks(None, Intervals()).tasks if task.name == name]  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("name", NAMES)
async def test_every_task_goes_on_past_what_cannot_be_read(poisoned: World, parts: Parts, name: str) -> None:
    task = task_named(name)
    for _ in range(2):
        await task.run(parts, task.sweep)


async def test_flush_exports_everything_else_and_names_what_it_cannot_read(poisoned: World, parts: Parts) -> None:
    task = task_named("flush")
    await task.run(parts, task.sweep)
    exported = await poisoned.exported()
    assert exported == {key: value for key, value in poisoned.sums.items() if key[0] == "acme"}
    assert {one.id for one in task.sweep.failing} == {"event unreadable"}
    state = await parts.exporter.outbox.shown()
    assert "event unreadable is not exported" in state.error
    assert state.last_success_ms == 0, "something was left behind"
    withheld = {notice.facts["record"] for notice in await Notices(poisoned.redis).newest()}
    assert len(withheld) == 2, "the entry without a payload, and the one with another's"


async def test_tenant_that_cannot_be_read_is_named_and_the_others_are_listed(poisoned: World, parts: Parts) -> None:
    task = task_named("tenants")
    await task.run(parts, task.sweep)
    assert [one.id for one in task.sweep.failing] == ["aaa"]
    assert [tenant.id for tenant in await poisoned.tenants.list()] == ["acme"]


async def test_refill_and_hold_that_cannot_be_read_keep_no_other_waiting(poisoned: World, parts: Parts) -> None:
    await Refills(poisoned.redis).put(ACME, Refill(pack="small", threshold_nanos=USD, monthly_cap_cents=1_500))
    await poisoned.ledger.hold(request("req_1"))
    await poisoned.redis.zadd(shard_for(ACME).leases, {"req_1": 2})
    expire, refills = task_named("expire"), task_named("refills")
    await expire.run(parts, expire.sweep)
    await refills.run(parts, refills.sweep)
    assert await poisoned.redis.hkeys(shard_for(ACME).holds) == ["unreadable"]
    assert [one.id for one in refills.sweep.failing] == ["aaa"]
    open_ = await unsettled(poisoned.redis)
    assert (open_.open_holds, open_.held_nanos, open_.unresolved) == (1, 0, 1)


async def test_lists_for_people_leave_out_what_cannot_be_read(poisoned: World) -> None:
    outbox = Outbox(poisoned.redis)
    assert (await outbox.dead(), await outbox.withheld(), await poisoned.ledger.recovery.kept()) == ([], [], [])
    assert [event.id for event in await outbox.events()] == []
