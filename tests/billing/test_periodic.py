"""The billing process goes on whatever fails, says truthfully how it is, and ends with a last flush."""

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import fields
from pathlib import Path

import psutil
import pytest
from redis.asyncio import Redis

from billing import sweep as sweeps
from billing.dodo.settings import DodoSettings
from billing.export.outbox import Outbox
from billing.ledger.account import Grant
from billing.notices.log import Notices
from billing.notices.notice import NoticeKind
from billing.periodic import LATE_S, LIMIT_S, Intervals, Parts, PeriodicTaskLate, PeriodicTasks, assemble
from billing.store.connection import connect
from billing.tenants.tenant import Tenant
from billing.usage import TenantId, Unit
from cluster import valkey
from cluster.dodo_sandbox.server import SandboxServer
from deployments.billing_actor import BillingActor
from deployments.config import BillingArgs
from tests.support.world import API_KEY, SECRET, World, assert_same, delivery, is_clear

FAST = Intervals(*[0.1] * len(fields(Intervals)))
WAIT_S = 20.0


async def until(is_so: Callable[[], object], wait_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        found = is_so()
        if await found if asyncio.iscoroutine(found) else found:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not come about in time")


@pytest.fixture
async def tasks(store_url: str, sandbox: SandboxServer) -> AsyncIterator[PeriodicTasks]:
    async def open_parts() -> Parts:
        return assemble(await connect(store_url), DodoSettings(API_KEY, SECRET, base_url=sandbox.url), 60_000)

    made = PeriodicTasks(open_parts, FAST)
    made.start()
    yield made
    await made.stop()


async def test_new_tenant_gets_a_customer_and_its_usage_is_exported(world: World, tasks: PeriodicTasks) -> None:
    await world.tenant("acme", has_customer=False)
    await world.use("acme", overage=40)

    async def is_told() -> bool:
        return (await world.exported()) == world.sums

    await until(is_told)
    parts = await tasks.parts()
    await until(lambda: parts.counters.by_tenant[TenantId("acme")].overage_nanos == 40)
    tasks.check()


async def test_refused_customer_keeps_no_other_waiting(world: World, tasks: PeriodicTasks) -> None:
    await world.tenants.create(Tenant(id=TenantId("bad"), email="no address", plan="prepaid"))
    await world.tenant("good", has_customer=False)

    async def is_done() -> bool:
        return bool((await world.tenants.get(TenantId("good"))).dodo_customer_id)

    await until(is_done)
    assert (await world.tenants.get(TenantId("bad"))).dodo_customer_id == ""
    assert await world.tenants.customers_wanted() == ["bad"]


async def test_parked_webhook_is_applied_when_it_can_be(world: World, tasks: PeriodicTasks) -> None:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    await world.fault("status:500", path="/payments")
    webhooks = world.webhooks()
    await webhooks.receive(*delivery("payment.succeeded", payment | {"product_cart": None}))
    await world.heal()
    (parked,) = await webhooks.inbox.parked()
    await webhooks.inbox.park(parked, 0)

    async def is_paid() -> bool:
        return (await world.ledger.account(TenantId("acme"))).balance_nanos > 0

    await until(is_paid)


async def test_stop_flushes_once_more(world: World, store_url: str, sandbox: SandboxServer) -> None:
    async def open_parts() -> Parts:
        return assemble(await connect(store_url), DodoSettings(API_KEY, SECRET, base_url=sandbox.url), 60_000)

    slow = PeriodicTasks(open_parts, Intervals(flush_s=3600))
    slow.start()
    await until(lambda: all(task.runs for task in slow.tasks))
    await world.tenant("acme")
    await world.use("acme")
    await slow.stop()
    assert_same(await world.exported(), world.sums)


async def test_unavailable_store_is_waited_for_and_shown_in_status(
    tmp_path_factory: pytest.TempPathFactory, sandbox: SandboxServer
) -> None:
    folder = tmp_path_factory.mktemp("p")
    url = f"unix://{folder / 's.sock'}"

    async def open_parts() -> Parts:
        return assemble(await connect(url), DodoSettings(API_KEY, SECRET, base_url=sandbox.url), 60_000)

    tasks = PeriodicTasks(open_parts, FAST)
    tasks.start()
    await until(lambda: all(status.failures for status in tasks.statuses()))
    assert all("StoreUnavailable" in status.last_error for status in tasks.statuses())
    tasks.check()
    for _ in range(2):
        server = valkey.start(folder)
        await until(lambda: not any(status.failures for status in tasks.statuses()))
        server.kill()
        await until(lambda: all(status.failures for status in tasks.statuses()))
        tasks.check()
    await tasks.stop()


async def test_notices_are_recorded_past_a_tenant_that_cannot_be_read(world: World, tasks: PeriodicTasks) -> None:
    for name in ("aaa", "acme"):
        await world.tenant(name)
        await world.ledger.grant(Grant("payment:pay_1:prd_1", TenantId(name), Unit.NANOS, 5))
    await world.spoil("aaa")
    for name in ("aaa", "acme"):
        await world.use(name)

    async def is_recorded() -> bool:
        return [one.tenant for one in await Notices(world.redis).newest()] == ["acme"]

    await until(is_recorded)
    status = next(one for one in tasks.statuses() if one.name == "notices")
    assert (status.failures, status.last_error, status.failing_items) == (0, "", 1)
    assert status.first_failing.startswith("aaa: ValidationError")


async def test_item_that_stays_stuck_is_named_by_one_notice_of_each_task(
    world: World, tasks: PeriodicTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "FIRST_RETRY_MS", 1)
    await world.tenant("aaa", has_customer=False)
    await world.spoil("aaa")

    async def is_named() -> bool:
        return len(await Notices(world.redis).newest()) >= 2

    await until(is_named)
    runs = tasks.statuses()[2].runs
    await until(lambda: tasks.statuses()[2].runs > runs + 3)
    notices = await Notices(world.redis).newest()
    assert sorted(notice.facts["task"] for notice in notices) == ["customers", "tenants"]
    for notice in notices:
        assert (notice.kind, notice.facts["item"]) == (NoticeKind.ITEM_STUCK, "aaa")
        assert "ValidationError" in notice.facts["error"]


async def test_late_timer_is_unhealthy(tasks: PeriodicTasks) -> None:
    tasks.check()
    tasks.tasks[0].started_s -= tasks.tasks[0].interval_s + LIMIT_S + LATE_S + 1
    with pytest.raises(PeriodicTaskLate, match="flush"):
        tasks.check()


async def test_ended_timer_is_unhealthy(tasks: PeriodicTasks) -> None:
    tasks._timers[1].cancel()
    await asyncio.sleep(0.01)
    with pytest.raises(PeriodicTaskLate, match="expire"):
        tasks.check()


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch, store_url: str, sandbox: SandboxServer) -> dict[str, str]:
    values = {
        "REDIS_URL": store_url,
        "DODO_PAYMENTS_API_KEY": API_KEY,
        "DODO_PAYMENTS_WEBHOOK_KEY": SECRET,
        "DODO_PAYMENTS_BASE_URL": sandbox.url,
        "FAREBOX_DODO_ENVIRONMENT": "sandbox",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return values


@pytest.fixture
def short_dir() -> Iterator[str]:
    """A folder for Ray's sockets, whose paths must stay short."""
    with tempfile.TemporaryDirectory(prefix="fb", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")
async def test_killed_actor_is_replaced_and_exports_everything_once(
    world: World, environ: dict[str, str], short_dir: str, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # a local start would else write a token to the home folder
    import ray
    from ray import serve

    ray.init(
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=80 * 1024 * 1024,
        _temp_dir=short_dir,
        runtime_env={"env_vars": environ | {"PYTHONPATH": str(repo)}},
        log_to_driver=False,
    )
    try:
        options = {"ray_actor_options": {"num_cpus": 0.1}, "health_check_period_s": 1}
        actor = serve.deployment(name="BillingActor", **options)(BillingActor)  # type: ignore[arg-type]
        app = actor.bind(BillingArgs(flush_interval_s=0.2))
        await asyncio.to_thread(serve.run, app, name="billing", route_prefix=None)
        await world.tenant("acme", has_customer=False)
        await world.use("acme", overage=40)
        outbox = Outbox(world.redis)
        await until(lambda: _is_clear(outbox))
        assert (await outbox.sums()).dead_events == 0
        [before] = _actor_pids()
        os.kill(before, signal.SIGKILL)
        await world.use("acme", overage=2)
        await until(lambda: _is_clear(outbox), 90)
        assert_same(await world.exported(), world.sums)
        assert before not in _actor_pids()
    finally:
        await asyncio.to_thread(serve.shutdown)
        ray.shutdown()


def _actor_pids() -> list[int]:
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if "ServeReplica:billing:BillingActor" in " ".join(child.cmdline())]


async def _is_clear(outbox: Outbox) -> bool:
    return is_clear(await outbox.backlog())


async def test_actor_runs_without_ray(world: World, environ: dict[str, str], redis: Redis) -> None:
    actor = BillingActor(BillingArgs(flush_interval_s=0.2))
    await world.tenant("acme")
    await world.use("acme", overage=5)
    await actor.check_health()
    await until(lambda: _is_clear(Outbox(redis)))
    assert_same(await world.exported(), world.sums)
    await actor.close()
    assert actor.__del__() is None, "nothing is left to close"
