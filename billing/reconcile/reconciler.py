"""Proves the books: the store against itself and the archive, and Dodo's own sums against the store.

Changes nothing. May run beside everything else: what moves while it looks is looked at again.
"""

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from redis.asyncio import Redis

from billing.archive.files import Archive
from billing.dodo.budget import Budget, CallBudget
from billing.dodo.client import PAGE, Dodo
from billing.dodo.wire import DodoEvent
from billing.errors import DodoRefused, DodoUnavailable
from billing.reconcile.export_proofs import prove_dodo, prove_export, told
from billing.reconcile.proofs import Row, fold, prove_tenant
from billing.store.books import OpenHold, ShardReader, ShardState
from billing.store.keys import ALL_SHARDS, Shard, shard_of
from billing.store.tenants import Tenants
from billing.usage import TenantId

TRIES = 4
"""Looks at a tenant's export while events of it are being acknowledged, before we give up."""
MAX_EVENT_PAGES = 10_000
BUDGET_WAIT_S = 0.25


@dataclass(frozen=True, slots=True)
class Summary:
    """All rows of one proof together."""

    proof: str
    unit: str
    rows: int
    expected: int
    found: int
    wrong: int


@dataclass(frozen=True)
class Report:
    """What was proved, and what could not be."""

    rows: tuple[Row, ...]
    unproven: tuple[str, ...] = ()
    """Proofs that could not be made, and why."""

    @property
    def is_clean(self) -> bool:
        return not self.unproven and not self.faults

    @property
    def faults(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.is_exact)

    def summary(self) -> list[Summary]:
        """One line for each proof and unit."""
        groups: defaultdict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in self.rows:
            groups[row.proof, row.unit].append(row)
        return [
            Summary(
                proof,
                unit,
                len(rows),
                sum(row.expected for row in rows),
                sum(row.found for row in rows),
                sum(not row.is_exact for row in rows),
            )
            for (proof, unit), rows in groups.items()
        ]


def prove_shard(state: ShardState) -> list[Row]:
    """Everything that can be proved of one shard without asking anybody else."""
    folds = fold(state)
    holds: defaultdict[TenantId, list[OpenHold]] = defaultdict(list)
    for hold in state.holds:
        holds[hold.tenant].append(hold)
    rows: list[Row] = []
    for tenant, account in state.accounts.items():
        rows += prove_tenant(tenant, account, folds[tenant], holds[tenant])
    return rows + prove_export(state, folds.values())


@dataclass
class Reconciler:
    """Looks at every shard in turn. Without a Dodo its sums are left out."""

    redis: Redis
    dodo: Dodo | None = None
    archive: Archive | None = None
    budget: Budget = field(default_factory=lambda: CallBudget(60))

    async def run(self) -> Report:
        """Prove everything.

        Raises:
            StoreUnavailable, ArchiveUnavailable: it does not answer.
            UnreadableBooks: it holds what farebox does not write.
        """
        customers: defaultdict[int, dict[TenantId, str]] = defaultdict(dict)
        for tenant in await Tenants(self.redis).list():
            customers[shard_of(tenant.id)][tenant.id] = tenant.dodo_customer_id
        rows: list[Row] = []
        unproven: list[str] = []
        for shard in ALL_SHARDS:
            reader = await self._open(shard)
            state = await reader.read(tuple(customers[shard.number]))
            rows += prove_shard(state)
            if self.dodo is not None and not unproven:
                try:
                    rows += await self._prove_dodo(self.dodo, reader, state, customers[shard.number])
                except (DodoUnavailable, DodoRefused, _Moving) as error:
                    unproven.append(str(error))
        return Report(tuple(rows), tuple(unproven))

    async def _open(self, shard: Shard) -> ShardReader:
        """Entries may be archived and trimmed at any time: those that the stream lacked are in the archive after."""
        reader = ShardReader(self.redis, shard)
        await reader.catch_up()
        if self.archive is not None:
            reader.add(await asyncio.to_thread(self.archive.read, shard))
        return reader

    async def _prove_dodo(
        self, dodo: Dodo, reader: ShardReader, state: ShardState, customers: Mapping[TenantId, str]
    ) -> list[Row]:
        """Ask Dodo, then look again: only where nothing was acknowledged meanwhile can the two be compared."""
        rows: list[Row] = []
        waiting = dict(customers)
        for _ in range(TRIES):
            at_dodo = {tenant: await self._events(dodo, customer) for tenant, customer in waiting.items()}
            before, state = state, await reader.read(tuple(customers))
            was, now = told(before, fold(before)), told(state, fold(state))
            for tenant, events in at_dodo.items():
                if was[tenant] == now[tenant] and _kept(before, tenant) == _kept(state, tenant):
                    rows += prove_dodo(state, tenant, now[tenant], events)
                    del waiting[tenant]
            if not waiting:
                return rows
        raise _Moving(f"usage of {', '.join(sorted(waiting))} was being sent all the time: try again")

    async def _events(self, dodo: Dodo, customer_id: str) -> list[DodoEvent]:
        """All events of a customer. Pages are counted here, each one call of the budget."""
        found: list[DodoEvent] = []
        if not customer_id:
            return found
        for page in range(MAX_EVENT_PAGES):
            await self._spend()
            events = await dodo.events_of(customer_id, page)
            found += events
            if len(events) < PAGE:
                return found
        raise DodoUnavailable(f"customer {customer_id} has more than {MAX_EVENT_PAGES * PAGE} events")

    async def _spend(self) -> None:
        while True:
            if await self.budget.take():
                return
            await asyncio.sleep(BUDGET_WAIT_S)


class _Moving(Exception):
    """A tenant's export did not stand still for long enough to be compared."""


def _kept(state: ShardState, tenant: TenantId) -> set[str]:
    return {event.id for event in (*state.outbox, *state.dead) if event.tenant == tenant}
