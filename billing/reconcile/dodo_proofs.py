"""Proofs of what Dodo has against what a shard's export counts as acknowledged.

Pure. The store is read first and Dodo after: events sent meanwhile are recognised by their windows and left out.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Self

from billing.dodo.fields import WireError
from billing.dodo.wire import DodoEvent, UsagePeriod
from billing.export.events import CHARGE
from billing.ledger.journal import order
from billing.money import divide_up
from billing.reconcile.books import ShardState
from billing.reconcile.export_proofs import AMOUNT, nanos_of
from billing.reconcile.fold import Fold, Place
from billing.reconcile.proofs import Row, few
from billing.usage import TenantId

NANOS_PER_CENT = 10_000_000


@dataclass(frozen=True, slots=True)
class ShardExport:
    """One shard's export at one moment."""

    cursor: Place
    waiting: frozenset[str]
    """Ids in the outbox: Dodo may have them without our knowing; they are sent again."""
    dead: frozenset[str]
    acknowledged: Mapping[TenantId, Mapping[str, int]]
    """By tenant and event name, in nanos."""

    def counts(self, event: DodoEvent) -> bool:
        """Was it acknowledged at that moment, by its window and the outbox?"""
        return event.id not in self.waiting and (event.until is None or event.until <= self.cursor)


def export_of(state: ShardState, folds: Mapping[TenantId, Fold]) -> ShardExport:
    amounts = {tenant: {name: one.sealed[name] for name in AMOUNT} for tenant, one in folds.items()}
    for event in (*state.outbox, *state.dead):
        if event.tenant in amounts and event.name in AMOUNT:
            amounts[event.tenant][event.name] -= nanos_of([event], event.name)
    return ShardExport(
        cursor=order(state.cursor),
        waiting=frozenset(event.id for event in state.outbox),
        dead=frozenset(event.id for event in state.dead),
        acknowledged=amounts,
    )


@dataclass(frozen=True, slots=True)
class Frozen:
    """One tenant's events that Dodo dates before the watermark: they were proved, and nothing can be added to them."""

    nanos: Mapping[str, int] = field(default_factory=dict)
    """By event name."""
    periods: Mapping[int, int] = field(default_factory=dict)
    """By start of a billing period in Unix milliseconds, the nanos to charge."""

    def to_wire(self) -> dict[str, object]:
        return {"nanos": dict(self.nanos), "periods": {str(start): nanos for start, nanos in self.periods.items()}}

    @classmethod
    def read(cls, raw: Mapping[str, Mapping[str, int]]) -> Self:
        return cls(raw["nanos"], {int(start): nanos for start, nanos in raw["periods"].items()})


@dataclass(frozen=True, slots=True)
class TenantAtDodo:
    """What Dodo has of one tenant: its events since the watermark, and what its subscription's meter counted."""

    events: Sequence[DodoEvent]
    since_ms: int
    frozen: Frozen
    meter_id: str
    periods: Sequence[UsagePeriod] = ()

    def charged_in(self, start_ms: int, end_ms: int) -> int | None:
        """Nanos to charge dated in a billing period; ``None`` where it began before the watermark, not stored."""
        if start_ms < self.since_ms and start_ms not in self.frozen.periods:
            return None
        mine = [e for e in self.events if e.name == CHARGE and max(start_ms, self.since_ms) <= e.at_ms < end_ms]
        return self.frozen.periods.get(start_ms, 0) + sum(_amount(event, AMOUNT[CHARGE], []) for event in mine)

    def freeze(self, until_ms: int) -> Frozen:
        """The next watermark's sums. Everything dated before ``until_ms`` counts: see ``may_freeze``."""
        nanos = Counter(self.frozen.nanos)
        for event in self.events:
            if event.name in AMOUNT and event.at_ms < until_ms:
                nanos[event.name] += _amount(event, AMOUNT[event.name], [])
        periods = {
            period.start_ms: charged
            for period in self.periods
            if period.start_ms < until_ms < period.end_ms + KEPT_MS
            and (charged := self.charged_in(period.start_ms, min(period.end_ms, until_ms))) is not None
        }
        return Frozen(dict(nanos), periods)

    def may_freeze(self, at: ShardExport, until_ms: int) -> bool:
        """An event that is dated before and was not acknowledged would not be looked at later."""
        return all(at.counts(event) for event in self.events if event.at_ms < until_ms)


KEPT_MS = 100 * 24 * 3_600_000
"""How long after its end a billing period's sum is kept."""


def prove_events(at: ShardExport, tenant: TenantId, dodo: TenantAtDodo) -> list[Row]:
    """Dodo's own sums = what it acknowledged."""
    counted = [event for event in dodo.events if at.counts(event)]
    acknowledged = at.acknowledged.get(tenant, {})
    rows = []
    for name, key in AMOUNT.items():
        mine = [event for event in counted if event.name == name]
        faults = [f"event {event.id} is a dead letter here and at Dodo" for event in mine if event.id in at.dead]
        found = dodo.frozen.nanos.get(name, 0) + sum(_amount(event, key, faults) for event in mine)
        expected = acknowledged.get(name, 0)
        if found != expected and not faults:
            faults.append(_newest(mine, dodo.since_ms))
        if found or expected or faults:
            rows.append(Row(f"dodo {name}", tenant, expected, found, few(faults)))
    return rows


def prove_periods(tenant: TenantId, dodo: TenantAtDodo, now_ms: int) -> list[Row]:
    """Dodo's meter = the events of the billing period, and a closed period's price = the meter, to the cent."""
    rows = []
    for period in dodo.periods:
        day = _day(period.start_ms)
        counted = period.units.get(dodo.meter_id, 0)
        events = dodo.charged_in(period.start_ms, period.end_ms)
        if events is not None:
            fault = "" if events == counted else f"the meter of the period from {day}"
            rows.append(Row("dodo meter", tenant, events, counted, fault))
        if period.end_ms <= now_ms and dodo.meter_id in period.cents:
            rows.append(_prove_invoice(tenant, day, counted if events is None else events, period.cents[dodo.meter_id]))
    return rows


def _prove_invoice(tenant: TenantId, day: str, nanos: int, cents: int) -> Row:
    """Within one minor unit of what was used, whichever way Dodo rounds."""
    due = divide_up(nanos, NANOS_PER_CENT)
    fault = "" if abs(cents - due) <= 1 else f"the invoice of the period from {day}"
    return Row("invoice", tenant, due, cents, fault, "cents", tolerance=1)


def _amount(event: DodoEvent, key: str, faults: list[str]) -> int:
    try:
        return event.quantity(key)
    except WireError as error:
        faults.append(f"event {event.id}: {error}")
        return 0


def _newest(events: Sequence[DodoEvent], since_ms: int) -> str:
    since = f" since {_day(since_ms)}" if since_ms else ""
    newest = max(events, key=lambda event: event.at_ms, default=None)
    return f"{len(events)} events at Dodo{since}" + (f", the newest {newest.id}" if newest else "")


def by_customer(events: Iterable[DodoEvent]) -> dict[str, list[DodoEvent]]:
    """Each event once, whatever page it stood on."""
    found: dict[str, dict[str, DodoEvent]] = {}
    for event in events:
        found.setdefault(event.customer_id, {})[event.id] = event
    return {customer: list(mine.values()) for customer, mine in found.items()}


def _day(ms: int) -> str:
    return datetime.fromtimestamp(ms // 1_000, UTC).strftime("%Y-%m-%d")
