"""One engine as a Serve deployment: runs requests and sends their tokens to the gateway that asked."""

import asyncio
import logging
import os
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path

from ray import serve
from redis.asyncio import Redis

from billing.catalog import publication
from billing.catalog.catalog import Model
from billing.store.connection import reach
from billing.store.errors import StoreUnavailable
from deployments.config import EngineConfig, FareboxArgs
from deployments.inference.native.engine import Engine
from deployments.inference.native.settings import EngineSettings
from deployments.inference.request import (
    AdapterRef,
    AdapterRejected,
    EngineError,
    EngineStats,
    FinishReason,
    GenerateRequest,
    SamplingParams,
)
from deployments.replica import artifacts
from deployments.replica.metrics import EngineMetrics
from deployments.token_stream.errors import Refused
from deployments.token_stream.frames import Address
from deployments.token_stream.replica_end import GatewayConnections

STATS_INTERVAL_S = 2.0
PIN_INTERVAL_S = 5.0
ADVERTISED_PER_SLOT = 2
"""Adapters advertised to the router, those used last: more than the slots, since host memory has others."""
WARM_UP_S = 60.0
"""A replica takes traffic after this time, even if a pinned adapter has not loaded."""

logger = logging.getLogger(__name__)


class LoraReplica:
    """A Serve deployment's class: one GPU, one ``Engine``."""

    _is_open = False

    async def __init__(self, args: FareboxArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        self._cache_dir = Path(args.adapter_cache_dir)
        base = await asyncio.to_thread(artifacts.fetch, args.model.path, self._cache_dir)
        self._engine = await asyncio.to_thread(Engine, engine_settings(args.engine, base))
        self._engine.start()
        self._advertise = serve.multiplexed(
            _identity, max_num_models_per_replica=ADVERTISED_PER_SLOT * args.engine.adapter_slots
        )
        self._fetching: dict[str, asyncio.Lock] = {}
        self._gateways = GatewayConnections(self._engine.extend)
        self._metrics = EngineMetrics()
        self._store_url = os.environ.get("REDIS_URL", "")
        self._store: Redis | None = None
        self._pinned: tuple[Model, ...] = ()
        await self._warm_up()
        self._tasks = [asyncio.create_task(self._publish_forever()), asyncio.create_task(self._pin_forever())]
        self._is_open = True

    async def run(self, request: GenerateRequest, gateway: Address) -> Refused | None:
        """Run a request and send its tokens to the gateway's listener. Returns once the last delta is written."""
        try:
            request = await self._with_resident_adapter(request)
            await (await self._gateways.to(gateway)).run(request, self._engine)
        except EngineError as error:
            return Refused.of(error)
        return None

    async def ping(self) -> bool:
        self._engine.check()
        return True

    async def check_health(self) -> None:
        """Fail when the engine has died, for example with its GPU: Serve then replaces this replica."""
        assert not any(task.done() for task in self._tasks), "a replica's background task has ended"
        self._engine.check()

    async def record_autoscaling_stats(self) -> dict[str, int]:
        """What ``deployments.autoscaling`` reads: the most tokens that running and waiting requests may need."""
        return {"queued_tokens": self._engine.stats().queued_tokens}

    async def stats(self) -> tuple[str, EngineStats]:
        """This replica's id and its engine's counters."""
        return serve.get_replica_context().replica_id.unique_id, self._engine.stats()

    async def close(self) -> None:
        """End the engine and everything around it."""
        self._is_open = False
        for task in self._tasks:
            task.cancel()
        await asyncio.to_thread(self._engine.stop)
        await self._gateways.close()
        if self._store is not None:
            await self._store.aclose()

    def __del__(self) -> Coroutine[None, None, None] | None:
        """Serve calls this, and awaits what it returns, after it drained the replica."""
        return self.close() if self._is_open else None

    async def _with_resident_adapter(self, request: GenerateRequest) -> GenerateRequest:
        """The request with its adapter's files on this machine, and the adapter advertised to Serve's router.

        One fetch at a time for each digest. Raises AdapterRejected.
        """
        adapter = request.adapter
        if adapter is None:
            return request
        await self._advertise(f"{adapter.name}@{adapter.digest[:12]}")
        if not artifacts.is_url(adapter.path):
            return replace(request, adapter=replace(adapter, path=str(artifacts.local_path(adapter.path))))
        async with self._fetching.setdefault(adapter.digest, asyncio.Lock()):
            try:
                local = await asyncio.to_thread(artifacts.fetch, adapter.path, self._cache_dir, adapter.digest)
            except artifacts.ArtifactUnavailable as error:
                raise AdapterRejected(f"adapter {adapter.name!r}: {error}") from error
        return replace(request, adapter=replace(adapter, path=str(local)))

    async def _warm_up(self) -> None:
        """Generate one token with the base model and with every pinned adapter, before Serve sends traffic here."""
        try:
            async with asyncio.timeout(WARM_UP_S):
                await self._update_pins()
                refs = [ref for model in self._pinned if (ref := await self._fetched(model))]
                await asyncio.gather(*(self._warm_up_one(ref) for ref in (None, *refs)))
        except TimeoutError:
            logger.warning("the pinned adapters were not all loaded within %g s", WARM_UP_S)

    async def _warm_up_one(self, adapter: AdapterRef | None) -> None:
        name = adapter.name if adapter else "the base model"
        request = GenerateRequest(f"warm-up:{name}", (0,), SamplingParams(max_tokens=1), adapter)
        try:
            async for delta in self._engine.generate(request):
                if delta.finish_reason is FinishReason.ERROR:
                    logger.warning("%s did not warm up: %s", name, delta.error)
        except EngineError as error:
            logger.warning("%s did not warm up: %s", name, error)

    async def _pin_forever(self) -> None:
        while True:
            await asyncio.sleep(PIN_INTERVAL_S)
            await self._update_pins()

    async def _update_pins(self) -> None:
        """Pin the adapters that the catalog in force says are pinned."""
        try:
            if self._store is None and self._store_url:
                self._store = await reach(self._store_url)
            catalog = await publication.current(self._store) if self._store is not None else None
            wanted = tuple(model for model in catalog.models if model.pinned) if catalog else ()
            if wanted != self._pinned:
                self._engine.pin([ref for model in wanted if (ref := await self._fetched(model))])
                self._pinned = wanted
        except StoreUnavailable as error:
            logger.debug("pinned adapters are not updated: %s", error)
        except Exception:
            logger.exception("pinned adapters are not updated")

    async def _fetched(self, model: Model) -> AdapterRef | None:
        """A pinned adapter with its files on this machine; ``None`` where they cannot be fetched."""
        try:
            local = await asyncio.to_thread(artifacts.fetch, model.path, self._cache_dir, model.digest)
        except artifacts.ArtifactUnavailable as error:
            logger.warning("adapter %s cannot be pinned: %s", model.id, error)
            return None
        return AdapterRef(model.id, model.digest, str(local))

    async def _publish_forever(self) -> None:
        while True:
            try:
                self._metrics.publish(self._engine.stats())
            except Exception:
                logger.exception("the engine's metrics were not published")
            await asyncio.sleep(STATS_INTERVAL_S)


async def _identity(adapter: str) -> str:
    """The model that Serve's multiplexing caches for an adapter: only its name, so that evicting it unloads nothing."""
    return adapter


def engine_settings(config: EngineConfig, model_path: Path) -> EngineSettings:
    return EngineSettings(model_path=str(model_path), **config.model_dump())
