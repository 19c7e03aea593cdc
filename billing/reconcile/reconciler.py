"""Reconcile: prove the store against itself and the archive, and Dodo's own sums against the store.

Moves no money; writes only how far the books were proved. May run beside everything else: what moves meanwhile is
read again.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from redis.asyncio import Redis

from billing.archive.archive_cursor import ArchiveCursor
from billing.archive.files import Archive
from billing.clock import Clock, now_ms
from billing.commerce.dodo_ids import id_of
from billing.commerce.inbox import CHARGE_METER
from billing.dodo.call_budget import Budget, CallBudget
from billing.dodo.client import Dodo
from billing.dodo.errors import DodoRefused, DodoUnavailable
from billing.reconcile.books import ShardState, UnreadableBooks
from billing.reconcile.dodo_comparison import DodoComparison, day_start
from billing.reconcile.dodo_ledger import DodoLedger
from billing.reconcile.proofs import Row
from billing.reconcile.shard_books import ShardBooks
from billing.reconcile.watermark import Mark, Watermarks
from billing.store.keys import ALL_SHARDS, Shard, shard_for
from billing.tenants.directory import Tenants
from billing.tenants.tenant import Tenant


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

    @property
    def drift_nanos(self) -> int:
        """Money that is not where it should be, whichever way."""
        return sum(abs(row.difference) for row in self.faults if row.unit == "nanos")

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


@dataclass
class Reconciler:
    """Proves every shard in turn, from its watermark on. Without a Dodo, Dodo's sums are left out.

    Run again, it reads only what is new.
    """

    redis: Redis
    dodo: Dodo | None = None
    archive: Archive | None = None
    budget: Budget = field(default_factory=lambda: CallBudget(60))
    clock: Clock = now_ms
    is_full: bool = False
    """Read everything that stream and archive have, whatever was proved before."""
    _books: dict[int, ShardBooks] = field(default_factory=dict)

    async def run(self) -> Report:
        """Prove everything, and remember the closed days of what is right.

        Raises:
            StoreUnavailable, ArchiveUnavailable: it does not answer.
        """
        by_shard: defaultdict[int, list[Tenant]] = defaultdict(list)
        tenants, unreadable = await Tenants(self.redis).list_readable()
        for tenant in tenants:
            by_shard[shard_for(tenant.id).number].append(tenant)
        if not self._books:
            await self._begin()
        unproven = [f"tenant {one} cannot be read" for one in unreadable]
        rows: dict[int, list[Row]] = {}
        states: dict[int, ShardState] = {}
        for number, books in self._books.items():
            try:
                states[number] = await self._look(books, by_shard[number])
            except UnreadableBooks as error:
                unproven.append(str(error))
            else:
                rows[number] = books.prove(states[number])
        asked = DodoComparison(self._books, by_shard, self.clock)
        if self.dodo is not None:

            async def look(number: int) -> ShardState:
                return await self._look(self._books[number], by_shard[number])

            try:
                await asked.ask(DodoLedger(self.dodo, self.budget), await self._meter_id(), states, look)
            except (DodoUnavailable, DodoRefused, UnreadableBooks) as error:
                unproven.append(str(error))
        unproven += asked.unasked.values()
        for number, more in asked.rows.items():
            rows[number] += more
        incomplete = {shard_for(tenant_id).number for tenant_id in unreadable}
        whole = {number: found for number, found in rows.items() if number not in incomplete}
        await self._remember(states, whole, asked)
        return Report(tuple(row for found in rows.values() for row in found), tuple(unproven))

    async def _meter_id(self) -> str:
        return await id_of(self.redis, CHARGE_METER)

    async def _begin(self) -> None:
        marks = {} if self.is_full else await Watermarks(self.redis).all()
        today_ms = day_start(await ArchiveCursor(self.redis).now_ms())
        for shard in ALL_SHARDS:
            self._books[shard.number] = ShardBooks(self.redis, shard, marks.get(shard.number, Mark()), today_ms)

    async def _look(self, books: ShardBooks, tenants: Iterable[Tenant]) -> ShardState:
        if not books.is_open:
            await books.open(self.archive)
        return await books.look([tenant.id for tenant in tenants])

    async def _remember(self, states: dict[int, ShardState], rows: dict[int, list[Row]], asked: DodoComparison) -> None:
        """Closed days of a shard whose every proof holds are not read again."""
        for number, found in rows.items():
            books = self._books[number]
            if not all(row.is_exact for row in found):
                continue
            at, folds = books.closed(states[number])
            dodo_ms, dodo = asked.frozen.get(number, (books.mark.dodo_ms, books.mark.dodo))
            mark = Mark(at, folds, dodo_ms, dodo)
            if (mark.at, mark.dodo_ms) != (books.mark.at, books.mark.dodo_ms):
                await Watermarks(self.redis).keep(Shard(number), mark)
                books.mark = mark
