"""The periodic tasks of the billing process, each on its own timer, whatever fails.

Everything they do is repeatable: the process may be killed at any moment, and two of them may run at once.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from redis.asyncio import Redis

from billing.abuse.addresses import AddressSketches
from billing.abuse.enforcer import AbuseEnforcer
from billing.catalog import publication
from billing.catalog.catalog import Catalog
from billing.clock import now_ms
from billing.commerce.auto_refill.refiller import Refiller
from billing.commerce.context import Commerce
from billing.commerce.customers import create_missing_customers
from billing.commerce.price_watch import compare_products
from billing.commerce.webhooks import Webhooks
from billing.dodo.call_budget import EXPORT_SHARE, Budget, SharedBudget
from billing.dodo.client import Dodo
from billing.dodo.errors import DodoUnavailable, DodoUnreadable
from billing.dodo.settings import DodoSettings
from billing.export.exporter import Exporter, FlushReport
from billing.ledger.admission import funding_for, plan_of
from billing.ledger.ledger import Ledger
from billing.notices.log import Notices
from billing.notices.notice import Notice, NoticeKind
from billing.notices.thresholds import notices_for
from billing.reconcile.proof_state import ProofState
from billing.reconcile.watch import Watch
from billing.reports.counters import LiveCounters
from billing.store.errors import StoreUnavailable
from billing.sweep import FailingItem, Sweep
from billing.tenants.directory import Tenants
from billing.tenants.errors import UnknownTenant
from billing.usage import TenantId

LIMIT_S = 120.0
"""A task that takes longer is cut off and starts again: everything it does may be cut off."""
RECONCILE_DODO_LIMIT_S = 3_000.0
"""Dodo's events are many pages, and calls are few."""
LATE_S = 60.0
"""How much later than its interval and limit a task's timer may be before the process is unhealthy."""
FLUSH_PATIENCE_S = 45.0
"""How long a flush waits for calls to become available: well below the limit."""
RETRY_S = 60.0
"""A task that failed is tried again after this time, even if its interval is longer."""
LAST_FLUSH_S = 5.0

log = logging.getLogger("farebox.billing.periodic")


class PeriodicTaskLate(Exception):
    """A timer stands still: this process must be replaced."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What the tasks work with, over one store and one Dodo."""

    redis: Redis
    dodo: Dodo
    """For callers that take each call from the budget themselves."""
    counted_dodo: Dodo
    """For the others: its calls are counted as they are made."""
    budget: Budget
    ledger: Ledger
    tenants: Tenants
    notices: Notices
    exporter: Exporter
    webhooks: Webhooks
    refiller: Refiller
    counters: LiveCounters
    watch: Watch
    abuse_enforcer: AbuseEnforcer
    commerce: Commerce

    async def close(self) -> None:
        await self.dodo.close()
        await self.counted_dodo.close()
        await self.redis.aclose()


def assemble(redis: Redis, settings: DodoSettings, calls_per_minute: int) -> Parts:
    """All parts, which share one budget of calls to Dodo with every other process."""

    async def catalog() -> Catalog | None:
        return await publication.current(redis)

    budget = SharedBudget(redis, calls_per_minute)
    export_budget = SharedBudget(redis, calls_per_minute, EXPORT_SHARE)
    dodo, counted_dodo = Dodo(settings), Dodo(settings, on_call=budget.spend)
    ledger, tenants, notices, counters = Ledger(redis), Tenants(redis), Notices(redis), LiveCounters(redis)
    commerce = Commerce(redis, counted_dodo, ledger, tenants, catalog)
    return Parts(
        redis=redis,
        dodo=dodo,
        counted_dodo=counted_dodo,
        budget=budget,
        ledger=ledger,
        tenants=tenants,
        notices=notices,
        exporter=Exporter(redis, dodo, tenants, budget=export_budget, patience_s=FLUSH_PATIENCE_S),
        webhooks=Webhooks(commerce, settings.webhook_key),
        refiller=Refiller(commerce),
        counters=counters,
        watch=Watch(redis, dodo, budget),
        abuse_enforcer=AbuseEnforcer(tenants, notices, AddressSketches(redis), counters.habits),
        commerce=commerce,
    )


@dataclass(frozen=True, slots=True)
class Intervals:
    """Seconds between two runs of each task."""

    flush_s: float = 60.0
    expire_s: float = 5.0
    customers_s: float = 5.0
    webhooks_s: float = 10.0
    counters_s: float = 2.0
    refills_s: float = 5.0
    notices_s: float = 5.0
    abuse_s: float = 10.0
    tenants_s: float = 60.0
    subscriptions_s: float = 300.0
    prune_s: float = 3_600.0
    products_s: float = 3_600.0
    reconcile_store_s: float = 60.0
    reconcile_dodo_s: float = 3_600.0


