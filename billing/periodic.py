"""The billing process: what is done again and again, each on its own timer, whatever fails.

Knows when; what is done stands in export, webhooks, customers and the ledger. Everything it does
is repeatable, so that it may be killed at any moment and run twice at once.
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
from billing.commerce.auto_refill import Refiller
from billing.commerce.customers import create_wanted
from billing.commerce.refill_store import Refills
from billing.commerce.webhooks import Webhooks
from billing.dodo.budget import Budget
from billing.dodo.call_budget import SharedBudget
from billing.dodo.client import Dodo, DodoSettings
from billing.export.exporter import Exporter, FlushReport
from billing.ledger.admission import funding_for, plan_of
from billing.ledger.ledger import Ledger
from billing.notices.log import Notices
from billing.notices.thresholds import notices_for
from billing.reconcile.watch import Watch
from billing.reports.counters import LiveCounters
from billing.tenants.directory import Tenants

LIMIT_S = 120.0
"""A chore that takes longer is cut off and starts again: everything it does may be cut off."""
EXAMINE_LIMIT_S = 3_000.0
"""Dodo's books are many pages, and calls are few."""
LATE_S = 60.0
"""How much later than its interval and limit a chore's timer may be before the process is unhealthy."""
FLUSH_PATIENCE_S = 45.0
"""How long a flush goes on as its calls come in: well below the limit."""
RETRY_S = 60.0
"""What is done once an hour is tried again sooner when it failed."""
LAST_FLUSH_S = 5.0

log = logging.getLogger("farebox.billing.pump")


class PeriodicTaskLate(Exception):
    """A timer stands still: this process must be replaced."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What the chores work with, once the store has answered."""

    redis: Redis
    dodo: Dodo
    """For callers that ask the budget first."""
    unasked: Dodo
    """For those that do not: their calls are counted as they are made."""
    ledger: Ledger
    tenants: Tenants
    exporter: Exporter
    webhooks: Webhooks
    counters: LiveCounters
    budget: Budget
    watch: Watch
    notices: Notices
    refiller: Refiller
    warden: AbuseEnforcer

    async def close(self) -> None:
        await self.dodo.close()
        await self.unasked.close()
        await self.redis.aclose()


def assemble(redis: Redis, settings: DodoSettings, calls_per_minute: int) -> Parts:
    """All parts over one store and one Dodo, sharing one budget of calls with every other process."""
    dodo, ledger, tenants = Dodo(settings), Ledger(redis), Tenants(redis)
    budget = SharedBudget(redis, calls_per_minute)
    unasked = Dodo(settings, on_call=budget.spend)

    async def catalog() -> Catalog | None:
        return await publication.current(redis)

    webhooks = Webhooks(redis, unasked, ledger, tenants, catalog, settings.webhook_key)
    exporter = Exporter(redis, dodo, tenants, budget=budget, patience_s=FLUSH_PATIENCE_S)
    notices, counters = Notices(redis), LiveCounters(redis)
    refiller = Refiller(unasked, ledger, tenants, Refills(redis), webhooks.inbox, webhooks.payments, notices, catalog)
    return Parts(
        redis,
        dodo,
        unasked,
        ledger,
        tenants,
        exporter,
        webhooks,
        counters,
        budget,
        Watch(redis, dodo, budget),
        notices,
        refiller,
        AbuseEnforcer(tenants, notices, AddressSketches(redis), counters.habits),
    )


@dataclass(frozen=True, slots=True)
class Intervals:
    """Seconds between two runs of each chore."""

    flush_s: float = 60.0
    expire_s: float = 5.0
    customers_s: float = 5.0
    webhooks_s: float = 10.0
    counters_s: float = 2.0
    refills_s: float = 5.0
    notices_s: float = 5.0
    abuse_s: float = 10.0
    subscriptions_s: float = 300.0
    prune_s: float = 3_600.0
    glance_s: float = 60.0
    examine_s: float = 3_600.0


@dataclass
class PeriodicTask:
    """Something done again and again, and how that goes."""

    name: str
    interval_s: float
    run: Callable[[Parts], Awaitable[object]]
    runs: int = 0
    failures: int = 0
    """In a row."""
    last_error: str = ""
    """Of the last run; empty if it went well."""
    limit_s: float = LIMIT_S
    beat_s: float = field(default_factory=time.monotonic)
    """When its timer last moved."""

    def is_late(self, now_s: float) -> bool:
        return now_s - self.beat_s > self.interval_s + self.limit_s + LATE_S


