"""Proofs of a shard's export against its records: every charged nano is acknowledged, waiting or dead.

Pure. Dodo's own sums are compared in ``dodo_proofs``.
"""

from collections import Counter
from collections.abc import Collection, Iterable

from billing.export.events import CHARGE, USAGE, SealedEvent
from billing.reconcile.books import ShardState
from billing.reconcile.fold import Fold
from billing.reconcile.proofs import Row, few

AMOUNT = {CHARGE: "charge_nanos", USAGE: "covered_nanos"}
"""Metadata key of each event name's money."""


def prove_export(state: ShardState, folds: Collection[Fold]) -> list[Row]:
    """Charged = sealed + unsealed, and sealed = acknowledged + waiting + dead, per event name."""
    sums, where = state.sums, f"shard {state.number}"
    sealed: Counter[str] = Counter()
    unsealed: Counter[str] = Counter()
    for one in folds:
        sealed += one.sealed
        unsealed += one.unsealed
    rows = []
    for name, counted, acked, dead in (
        (CHARGE, sums.sealed_charge, sums.acked_charge, sums.dead_charge),
        (USAGE, sums.sealed_covered, sums.acked_covered, sums.dead_covered),
    ):
        charged = sealed[name] + unsealed[name]
        found = acked + nanos_of(state.outbox, name) + dead + unsealed[name]
        faults = []
        if counted != sealed[name]:
            faults.append(f"{where} counts {counted} sealed, its records sum to {sealed[name]}")
        if counted != found - unsealed[name]:
            faults.append(f"{where} counts {counted} sealed, {acked} acknowledged and {dead} dead")
        if dead != nanos_of(state.dead, name):
            faults.append(f"{where} counts {dead} dead, its dead letters sum to {nanos_of(state.dead, name)}")
        if charged or found or faults:
            rows.append(Row(f"exported {name}", "", charged, found, few(faults)))
    return [*rows, *_prove_sealed_entries(state, folds), *_prove_event_count(state), *_prove_events(state)]


def _prove_sealed_entries(state: ShardState, folds: Iterable[Fold]) -> list[Row]:
    there, counted = sum(one.entries - len(one.waiting) for one in folds), state.sums.sealed_entries
    fault = "" if there == counted else f"shard {state.number} sealed {counted} entries, {there} are left"
    return [Row("sealed entries", "", counted, there, fault, "entries")] if there or counted else []


def _prove_event_count(state: ShardState) -> list[Row]:
    sums = state.sums
    there = sums.acked_events + len(state.outbox) + sums.dead_events
    fault = "" if there == sums.sealed_events and sums.dead_events == len(state.dead) else f"shard {state.number}"
    return [Row("sealed events", "", sums.sealed_events, there, fault, "events")] if there or fault else []


def nanos_of(events: Iterable[SealedEvent], name: str) -> int:
    return sum(event.charge_nanos if name == CHARGE else event.covered_nanos for event in events if event.name == name)


def _prove_events(state: ShardState) -> list[Row]:
    """A sealed event carries its money twice: as what is counted and as what is sent."""
    rows = []
    for event in (*state.outbox, *state.dead):
        counted, sent = nanos_of([event], event.name), event.quantities.get(AMOUNT.get(event.name, ""), 0)
        rows.append(Row("sealed event", event.tenant, counted, sent, "" if counted == sent else f"event {event.id}"))
    return rows
