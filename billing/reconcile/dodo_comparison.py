"""Compare all shards' exports with Dodo, whose events are not listed by shard and so are loaded once.

Decides in which order store and Dodo are read; ``dodo_proofs`` decides what must be equal.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from billing.clock import Clock
from billing.dodo.errors import DodoRefused, DodoUnreadable
from billing.dodo.wire import DodoEvent, UsagePeriod
from billing.reconcile.books import ShardState
from billing.reconcile.dodo_ledger import SETTLED_MS, DodoLedger
from billing.reconcile.dodo_proofs import Frozen, ShardExport, TenantAtDodo, prove_events, prove_periods
from billing.reconcile.proofs import Row
from billing.reconcile.shard_books import ShardBooks
from billing.tenants.tenant import Tenant
from billing.usage import TenantId

TRIES = 4
"""Reads of a shard that differs from Dodo before that counts as a fault: events may have come meanwhile."""
DAY_MS = 24 * 3_600_000
Look = Callable[[int], Awaitable[ShardState]]


@dataclass
class DodoComparison:
    books: Mapping[int, ShardBooks]
    tenants: Mapping[int, Sequence[Tenant]]
    clock: Clock
    rows: dict[int, list[Row]] = field(default_factory=dict)
    frozen: dict[int, tuple[int, Mapping[TenantId, str]]] = field(default_factory=dict)
    """By shard, the next watermark's moment at Dodo and each tenant's sums until there."""
    unasked: dict[TenantId, str] = field(default_factory=dict)
    """Tenants whose billing periods Dodo refused, or showed in a form that cannot be read, and why."""

    async def ask(self, ledger: DodoLedger, meter_id: str, states: dict[int, ShardState], look: Look) -> None:
        """Compare every shard, and look again, store first, at those that differ.

        Raises:
            DodoUnavailable, DodoRefused: what was compared until then stands in ``rows``.
        """
        await ledger.load(min(one.mark.dodo_ms for one in self.books.values()))
        left = list(states)
        for tries_left in range(TRIES - 1, -1, -1):
            events = ledger.by_customer()
            for number in list(left):
                rows = await self._compare(ledger, meter_id, self.books[number].export(states[number]), number, events)
                if not tries_left or all(row.is_exact for row in rows):
                    self.rows[number] = rows
                    left.remove(number)
            if not left:
                return
            for number in left:
                states[number] = await look(number)
            await ledger.load(self.clock() - SETTLED_MS)

    async def _compare(
        self, ledger: DodoLedger, meter_id: str, at: ShardExport, number: int, events: Mapping[str, Sequence[DodoEvent]]
    ) -> list[Row]:
        mark, rows = self.books[number].mark, list[Row]()
        until_ms = day_start(self.clock() - SETTLED_MS)
        frozen: dict[TenantId, str] = {}
        may_freeze = until_ms > mark.dodo_ms
        for tenant in self.tenants.get(number, ()):
            dodo = await self._at_dodo(ledger, meter_id, tenant, number, events)
            rows += prove_events(at, tenant.id, dodo)
            rows += prove_periods(tenant.id, dodo, self.clock())
            may_freeze = may_freeze and tenant.id not in self.unasked and dodo.may_freeze(at, until_ms)
            frozen[tenant.id] = json.dumps(dodo.freeze(until_ms).to_wire())
        if may_freeze:
            self.frozen[number] = until_ms, frozen
        return rows

    async def _at_dodo(
        self, ledger: DodoLedger, meter_id: str, tenant: Tenant, number: int, events: Mapping[str, Sequence[DodoEvent]]
    ) -> TenantAtDodo:
        mark = self.books[number].mark
        known = mark.dodo.get(tenant.id)
        mine = [event for event in events.get(tenant.dodo_customer_id, ()) if event.at_ms >= mark.dodo_ms]
        periods: Sequence[UsagePeriod] = ()
        self.unasked.pop(tenant.id, None)
        if tenant.subscription and meter_id:
            try:
                periods = await ledger.periods(tenant.subscription.id)
            except (DodoUnreadable, DodoRefused) as error:
                self.unasked[tenant.id] = f"the billing periods of {tenant.id}: {error}"
        frozen = Frozen.read(json.loads(known)) if known else Frozen()
        return TenantAtDodo(mine, mark.dodo_ms, frozen, meter_id, periods)


def day_start(ms: int) -> int:
    return ms - ms % DAY_MS
