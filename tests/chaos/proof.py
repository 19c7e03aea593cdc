"""What must hold at the end of a scenario: each receipt is in the books once, and all books have the same sums."""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from billing.dodo.call_budget import CallBudget
from billing.reconcile.books import ShardReader
from billing.reconcile.reconciler import Reconciler
from billing.store.keys import ALL_SHARDS
from billing.usage import UsageRecord
from tests.chaos.table import Row
from tests.support.world import World, is_clear

LEASES_S = 60.0
FLUSHES = 50


@dataclass(frozen=True)
class Books:
    """All usage records in the order of their streams, and the sum of the differences between the books."""

    records: tuple[UsageRecord, ...]
    difference_nanos: int

    def row(self, name: str, tries: int, receipts: Mapping[str, int]) -> Row:
        """``receipts``: the cost that each receipt said, by record id."""
        charged = {record.record_id: int(record.charged_nanos) for record in self.records}
        lost = [id_ for id_, cost in receipts.items() if charged.get(id_) != cost]
        if lost:
            print(f"{name}: not in the books as the receipt said: {lost[:5]}", file=sys.stderr)
        counts = Counter(record.record_id for record in self.records)
        return Row(name, tries, len(lost), sum(count - 1 for count in counts.values()), self.difference_nanos)


async def close_books(world: World) -> Books:
    """Expire open holds, export everything, and prove the store, its streams and Dodo against each other."""
    await _expire_all(world)
    await _flush_all(world)
    report = await Reconciler(world.redis, world.dodo, None, CallBudget(1_000_000)).run()
    assert not report.unproven, report.unproven
    for fault in report.faults:
        print(f"difference: {fault}", file=sys.stderr)
    miscounted = [fault for fault in report.faults if not fault.difference or fault.unit != "nanos"]
    assert not miscounted, f"differences that are not nanos: {miscounted[:5]}"
    return Books(await records_of(world), sum(abs(fault.difference) for fault in report.faults))


async def records_of(world: World) -> tuple[UsageRecord, ...]:
    found: list[UsageRecord] = []
    for shard in ALL_SHARDS:
        state = await ShardReader(world.redis, shard).read(())
        found += [entry.record() for entry in state.entries if entry.is_usage]
    return tuple(found)


async def _expire_all(world: World) -> None:
    """Expire holds, as the billing actor does every few seconds, until none is open."""
    deadline = time.monotonic() + LEASES_S
    while await world.ledger.open_holds():
        assert time.monotonic() < deadline, "a hold is open after its lease"
        await world.ledger.expire()
        await asyncio.sleep(0.1)


async def _flush_all(world: World) -> None:
    exporter = world.exporter(1_000_000)
    for _ in range(FLUSHES):
        await exporter.flush_once(force=True)
        if is_clear(await exporter.outbox.backlog()):
            return
    raise AssertionError(f"the backlog did not drain: {await exporter.outbox.backlog()}")
