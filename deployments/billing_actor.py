"""The billing actor: what ``billing.periodic`` repeats, as a Serve deployment with one replica and no route.

It holds no state that the store does not have, so it may be killed at any time.
"""

import asyncio
import os
from collections.abc import Coroutine
from functools import partial

from ray.util.metrics import Gauge

from billing.archive.archiver import Archiver, ArchiveReport
from billing.archive.files import Archive
from billing.clock import now_ms
from billing.dodo.belonging import claim
from billing.dodo.settings import DodoSettings
from billing.errors import BillingError
from billing.export.outbox import Backlog, ExporterState
from billing.notices.dispatcher import NoticeDispatcher
from billing.notices.receiver import NoticeReceiver
from billing.periodic import Intervals, Parts, PeriodicTask, PeriodicTasks, PeriodicTaskStatus, assemble
from billing.reconcile import proof_state
from billing.reconcile.proof_state import ProofState
from billing.reports.unsettled import Unsettled, unsettled
from billing.store.connection import connect
from billing.store.errors import StoreRefused
from billing.sweep import Sweep
from deployments.config import BillingArgs

METRICS_INTERVAL_S = 10.0
ARCHIVE_INTERVAL_S = 6 * 3_600.0
DISPATCH_INTERVAL_S = 5.0
MAX_CUSTOMERS_INTERVAL_S = 5.0
"""A new tenant can buy nothing before it is a customer at Dodo Payments."""


class BillingActor:
    """Runs the periodic tasks of ``billing.periodic``, and publishes metrics of the books."""

    _is_open = False

    def __init__(self, args: BillingArgs) -> None:
        url = os.environ.get("REDIS_URL", "")
        if not url:
            raise StoreRefused("REDIS_URL is not set: `farebox up` sets it, on a cluster give it to every node")
        settings = DodoSettings.from_env()

        async def open_parts() -> Parts:
            redis = await connect(url, durability=args.durability, min_replicas_acked=args.min_replicas_acked)
            try:
                await claim(redis, settings.environment)
            except BillingError:
                await redis.aclose()
                raise
            return assemble(redis, settings, args.requests_per_minute)

        intervals = Intervals(
            flush_s=args.flush_interval_s,
            expire_s=args.expire_interval_s,
            customers_s=min(args.flush_interval_s, MAX_CUSTOMERS_INTERVAL_S),
        )
        self._periodic = PeriodicTasks(open_parts, intervals)
        self._metrics = BillingMetrics()
        self._periodic.tasks.append(PeriodicTask("metrics", METRICS_INTERVAL_S, self._measure))
        if args.archive_url:
            archive = partial(_archive, args.archive_url)
            self._periodic.tasks.append(PeriodicTask("archive", ARCHIVE_INTERVAL_S, archive))
        if receiver := NoticeReceiver.from_env():
            self._periodic.tasks.append(_dispatching(receiver))
        self._periodic.start()
        self._is_open = True

    async def check_health(self) -> None:
        """Fail when a periodic task no longer runs: Serve replaces this replica after three failures."""
        self._periodic.check()

    async def close(self) -> None:
        """Stop the periodic tasks, after a last flush."""
        self._is_open = False
        await self._periodic.stop()

    def __del__(self) -> Coroutine[None, None, None] | None:
        """Serve calls this before it stops the replica on purpose, and awaits what it returns."""
        return self.close() if self._is_open else None

    async def _measure(self, parts: Parts, _: Sweep) -> None:
        outbox = parts.exporter.outbox
        exporter = await outbox.shown()
        self._metrics.export(exporter, await outbox.backlog())
        self._metrics.ledger(await unsettled(parts.redis), exporter, now_ms())
        self._metrics.parked(await parts.webhooks.inbox.parked_count())
        for kind, state in (await proof_state.shown(parts.redis)).items():
            self._metrics.proof(kind, state)
        for status in self._periodic.statuses():
            self._metrics.task(status)