@dataclass(frozen=True, slots=True)
class PeriodicTaskStatus:
    name: str
    runs: int
    failures: int
    last_error: str


class PeriodicTasks:
    """Runs every chore on its timer. The store may be away at the start, or any time later."""

    def __init__(self, open_parts: Callable[[], Awaitable[Parts]], intervals: Intervals) -> None:
        self._open, self._opening = open_parts, asyncio.Lock()
        self._parts: Parts | None = None
        self._flushing = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self.tasks = [
            PeriodicTask("flush", intervals.flush_s, self._flush),
            PeriodicTask("expire", intervals.expire_s, lambda parts: parts.ledger.expire()),
            PeriodicTask("customers", intervals.customers_s, _create_customers),
            PeriodicTask("webhooks", intervals.webhooks_s, lambda parts: parts.webhooks.replay()),
            PeriodicTask("counters", intervals.counters_s, lambda parts: parts.counters.catch_up()),
            PeriodicTask("refills", intervals.refills_s, lambda parts: parts.refiller.run_once()),
            PeriodicTask("notices", intervals.notices_s, _tell),
            PeriodicTask("abuse", intervals.abuse_s, _watch_keys),
            PeriodicTask("subscriptions", intervals.subscriptions_s, _refresh_overdue),
            PeriodicTask("prune", intervals.prune_s, lambda parts: parts.webhooks.prune()),
            PeriodicTask("glance", intervals.glance_s, lambda parts: parts.watch.glance()),
            PeriodicTask("examine", intervals.examine_s, lambda parts: parts.watch.examine(), limit_s=EXAMINE_LIMIT_S),
        ]

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._repeat(task), name=task.name) for task in self.tasks]

    async def stop(self) -> None:
        """End the timers, flush once more if that goes quickly, let go of the store."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._parts is None:
            return
        try:
            async with asyncio.timeout(LAST_FLUSH_S):
                await self._flush(self._parts)
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

    async def flush(self) -> FlushReport:
        """Flush now, without waiting for a backoff."""
        parts = await self.parts()
        async with self._flushing:
            return await parts.exporter.flush_once(force=True)

    def check(self) -> None:
        """Raises: PumpLate."""
        now = time.monotonic()
        late = [task.name for task in self.tasks if task.is_late(now)]
        ended = [task.get_name() for task in self._tasks if task.done()]
        if late or ended:
            raise PeriodicTaskLate(f"timers late: {', '.join(late) or 'none'}; ended: {', '.join(ended) or 'none'}")

    def statuses(self) -> tuple[PeriodicTaskStatus, ...]:
        return tuple(PeriodicTaskStatus(c.name, c.runs, c.failures, c.last_error) for c in self.tasks)

    async def _flush(self, parts: Parts) -> FlushReport:
        async with self._flushing:
            return await parts.exporter.flush_once()

    async def _repeat(self, task: PeriodicTask) -> None:
        """The outermost loop of this process: whatever fails is logged and counted, and tried again."""
        while True:
            task.beat_s = started = time.monotonic()
            try:
                async with asyncio.timeout(task.limit_s):
                    await task.run(await self.parts())
            except Exception as error:  # noqa: BLE001, the outermost loop: whatever fails is counted and tried again
                task.failures += 1
                task.last_error = f"{type(error).__name__}: {error}"
                log.warning("%s failed %d times in a row: %s", task.name, task.failures, task.last_error)
            else:
                task.failures, task.last_error = 0, ""
            task.runs += 1
            pause_s = min(task.interval_s, RETRY_S) if task.failures else task.interval_s
            await asyncio.sleep(max(0.01, pause_s - (time.monotonic() - started)))


async def _create_customers(parts: Parts) -> int:
    return await create_wanted(parts.unasked, parts.tenants, parts.budget)


async def _tell(parts: Parts) -> int:
    """Tell what should be told of the tenants that used something since the last look. How many notices were new."""
    catalog, told = await publication.current(parts.redis), 0
    if catalog is None:
        return 0
    for tenant in await parts.tenants.many(parts.counters.take_active()):
        plan, now = plan_of(tenant, catalog), now_ms()
        account = await parts.ledger.account(tenant.id, funding_for(tenant, plan, now))
        for notice in notices_for(tenant, plan, account, now):
            told += await parts.notices.tell(notice)
    return told


async def _watch_keys(parts: Parts) -> int:
    catalog = await publication.current(parts.redis)
    return 0 if catalog is None else await parts.warden.run_once(catalog.abuse)


async def _refresh_overdue(parts: Parts) -> int:
    return await parts.webhooks.refresh_overdue(await parts.tenants.list())