@dataclass
class PeriodicTask:
    """Something done again and again, and how that goes."""

    name: str
    interval_s: float
    run: Callable[[Parts, Sweep], Awaitable[object]]
    """Goes through its items by the sweep, so that one that fails keeps no other waiting."""
    limit_s: float = LIMIT_S
    runs: int = 0
    failures: int = 0
    """Runs in a row that failed as a whole."""
    last_error: str = ""
    """Of the last run; empty if it went well, whatever became of single items."""
    started_s: float = field(default_factory=time.monotonic)
    """When its last run began."""
    sweep: Sweep = field(init=False)
    noticed: set[str] = field(default_factory=set)
    """Stuck items that a notice names."""

    def __post_init__(self) -> None:
        self.sweep = Sweep(self.name)

    def is_late(self, now_s: float) -> bool:
        return now_s - self.started_s > self.interval_s + self.limit_s + LATE_S


@dataclass(frozen=True, slots=True)
class PeriodicTaskStatus:
    name: str
    runs: int
    failures: int
    last_error: str
    failing_items: int = 0
    """Items whose last try failed, each left out until its next one."""
    first_failing: str = ""
    """The one that has failed longest, and its error."""


class PeriodicTasks:
    """Runs every task on its timer. The store may be unavailable at the start, or any time later."""

    def __init__(self, open_parts: Callable[[], Awaitable[Parts]], intervals: Intervals) -> None:
        self._open, self._opening = open_parts, asyncio.Lock()
        self._parts: Parts | None = None
        self._timers: list[asyncio.Task[None]] = []
        self.tasks = [
            PeriodicTask("flush", intervals.flush_s, _flush),
            PeriodicTask("expire", intervals.expire_s, lambda parts, _: parts.ledger.expire()),
            PeriodicTask("customers", intervals.customers_s, _create_customers),
            PeriodicTask("webhooks", intervals.webhooks_s, lambda parts, sweep: parts.webhooks.replay(sweep)),
            PeriodicTask("counters", intervals.counters_s, lambda parts, _: parts.counters.catch_up()),
            PeriodicTask("refills", intervals.refills_s, lambda parts, sweep: parts.refiller.run_once(sweep)),
            PeriodicTask("notices", intervals.notices_s, _record_threshold_notices),
            PeriodicTask("abuse", intervals.abuse_s, _enforce_abuse_rules),
            PeriodicTask("tenants", intervals.tenants_s, _read_tenants),
            PeriodicTask("subscriptions", intervals.subscriptions_s, _refresh_subscriptions),
            PeriodicTask("prune", intervals.prune_s, lambda parts, _: parts.webhooks.prune()),
            PeriodicTask("products", intervals.products_s, lambda parts, _: compare_products(parts.commerce)),
            PeriodicTask("reconcile_store", intervals.reconcile_store_s, _reconcile_store),
            PeriodicTask("reconcile_dodo", intervals.reconcile_dodo_s, _reconcile_dodo, RECONCILE_DODO_LIMIT_S),
        ]

    def start(self) -> None:
        self._timers = [asyncio.create_task(self._repeat(task), name=task.name) for task in self.tasks]

    async def stop(self) -> None:
        """End the timers, flush once more if that goes quickly, close the parts."""
        for timer in self._timers:
            timer.cancel()
        await asyncio.gather(*self._timers, return_exceptions=True)
        self._timers = []
        if self._parts is None:
            return
        try:
            async with asyncio.timeout(LAST_FLUSH_S):
                await self._parts.exporter.flush_once()
        except Exception as error:  # noqa: BLE001, nothing is lost: the next process starts at the cursor
            log.warning("no last flush: %s", error)
        await self._parts.close()
        self._parts = None

    async def parts(self) -> Parts:
        """The parts, opened when first needed.

        Raises:
            StoreUnavailable, StoreRefused: not yet.
        """
        async with self._opening:
            if self._parts is None:
                self._parts = await self._open()
            return self._parts

    def check(self) -> None:
        """Raises: PeriodicTaskLate."""
        now = time.monotonic()
        late = [task.name for task in self.tasks if task.is_late(now)]
        ended = [timer.get_name() for timer in self._timers if timer.done()]
        if late or ended:
            raise PeriodicTaskLate(f"timers late: {', '.join(late) or 'none'}; ended: {', '.join(ended) or 'none'}")

    def statuses(self) -> tuple[PeriodicTaskStatus, ...]:
        return tuple(_status(task) for task in self.tasks)

    async def _repeat(self, task: PeriodicTask) -> None:
        """The outermost loop of this process: whatever fails is logged, counted and tried again."""
        while True:
            task.started_s = started = time.monotonic()
            try:
                async with asyncio.timeout(task.limit_s):
                    parts = await self.parts()
                    await task.run(parts, task.sweep)
                    await _record_stuck_items(task, parts.notices)
            except Exception as error:  # noqa: BLE001, the outermost loop: whatever fails is counted and tried again
                task.failures += 1
                task.last_error = f"{type(error).__name__}: {error}"
                log.warning("%s failed %d times in a row: %s", task.name, task.failures, task.last_error)
            else:
                task.failures, task.last_error = 0, ""
            task.runs += 1
            pause_s = min(task.interval_s, RETRY_S) if task.failures else task.interval_s
            await asyncio.sleep(max(0.01, pause_s - (time.monotonic() - started)))


