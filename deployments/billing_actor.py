"""The billing actor: the periodic tasks as a Serve deployment of its own, one replica, without a route.

All its state is in the store: it may be killed at any time. No request waits for it.
"""

import asyncio
import os
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from functools import partial

from billing.archive.archiver import Archiver, ArchiveReport
from billing.archive.files import Archive
from billing.clock import now_ms
from billing.dodo.settings import DodoSettings
from billing.export.exporter import FlushReport
from billing.export.outbox import Backlog, ExporterState, Sums
from billing.notices.dispatcher import NoticeDispatcher
from billing.notices.receiver import NoticeReceiver
from billing.periodic import Intervals, Parts, PeriodicTask, PeriodicTasks, PeriodicTaskStatus, assemble
from billing.reconcile import proof_state
from billing.reports.history import Total
from billing.reports.unsettled import unsettled
from billing.store.connection import connect
from billing.store.errors import StoreRefused
from billing.sweep import Sweep
from billing.usage import TenantId
from deployments.config import BillingArgs
from deployments.gateway.metrics import MoneyMetrics

ARCHIVE_INTERVAL_S = 6 * 3_600.0
NOTICES_INTERVAL_S = 5.0


@dataclass(frozen=True, slots=True)
class BillingStatus:
    """How billing stands, from the store and this process."""

    pump: ExporterState
    backlog: Backlog
    sums: Sums
    cursors: Mapping[int, str]
    """By shard, the stream id up to which everything is sealed; shards without entries are left out."""
    parked_webhooks: int
    tasks: tuple[PeriodicTaskStatus, ...]
    pid: int


class BillingActor:
    """A timer around repeatable functions; see ``billing.periodic``."""

    _is_open = False

    def __init__(self, args: BillingArgs) -> None:
        url = os.environ.get("REDIS_URL", "")
        if not url:
            raise StoreRefused("REDIS_URL is not set: the billing actor starts no store of its own")
        settings = DodoSettings.from_env()

        async def open_parts() -> Parts:
            redis = await connect(url, durability=args.durability, min_replicas_acked=args.min_replicas_acked)
            return assemble(redis, settings, args.requests_per_minute)

        eager_s = min(args.flush_interval_s, 5.0)
        self._periodic = PeriodicTasks(
            open_parts, Intervals(flush_s=args.flush_interval_s, expire_s=args.expire_interval_s, customers_s=eager_s)
        )
        self._metrics = MoneyMetrics()
        self._periodic.tasks.append(PeriodicTask("metrics", 10.0, self._measure))
        if args.archive_url:
            archive = partial(_archive, args.archive_url)
            self._periodic.tasks.append(PeriodicTask("archive", ARCHIVE_INTERVAL_S, archive))
        if receiver := NoticeReceiver.from_env():
            self._periodic.tasks.append(_dispatching(receiver))
        self._periodic.start()
        self._is_open = True

    async def counters(self) -> dict[TenantId, Total]:
        """Requests, tokens and nanos per tenant since the stream began, up to this moment."""
        parts = await self._periodic.parts()
        await parts.counters.catch_up()
        return dict(parts.counters.by_tenant)

    async def status(self) -> BillingStatus:
        parts = await self._periodic.parts()
        outbox = parts.exporter.outbox
        return BillingStatus(
            pump=await outbox.shown(),
            backlog=await outbox.backlog(),
            sums=await outbox.sums(),
            cursors={shard: at for shard, at in (await outbox.cursors()).items() if at != "0-0"},
            parked_webhooks=await parts.webhooks.inbox.parked_count(),
            tasks=self._periodic.statuses(),
            pid=os.getpid(),
        )

    async def flush(self) -> FlushReport:
        """Seal and send now."""
        return await self._periodic.flush()

    async def check_health(self) -> None:
        """Serve replaces this replica after three failures: only for a timer that stands still."""
        self._periodic.check()

    async def close(self) -> None:
        """End the timers after a last flush."""
        self._is_open = False
        await self._periodic.stop()

    def __del__(self) -> Coroutine[None, None, None] | None:
        """Serve calls this, and awaits what it returns, before it ends the replica on purpose."""
        return self.close() if self._is_open else None

    async def _measure(self, parts: Parts, _: Sweep) -> None:
        """Set the metrics, which are never read back: bills come from the stream."""
        outbox = parts.exporter.outbox
        pump = await outbox.shown()
        self._metrics.export(pump, await outbox.backlog())
        self._metrics.ledger(await unsettled(parts.redis), pump, now_ms())
        self._metrics.parked(await parts.webhooks.inbox.parked_count())
        for kind, state in (await proof_state.shown(parts.redis)).items():
            self._metrics.proof(kind, state)


def _dispatching(receiver: NoticeReceiver) -> PeriodicTask:
    dispatcher = NoticeDispatcher(receiver)
    name, interval_s = "notice_dispatcher", NOTICES_INTERVAL_S
    return PeriodicTask(name, interval_s, lambda parts, sweep: dispatcher.run_once(parts.notices, sweep))


async def _archive(url: str, parts: Parts, sweep: Sweep) -> ArchiveReport:
    return await Archiver(parts.redis, await asyncio.to_thread(Archive, url)).run_once(sweep)
