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

from billing.dodo.client import DodoSettings
from billing.export.outbox import Outbox
from billing.periodic import LATE_S, LIMIT_S, Intervals, Parts, PeriodicTaskLate, PeriodicTasks, assemble
from billing.store.connection import connect
from billing.tenants.tenant import Tenant
from billing.usage import TenantId
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
async def pump(store_url: str, sandbox: SandboxServer) -> AsyncIterator[PeriodicTasks]:
    async def open_parts() -> Parts:
        return assemble(await connect(store_url), DodoSettings(API_KEY, SECRET, base_url=sandbox.url), 60_000)

    made = PeriodicTasks(open_parts, FAST)
    made.start()
    yield made
    await made.stop()


async def test_a_new_tenant_gets_a_customer_and_its_usage_reaches_dodo(world: World, pump: PeriodicTasks) -> None:
    await world.tenant("acme", has_customer=False)
    await world.use("acme", overage=40)

    async def is_told() -> bool:
        return (await world.told()) == world.sums

    await until(is_told)
    parts = await pump.parts()
    await until(lambda: parts.counters.by_tenant[TenantId("acme")].overage_nanos == 40)
    pump.check()


async def test_a_tenant_that_dodo_refuses_keeps_nobody_waiting(world: World, pump: PeriodicTasks) -> None:
    await world.tenants.create(Tenant(id=TenantId("bad"), email="no address", plan="prepaid"))
    await world.tenant("good", has_customer=False)

    async def is_done() -> bool:
        return bool((await world.tenants.get(TenantId("good"))).dodo_customer_id)

    await until(is_done)
    assert (await world.tenants.get(TenantId("bad"))).dodo_customer_id == ""
    assert await world.tenants.customers_wanted() == ["bad"]


async def test_parked_webhooks_are_applied_when_they_can_be(world: World, pump: PeriodicTasks) -> None:
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


async def test_the_last_flush_happens_at_the_end(world: World, store_url: str, sandbox: SandboxServer) -> None:
    async def open_parts() -> Parts:
        return assemble(await connect(store_url), DodoSettings(API_KEY, SECRET, base_url=sandbox.url), 60_000)

    slow = PeriodicTasks(open_parts, Intervals(flush_s=3600))
    slow.start()
    await until(lambda: all(task.runs for task in slow.tasks))
    await world.tenant("acme")
    await world.use("acme")
    await slow.stop()
    assert_same(await world.told(), world.sums)


async def test_a_manual_flush_and_the_timer_do_no_harm_to_each_other(world: World, pump: PeriodicTasks) -> None:
    await world.tenant("acme")
    for _ in range(10):
        await world.use("acme", overage=1)
        await pump.flush()
    assert_same(await world.told(), world.sums)


async def test_a_store_that_is_away_is_waited_for_and_the_status_says_so(
    tmp_path_factory: pytest.TempPathFactory, sandbox: SandboxServer
) -> None:
    folder = tmp_path_factory.mktemp("p")
    url = f"unix://{folder / 's.sock'}"

    async def open_parts() -> Parts:
        return assemble(await connect(url), DodoSettings(API_KEY, SECRET, base_url=sandbox.url), 60_000)

    pump = PeriodicTasks(open_parts, FAST)
    pump.start()
    await until(lambda: all(status.failures for status in pump.statuses()))
    assert all("StoreUnavailable" in status.last_error for status in pump.statuses())
    pump.check()
    for _ in range(2):
        server = valkey.start(folder)
        await until(lambda: not any(status.failures for status in pump.statuses()))
        server.kill()
        await until(lambda: all(status.failures for status in pump.statuses()))
        pump.check()
    await pump.stop()


async def test_a_timer_that_stands_still_is_unhealthy(pump: PeriodicTasks) -> None:
    pump.check()
    pump.tasks[0].beat_s -= pump.tasks[0].interval_s + LIMIT_S + LATE_S + 1
    with pytest.raises(PeriodicTaskLate, match="flush"):
        pump.check()


async def test_an_ended_timer_is_unhealthy(pump: PeriodicTasks) -> None:
    pump._tasks[1].cancel()
    await asyncio.sleep(0.01)
    with pytest.raises(PeriodicTaskLate, match="expire"):
        pump.check()


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
async def test_the_actor_survives_a_kill_and_tells_everything_once(
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
        assert_same(await world.told(), world.sums)
        assert before not in _actor_pids()
    finally:
        await asyncio.to_thread(serve.shutdown)
        ray.shutdown()


def _actor_pids() -> list[int]:
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if "ServeReplica:billing:BillingActor" in " ".join(child.cmdline())]


async def _is_clear(outbox: Outbox) -> bool:
    return is_clear(await outbox.backlog())


async def test_the_actor_is_an_ordinary_class_that_needs_its_environment(
    world: World, environ: dict[str, str], redis: Redis
) -> None:
    actor = BillingActor(BillingArgs(flush_interval_s=0.2))
    await world.tenant("acme")
    await world.use("acme", overage=5)
    await actor.check_health()
    await until(lambda: _is_clear(Outbox(redis)))
    assert_same(await world.told(), world.sums)
    await actor.close()
    assert actor.__del__() is None, "nothing is left to close"
