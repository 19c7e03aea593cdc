"""The billing actor: the pump as a Serve deployment of its own, one replica, without a route.

Holds nothing that the store does not: it may be killed at any time. Nobody waits for it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ray.serve.metrics import Gauge

from billing.counters import Counters
from billing.dodo import DodoSettings
from billing.errors import StoreRefused
from billing.export import FlushReport
from billing.pump import Chore, ChoreStatus, Intervals, Parts, Pump, assemble
from billing.store.connection import connect
from billing.store.outbox import Backlog, PumpState, Sums
from billing.usage import TenantId
from deployments.config import BillingArgs


@dataclass(frozen=True, slots=True)
class BillingStatus:
    """How billing stands, from the store and this process."""

    pump: PumpState
    backlog: Backlog
    sums: Sums
    cursors: Mapping[int, str]
    """By shard, the stream id up to which everything is sealed; shards without entries are left out."""
    parked_webhooks: int
    chores: tuple[ChoreStatus, ...]


class BillingActor:
    """A timer around repeatable functions; see ``billing.pump``."""

    def __init__(self, args: BillingArgs) -> None:
        url = os.environ.get("REDIS_URL", "")
        if not url:
            raise StoreRefused("REDIS_URL is not set: the billing actor starts no store of its own")
        settings = DodoSettings.from_env()

        async def open_parts() -> Parts:
            redis = await connect(url, durability=args.durability)
            return assemble(redis, settings, args.requests_per_minute)

        eager_s = min(args.flush_interval_s, 5.0)
        self._pump = Pump(
            open_parts, Intervals(flush_s=args.flush_interval_s, expire_s=args.expire_interval_s, customers_s=eager_s)
        )
        self._gauges = _Gauges()
        self._pump.chores.append(Chore("metrics", 10.0, self._measure))
        self._pump.start()

    async def counters(self) -> dict[TenantId, Counters]:
        """Requests, tokens and nanos per tenant since the stream began, up to this moment."""
        parts = await self._pump.parts()
        await parts.counters.catch_up()
        return dict(parts.counters.by_tenant)

    async def status(self) -> BillingStatus:
        parts = await self._pump.parts()
        outbox = parts.exporter.outbox
        return BillingStatus(
            pump=await outbox.shown(),
            backlog=await outbox.backlog(),
            sums=await outbox.sums(),
            cursors={shard: at for shard, at in (await outbox.cursors()).items() if at != "0-0"},
            parked_webhooks=await parts.webhooks.inbox.parked_count(),
            chores=self._pump.statuses(),
        )

    async def flush(self) -> FlushReport:
        """Seal and send now."""
        return await self._pump.flush()

    async def check_health(self) -> None:
        """Serve replaces this replica after three failures: only for a timer that stands still."""
        self._pump.check()

    async def __del__(self) -> None:
        """Serve awaits this before it ends the replica on purpose."""
        await self._pump.stop()

    async def _measure(self, parts: Parts) -> None:
        backlog = await parts.exporter.outbox.backlog()
        state = await parts.exporter.outbox.shown()
        self._gauges.show(backlog, state, await parts.webhooks.inbox.parked_count())


class _Gauges:
    """What Prometheus sees of billing. Never read back: bills come from the stream."""

    def __init__(self) -> None:
        self._unsealed = Gauge("farebox_billing_unsealed_entries", "Stream entries not yet sealed for export")
        self._outbox = Gauge("farebox_billing_outbox_events", "Sealed events that Dodo has not acknowledged")
        self._held = Gauge("farebox_billing_held_events", "Sealed events whose tenant has no Dodo customer yet")
        self._dead = Gauge("farebox_billing_dead_events", "Events that Dodo refused for good")
        self._parked = Gauge("farebox_billing_parked_webhooks", "Webhooks that wait for another try")
        self._failures = Gauge("farebox_billing_export_failures", "Failed sends to Dodo in a row")
        self._success = Gauge("farebox_billing_last_success_seconds", "Unix time when Dodo last had everything sent")

    def show(self, backlog: Backlog, state: PumpState, parked: int) -> None:
        self._unsealed.set(backlog.unsealed_entries)
        self._outbox.set(backlog.outbox_events)
        self._held.set(state.held_events)
        self._dead.set(backlog.dead_events)
        self._parked.set(parked)
        self._failures.set(state.failures)
        self._success.set(state.last_success_ms // 1_000)