def _status(task: PeriodicTask) -> PeriodicTaskStatus:
    failing = task.sweep.failing
    longest = max(failing, key=lambda one: one.failures, default=None)
    first = f"{longest.id}: {longest.error}" if longest else ""
    return PeriodicTaskStatus(task.name, task.runs, task.failures, task.last_error, len(failing), first)


async def _record_stuck_items(task: PeriodicTask, notices: Notices) -> None:
    """Record a notice of each item that an owner has to look at: an unavailable store or Dodo comes back by itself."""
    stuck = {one.id: one for one in task.sweep.failing if one.is_stuck and not _is_outage(one)}
    for id_ in stuck.keys() - task.noticed:
        now = now_ms()
        facts = {"task": task.name, "item": id_, "error": stuck[id_].error}
        await notices.record(Notice(NoticeKind.ITEM_STUCK, TenantId(""), f"stuck:{task.name}:{id_}:{now}", now, facts))
        task.noticed.add(id_)
    task.noticed = set(stuck)


def _is_outage(failing: FailingItem) -> bool:
    is_unreadable = issubclass(failing.error_type, DodoUnreadable)
    return issubclass(failing.error_type, (DodoUnavailable, StoreUnavailable)) and not is_unreadable


async def _flush(parts: Parts, sweep: Sweep) -> FlushReport:
    sweep.includes = parts.exporter.sweeps
    return await parts.exporter.flush_once()


async def _read_tenants(parts: Parts, sweep: Sweep) -> int:
    """Name the tenants whose record cannot be read, which every other task leaves out. How many those are."""
    _, unreadable = await parts.tenants.list_readable()
    await sweep.run(unreadable, parts.tenants.get, is_forced=True)
    return len(unreadable)


async def _create_customers(parts: Parts, sweep: Sweep) -> int:
    return await create_missing_customers(parts.counted_dodo, parts.tenants, parts.budget, sweep)


async def _record_threshold_notices(parts: Parts, sweep: Sweep) -> int:
    """Record the thresholds that tenants reached who used something since the last run. How many notices were new."""
    catalog = await publication.current(parts.redis)
    if catalog is None:
        return 0

    unseen = parts.counters.unseen()

    async def record(tenant_id: TenantId) -> int:
        try:
            tenant = await parts.tenants.get(tenant_id)
        except UnknownTenant:
            parts.counters.note_seen(tenant_id, unseen[tenant_id])
            return 0
        plan, now = plan_of(tenant, catalog), now_ms()
        account = await parts.ledger.account(tenant.id, funding_for(tenant, plan, now))
        found = [await parts.notices.record(one) for one in notices_for(tenant, plan, account, now)]
        parts.counters.note_seen(tenant_id, unseen[tenant_id])
        return sum(found)

    return sum(await sweep.run(sorted(unseen), record))


async def _enforce_abuse_rules(parts: Parts, sweep: Sweep) -> int:
    catalog = await publication.current(parts.redis)
    return 0 if catalog is None else await parts.abuse_enforcer.run_once(catalog.abuse, sweep)


async def _refresh_subscriptions(parts: Parts, sweep: Sweep) -> int:
    tenants, _ = await parts.tenants.list_readable()
    return await parts.webhooks.refresh_overdue(tenants, sweep)


async def _reconcile_store(parts: Parts, _: Sweep) -> ProofState:
    return await parts.watch.reconcile_store()


async def _reconcile_dodo(parts: Parts, _: Sweep) -> ProofState:
    return await parts.watch.reconcile_dodo()