class BillingMetrics:
    """The billing actor's gauges for Prometheus. Nothing is billed from them."""

    def __init__(self) -> None:
        self._holds = Gauge("farebox_ledger_open_holds", "Holds of all gateways that are not settled")
        self._hold_age = Gauge("farebox_ledger_oldest_hold_seconds", "Age of the oldest open hold")
        self._held = Gauge("farebox_ledger_unsettled_nanos", "Nanos of a US dollar that open holds have set aside")
        self._unresolved = Gauge("farebox_quarantine_settles", "Settlements that a person must charge or drop")
        self._unsealed = Gauge("farebox_billing_unsealed_entries", "Stream entries not yet sealed for export")
        self._outbox = Gauge("farebox_billing_outbox_events", "Sealed events that Dodo has not acknowledged")
        self._held_events = Gauge("farebox_billing_held_events", "Sealed events whose tenant has no Dodo customer yet")
        self._age = Gauge(
            "farebox_billing_backlog_age_seconds", "Age of the oldest record that Dodo has not acknowledged"
        )
        self._dead = Gauge("farebox_billing_dead_events", "Events that Dodo rejected for good")
        self._withheld = Gauge(
            "farebox_billing_withheld_records", "Records withheld from Dodo, since they were altered"
        )
        self._parked = Gauge("farebox_billing_parked_webhooks", "Webhooks that wait for another try")
        self._failures = Gauge("farebox_billing_export_failures", "Failed sends to Dodo in a row")
        self._stopped = Gauge("farebox_billing_export_stopped", "1 while Dodo refuses our key or address")
        self._starved = Gauge("farebox_billing_export_starved", "1 while no call to Dodo is left for the export")
        self._success = Gauge(
            "farebox_billing_last_success_seconds", "Unix time of the last flush that sent usage and left none"
        )
        labelled = {"tag_keys": ("kind",)}
        self._difference = Gauge("farebox_reconcile_difference_nanos", "Nanos by which the books differ", **labelled)
        self._faults = Gauge("farebox_reconcile_faults", "Proofs of the books that do not hold", **labelled)
        self._unproven = Gauge("farebox_reconcile_unproven", "1 where a proof could not be made", **labelled)
        self._proved = Gauge("farebox_reconcile_last_run_seconds", "Unix time of the last run", **labelled)

        by_task = {"tag_keys": ("task",)}
        self._task_failures = Gauge("farebox_billing_task_failures", "Failed runs of a task in a row", **by_task)
        self._failing_items = Gauge("farebox_billing_failing_items", "Items of a task whose last try failed", **by_task)

    def ledger(self, open_: Unsettled, exporter: ExporterState, now_ms: int) -> None:
        self._holds.set(open_.open_holds)
        self._hold_age.set(open_.oldest_hold_s)
        self._held.set(open_.held_nanos)
        self._unresolved.set(open_.unresolved)
        self._age.set(max(open_.oldest_unsealed_s, exporter.waiting_s(now_ms)))

    def export(self, exporter: ExporterState, backlog: Backlog) -> None:
        self._unsealed.set(backlog.unsealed_entries)
        self._outbox.set(backlog.outbox_events)
        self._held_events.set(exporter.held_events)
        self._dead.set(backlog.dead_events)
        self._withheld.set(backlog.withheld_records)
        self._failures.set(exporter.failures)
        self._stopped.set(int(exporter.state == "stopped"))
        self._starved.set(int(exporter.state == "starved"))
        self._success.set(exporter.last_success_ms // 1_000)

    def parked(self, webhooks: int) -> None:
        self._parked.set(webhooks)

    def proof(self, kind: str, state: ProofState) -> None:
        tags = {"kind": kind}
        self._difference.set(state.drift_nanos, tags=tags)
        self._faults.set(state.faults, tags=tags)
        self._unproven.set(int(bool(state.unproven)), tags=tags)
        self._proved.set(state.at_ms // 1_000, tags=tags)

    def task(self, status: PeriodicTaskStatus) -> None:
        tags = {"task": status.name}
        self._task_failures.set(status.failures, tags=tags)
        self._failing_items.set(status.failing_items, tags=tags)


async def _archive(url: str, parts: Parts, sweep: Sweep) -> ArchiveReport:
    return await Archiver(parts.redis, await asyncio.to_thread(Archive, url)).run_once(sweep)


def _dispatching(receiver: NoticeReceiver) -> PeriodicTask:
    dispatcher = NoticeDispatcher(receiver)
    return PeriodicTask(
        "notice_dispatcher", DISPATCH_INTERVAL_S, lambda parts, sweep: dispatcher.run_once(parts.notices, sweep)
    )
