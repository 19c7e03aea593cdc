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

from billing.catalogue import Model
from billing.errors import StoreUnavailable
from billing.store import board
from deployments import artifacts
from deployments.config import EngineConfig, FareboxArgs
from deployments.engine.loop import Engine
from deployments.engine.request import (
    AdapterRef,
    AdapterRejected,
    EngineError,
    EngineStats,
    GenerateRequest,
    Tokens,
)
from deployments.engine.settings import EngineSettings
from deployments.link import Refused
from deployments.metrics import EngineMetrics
from deployments.pieces import Outbox

STATS_INTERVAL_S = 2.0
PIN_INTERVAL_S = 5.0
ADVERTISED = 256
"""Adapters whose requests Serve's router sends here first; the engine keeps its own cache."""

logger = logging.getLogger(__name__)


class LoraReplica:
    """A Serve deployment's class: one GPU, one ``Engine``."""

    _is_open = False

    def __init__(self, args: FareboxArgs) -> None:
        self._cache_dir = Path(args.adapter_cache_dir)
        base = artifacts.fetch(args.model.path, self._cache_dir)
        self._engine = Engine(engine_settings(args.engine, base))
        self._engine.start()
        self._fetching: dict[str, asyncio.Lock] = {}
        self._metrics = EngineMetrics()
        self._tasks: list[asyncio.Task[None]] = []
        self._is_open = True

    async def generate(self, job: GenerateRequest) -> AsyncGenerator[Tokens | Refused, None]:
        """The job's output: the first piece at once, then whatever has queued. Closing it aborts the job."""
        outbox = Outbox(asyncio.get_running_loop())
        try:
            if job.adapter is not None:
                await self._advertise(f"{job.adapter.name}@{job.adapter.digest[:12]}")
                job = await self._with_local_adapter(job)
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
        """Serve replaces a replica whose engine died."""
        self._start_loops()
        assert not any(task.done() for task in self._tasks), "a replica's loop never ends on its own"
        self._engine.check()

    async def stats(self) -> tuple[str, EngineStats]:
        """This replica's id and its engine's counters."""
        return serve.get_replica_context().replica_id.unique_id, self._engine.stats()

    async def close(self) -> None:
        """End the engine and everything around it."""
        self._is_open = False
        for task in self._tasks:
            task.cancel()
        await asyncio.to_thread(self._engine.stop)

    def __del__(self) -> Coroutine[None, None, None] | None:
        """Serve calls this, and awaits what it returns, after it drained the replica."""
        return self.close() if self._is_open else None

    @serve.multiplexed(max_num_models_per_replica=ADVERTISED)  # type: ignore[untyped-decorator]
    async def _advertise(self, identity: str) -> str:
        """Tells Serve's router who is at home here; holds nothing, so that evicting it unloads nothing."""
        return identity

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

    def _start_loops(self) -> None:
        """On the loop that Serve runs us on, which the constructor does not know yet."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._publish_for_ever())]
            if url := os.environ.get("REDIS_URL", ""):
                self._tasks.append(asyncio.create_task(self._pin_for_ever(url)))

    async def _pin_for_ever(self, store_url: str) -> None:
        """Keep in their slots the adapters that the catalogue in force pins."""
        redis = Redis.from_url(store_url, decode_responses=True)
        pinned: tuple[Model, ...] = ()
        while True:
            try:
                catalogue = await board.current(redis)
                wanted = tuple(model for model in catalogue.models if model.pinned) if catalogue else ()
                if wanted != pinned:
                    self._engine.pin([ref for model in wanted if (ref := await self._local(_ref_of(model)))])
                    pinned = wanted
            except StoreUnavailable as error:
                logger.debug("the pins stay as they are: %s", error)
            except Exception:
                logger.exception("the pins stay as they are")
            await asyncio.sleep(PIN_INTERVAL_S)

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


def _ref_of(model: Model) -> AdapterRef:
    return AdapterRef(model.id, model.digest, model.path)


def engine_settings(config: EngineConfig, model_path: Path) -> EngineSettings:
    return EngineSettings(model_path=str(model_path), **config.model_dump())
