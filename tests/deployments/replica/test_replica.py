"""A replica: pinned adapters, health, refusals and background tasks."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from billing.catalog import publication
from billing.clock import now_ms
from billing.store.connection import connect
from deployments.config import FareboxArgs
from deployments.gateway.catalog_holder import CatalogHolder
from deployments.inference.adapters import digest_adapter
from deployments.inference.request import AdapterRef, EngineFailed, EngineStats, GenerateRequest, SamplingParams
from deployments.replica.replica import LoraReplica
from deployments.token_stream.errors import RefusalKind, Refused
from deployments.token_stream.gateway_end import ServeReplicaLink
from tests.support.fleet import Fleet, cluster, watched
from tests.support.gateway import USER_CONFIG
from tests.support.waiting import until


@asynccontextmanager
async def running(args: FareboxArgs) -> AsyncIterator[LoraReplica]:
    """A replica, made as Serve makes one: its constructor is awaited."""
    replica = LoraReplica.__new__(LoraReplica)
    begin: Callable[..., Coroutine[None, None, None]] = replica.__init__  # type: ignore[misc, assignment]
    await begin(args)
    try:
        yield replica
    finally:
        await replica.close()


@pytest.fixture
def small(args: FareboxArgs, base_path: Path, store_url: str, monkeypatch: pytest.MonkeyPatch) -> FareboxArgs:
    monkeypatch.setenv("REDIS_URL", store_url)
    model, engine = args.model.model_copy(update={"path": str(base_path)}), args.engine
    return args.model_copy(update={"model": model, "engine": engine.model_copy(update={"max_running": 4})})


async def publish(redis: Redis, adapters: list[dict[str, object]]) -> None:
    """Publish a catalog, as a gateway does."""
    catalog_holder = CatalogHolder()
    catalog = catalog_holder.put(USER_CONFIG | {"adapters": adapters})
    assert not catalog.rejected
    await publication.publish(redis, catalog, "gw_test", now_ms())


def pinned(name: str, path: Path, digest: str = "") -> dict[str, object]:
    entry = {"id": name, "path": str(path), "digest": digest or digest_adapter(path), "pinned": True}
    return entry | {"price": {"output_per_1m": "1"}}


async def test_pinned_adapters_resident_before_traffic(
    small: FareboxArgs, redis: Redis, adapter_paths: dict[str, Path]
) -> None:
    chosen = {name: adapter_paths[name] for name in ("all8", "attention4")}
    await publish(redis, [pinned(name, path) for name, path in chosen.items()])
    async with running(small) as replica:
        resident = {identity.partition("@")[0] for identity in replica._engine.stats().adapters_resident}
        assert resident == set(chosen)
        assert replica._engine.stats().generation_tokens == 3, "one of the base model and of each adapter"


@pytest.mark.parametrize("shape", [watched, cluster])
async def test_pins_read_from_replicated_and_clustered_store(
    shape: Callable[[Path], AbstractContextManager[Fleet]],
    small: FareboxArgs,
    adapter_paths: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with shape(tmp_path / "f") as fleet:
        redis = await connect(fleet.url)
        await publish(redis, [pinned("all8", adapter_paths["all8"])])
        await redis.aclose()
        monkeypatch.setenv("REDIS_URL", fleet.url)
        async with running(small) as replica:
            assert [i.partition("@")[0] for i in replica._engine.stats().adapters_resident] == ["all8"]


async def test_replica_starts_despite_bad_pinned_adapter(
    small: FareboxArgs, redis: Redis, adapter_paths: dict[str, Path], tmp_path: Path
) -> None:
    bad = pinned("changed", adapter_paths["attention4"], "0" * 64)
    await publish(redis, [pinned("all8", adapter_paths["all8"]), bad, pinned("gone", tmp_path / "gone", "1" * 64)])
    async with running(small) as replica:
        assert [i.partition("@")[0] for i in replica._engine.stats().adapters_resident] == ["all8"]
        await replica.check_health()
        assert await replica.ping()


async def test_replica_unhealthy_when_engine_died(small: FareboxArgs, redis: Redis) -> None:
    link = ServeReplicaLink(None)  # type: ignore[arg-type]
    await link.start("127.0.0.1")
    async with running(small) as replica:
        await replica.check_health()

        def lost(*_: object) -> None:
            raise RuntimeError("CUDA error: device-side assert triggered")

        replica._engine._model.forward = lost  # type: ignore[assignment, method-assign]
        request = GenerateRequest("r", (1, 2, 3), SamplingParams(max_tokens=5))
        assert await replica.run(request, link.listener.address) is None, "its last delta said how it failed"
        with pytest.raises(EngineFailed, match="CUDA"):
            await replica.check_health()
        refused = await replica.run(request, link.listener.address)
        assert isinstance(refused, Refused)
        assert refused.kind is RefusalKind.FAILED
    await link.close()


async def test_bad_adapter_refused(
    small: FareboxArgs, redis: Redis, adapter_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(small) as replica:

        async def no_router(_: str) -> None:
            """Outside of Serve."""

        monkeypatch.setattr(replica, "_advertise", no_router)
        ref = AdapterRef("gone", "2" * 64, "http://127.0.0.1:9/nothing")
        link = ServeReplicaLink(None)  # type: ignore[arg-type]
        await link.start("127.0.0.1")
        params = SamplingParams(max_tokens=5)
        refused = await replica.run(GenerateRequest("r", (1,), params, ref), link.listener.address)
        assert isinstance(refused, Refused)
        assert refused.kind is RefusalKind.ADAPTER
        good = AdapterRef("all8", digest_adapter(adapter_paths["all8"]), str(adapter_paths["all8"]))
        assert await replica.run(GenerateRequest("s", (1,), params, good), link.listener.address) is None
        await replica.check_health()
        await link.close()


async def test_autoscaling_stats_have_queued_tokens(small: FareboxArgs, redis: Redis) -> None:
    link = ServeReplicaLink(None)  # type: ignore[arg-type]
    await link.start("127.0.0.1")
    async with running(small) as replica:
        assert await replica.record_autoscaling_stats() == {"queued_tokens": 0}
        request = GenerateRequest("r", (1, 2, 3), SamplingParams(max_tokens=40, ignore_eos=True))
        running_request = asyncio.create_task(replica.run(request, link.listener.address))
        while await replica.record_autoscaling_stats() == {"queued_tokens": 0}:  # noqa: ASYNC110, the engine's thread
            await asyncio.sleep(0)
        assert await replica.record_autoscaling_stats() == {"queued_tokens": 43}
        running_request.cancel()
        await asyncio.gather(running_request, return_exceptions=True)
    await link.close()


async def test_replica_tasks_outlive_bug(small: FareboxArgs, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"pins": 0, "metrics": 0}

    async def buggy_publication(_: object) -> None:
        calls["pins"] += 1
        raise RuntimeError("a bug")

    def buggy_metrics(_: EngineStats) -> None:
        calls["metrics"] += 1
        raise RuntimeError("a bug")

    monkeypatch.setattr("deployments.replica.replica.PIN_INTERVAL_S", 0.01)
    monkeypatch.setattr("deployments.replica.replica.STATS_INTERVAL_S", 0.01)
    async with running(small) as replica:
        monkeypatch.setattr("deployments.replica.replica.publication.current", buggy_publication)
        monkeypatch.setattr(replica._metrics, "publish", buggy_metrics)
        await until(lambda: min(calls.values()) >= 3)
        await replica.check_health()
        replica._tasks[0].cancel()
        await asyncio.gather(replica._tasks[0], return_exceptions=True)
        with pytest.raises(AssertionError, match="task"):
            await replica.check_health()
