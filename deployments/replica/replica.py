"""One engine behind Serve: jobs in, streams of token pieces out.

Knows Serve and the engine, and of what is for sale only which adapters are pinned.
"""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Coroutine, Mapping
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
    OutputDelta,
    SamplingParams,
)
from deployments.replica import artifacts
from deployments.replica.metrics import EngineMetrics
from deployments.token_stream.frames import Address
from deployments.token_stream.link import Refused
from deployments.token_stream.pieces import Outbox
from deployments.token_stream.replica_end import Lines

STATS_INTERVAL_S = 2.0
PIN_INTERVAL_S = 5.0
ADVERTISED_PER_SLOT = 2
"""Adapters that the router takes to be at home here, those used last; beyond the slots they lie in host memory."""
WARM_UP_S = 60.0
"""A replica takes traffic after this, whatever its pinned adapters do."""

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
            _itself, max_num_models_per_replica=ADVERTISED_PER_SLOT * args.engine.adapter_slots
        )
        self._fetching: dict[str, asyncio.Lock] = {}
        self._lines = Lines(self._engine.extend)
        self._metrics = EngineMetrics()
        self._store_url = os.environ.get("REDIS_URL", "")
        self._store: Redis | None = None
        self._pinned: tuple[Model, ...] = ()
        await self._warm_up()
        self._tasks = [asyncio.create_task(self._publish_for_ever()), asyncio.create_task(self._pin_for_ever())]
        self._is_open = True

    async def run(self, job: GenerateRequest, gateway: Address) -> Refused | None:
        """Run a job and send its pieces to the gateway's listener; returns when the last one is on its way."""
        try:
            job = await self._at_home(job)
            await (await self._lines.to(gateway)).carry(job, self._engine)
        except EngineError as error:
            return Refused.of(error)
        return None

    async def generate(self, job: GenerateRequest) -> AsyncGenerator[OutputDelta | Refused, None]:
        """The same over Serve's own stream: the first piece at once, then whatever has queued."""
        outbox = Outbox(asyncio.get_running_loop())
        try:
            job = await self._at_home(job)
            self._engine.submit(job, outbox.put)
        except EngineError as error:
            yield Refused.of(error)
            return
        is_over = False
        try:
            async for piece in outbox.pieces():
                is_over = piece.finish_reason is not None
                yield piece
        finally:
            if not is_over:
                self._engine.abort(job.request_id)

    async def extend(self, deadlines: Mapping[str, float]) -> None:
        self._engine.extend(deadlines)

    async def ping(self) -> bool:
        self._engine.check()
        return True

    async def check_health(self) -> None:
        """Serve replaces a replica whose engine died, as it does when its GPU is lost."""
        assert not any(task.done() for task in self._tasks), "a replica's loop never ends on its own"
        self._engine.check()

    async def record_autoscaling_stats(self) -> dict[str, int]:
        """What ``deployments.autoscaling`` decides on: the most tokens that unanswered requests may still need."""
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
        await self._lines.close()
        if self._store is not None:
            await self._store.aclose()

    def __del__(self) -> Coroutine[None, None, None] | None:
        """Serve calls this, and awaits what it returns, after it drained the replica."""
        return self.close() if self._is_open else None

    async def _at_home(self, job: GenerateRequest) -> GenerateRequest:
        """The job with its adapter on this machine, and Serve's router told so. Raises AdapterRejected."""
        if job.adapter is None:
            return job
        await self._advertise(f"{job.adapter.name}@{job.adapter.digest[:12]}")
        return await self._with_local_adapter(job)

    async def _with_local_adapter(self, job: GenerateRequest) -> GenerateRequest:
        """The same job with the adapter's files on this machine. One fetch at a time for each digest."""
        adapter = job.adapter
        assert adapter is not None, "asked for an adapter's files without an adapter"
        if not artifacts.is_url(adapter.path):
            return replace(job, adapter=replace(adapter, path=str(artifacts.local_path(adapter.path))))
        lock = self._fetching.setdefault(adapter.digest, asyncio.Lock())
        async with lock:
            try:
                local = await asyncio.to_thread(artifacts.fetch, adapter.path, self._cache_dir, adapter.digest)
            except artifacts.ArtifactUnavailable as error:
                raise AdapterRejected(f"adapter {adapter.name!r}: {error}") from error
        return replace(job, adapter=replace(adapter, path=str(local)))

    async def _warm_up(self) -> None:
        """One token of the base model and of every pinned adapter, before Serve sends traffic here."""
        try:
            async with asyncio.timeout(WARM_UP_S):
                await self._follow_pins()
                refs = [ref for model in self._pinned if (ref := await self._local(_ref_of(model)))]
                await asyncio.gather(*(self._try(ref) for ref in (None, *refs)))
        except TimeoutError:
            logger.warning("the pinned adapters were not all loaded within %g s", WARM_UP_S)

    async def _try(self, adapter: AdapterRef | None) -> None:
        name = adapter.name if adapter else "the base model"
        job = GenerateRequest(f"warm-up:{name}", (0,), SamplingParams(max_tokens=1), adapter)
        try:
            async for piece in self._engine.generate(job):
                if piece.finish_reason is FinishReason.ERROR:
                    logger.warning("%s did not warm up: %s", name, piece.error)
        except EngineError as error:
            logger.warning("%s did not warm up: %s", name, error)

    async def _pin_for_ever(self) -> None:
        while True:
            await asyncio.sleep(PIN_INTERVAL_S)
            await self._follow_pins()

    async def _follow_pins(self) -> None:
        """Keep in their slots the adapters that the catalog in force pins."""
        try:
            if self._store is None and self._store_url:
                self._store = await reach(self._store_url)
            catalog = await publication.current(self._store) if self._store is not None else None
            wanted = tuple(model for model in catalog.models if model.pinned) if catalog else ()
            if wanted != self._pinned:
                self._engine.pin([ref for model in wanted if (ref := await self._local(_ref_of(model)))])
                self._pinned = wanted
        except StoreUnavailable as error:
            logger.debug("the pins stay as they are: %s", error)
        except Exception:
            logger.exception("the pins stay as they are")

    async def _local(self, ref: AdapterRef) -> AdapterRef | None:
        try:
            local = await asyncio.to_thread(artifacts.fetch, ref.path, self._cache_dir, ref.digest)
        except artifacts.ArtifactUnavailable as error:
            logger.warning("adapter %s cannot be pinned: %s", ref.name, error)
            return None
        return replace(ref, path=str(local))

    async def _publish_for_ever(self) -> None:
        while True:
            try:
                self._metrics.publish(self._engine.stats())
            except Exception:
                logger.exception("the engine's figures were not published")
            await asyncio.sleep(STATS_INTERVAL_S)


async def _itself(identity: str) -> str:
    """What Serve's multiplexing keeps for an adapter: nothing, so that evicting it unloads nothing."""
    return identity


def _ref_of(model: Model) -> AdapterRef:
    return AdapterRef(model.id, model.digest, model.path)


def engine_settings(config: EngineConfig, model_path: Path) -> EngineSettings:
    return EngineSettings(model_path=str(model_path), **config.model_dump())
