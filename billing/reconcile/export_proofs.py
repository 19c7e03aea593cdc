"""What must be equal between a shard's records, its export and Dodo.

Pure: every charged nano is acknowledged, waiting or dead, and Dodo's own sums are what it acknowledged.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

from billing.dodo.wire import DodoEvent, WireError
from billing.export.events import CHARGE, USAGE, SealedEvent
from billing.reconcile.proofs import Fold, Row, few
from billing.store.books import ShardState
from billing.store.stream import order
from billing.usage import TenantId

AMOUNT = {CHARGE: "charge_nanos", USAGE: "covered_nanos"}
"""Metadata key of each event name's money."""


def prove_export(state: ShardState, folds: Iterable[Fold]) -> list[Row]:
    """Charged = sealed + unsealed, and sealed = acknowledged + waiting + dead, per event name."""
    sums, where = state.sums, f"shard {state.number}"
    sealed: Counter[str] = Counter()
    unsealed: Counter[str] = Counter()
    for one in folds:
        sealed += one.sealed
        unsealed += one.unsealed
    rows = []
    for name, said, acked, dead in (
        (CHARGE, sums.sealed_charge, sums.acked_charge, sums.dead_charge),
        (USAGE, sums.sealed_covered, sums.acked_covered, sums.dead_covered),
    ):
        charged = sealed[name] + unsealed[name]
        told = acked + _of(state.outbox, name) + dead + unsealed[name]
        faults = [] if said == sealed[name] else [f"{where} counts {said} sealed, its records say {sealed[name]}"]
        if said != told - unsealed[name]:
            faults.append(f"{where} counts {said} sealed, {acked} acknowledged and {dead} dead")
        if dead != _of(state.dead, name):
            faults.append(f"{where} counts {dead} dead, its dead letters say {_of(state.dead, name)}")
        if charged or told or faults:
            rows.append(Row(f"exported {name}", "", charged, told, few(faults)))
    return [*rows, *_prove_sealed_entries(state), *_prove_event_count(state), *_prove_events(state)]


def _prove_sealed_entries(state: ShardState) -> list[Row]:
    end = order(state.cursor)
    there, counted = sum(order(entry.id) <= end for entry in state.entries), state.sums.sealed_entries
    fault = "" if there == counted else f"shard {state.number} sealed {counted} entries, {there} are left"
    return [Row("sealed entries", "", counted, there, fault, "entries")] if there or counted else []


def _prove_event_count(state: ShardState) -> list[Row]:
    sums = state.sums
    there = sums.acked_events + len(state.outbox) + sums.dead_events
    fault = "" if there == sums.sealed_events and sums.dead_events == len(state.dead) else f"shard {state.number}"
    return [Row("sealed events", "", sums.sealed_events, there, fault, "events")] if there or fault else []


def _of(events: Iterable[SealedEvent], name: str) -> int:
    return sum(event.charge_nanos if name == CHARGE else event.covered_nanos for event in events if event.name == name)


def _prove_events(state: ShardState) -> list[Row]:
    """A sealed event's money stands in it twice: as what is counted and as what is sent."""
    rows = []
    for event in (*state.outbox, *state.dead):
        counted, sent = _of([event], event.name), event.quantities.get(AMOUNT.get(event.name, ""), 0)
        rows.append(Row("sealed event", event.tenant, counted, sent, "" if counted == sent else f"event {event.id}"))
    return rows


def told(state: ShardState, folds: Mapping[TenantId, Fold]) -> dict[TenantId, dict[str, int]]:
    """By tenant and event name, the nanos that Dodo acknowledged."""
    amounts = {tenant: {name: one.sealed[name] for name in AMOUNT} for tenant, one in folds.items()}
    for event in (*state.outbox, *state.dead):
        if event.tenant in amounts and event.name in AMOUNT:
            amounts[event.tenant][event.name] -= _of([event], event.name)
    return amounts


def prove_dodo(
    state: ShardState, tenant: TenantId, acknowledged: Mapping[str, int], events: Iterable[DodoEvent]
) -> list[Row]:
    """Dodo's own sums = what it acknowledged.

    Events in the outbox may have arrived without our knowing: they are left out, and sent again.
    """
    waiting, dead = {event.id for event in state.outbox}, {event.id for event in state.dead}
    counted = {event.id: event for event in events if event.id not in waiting}.values()
    rows = []
    for name, key in AMOUNT.items():
        mine = [event for event in counted if event.name == name]
        faults = [f"event {event.id} is a dead letter here and at Dodo" for event in mine if event.id in dead]
        found = 0
        for event in mine:
            try:
                found += event.quantity(key)
            except WireError as error:
                faults.append(f"event {event.id}: {error}")
        if found != acknowledged[name] and not faults:
            faults.append(f"{len(mine)} events at Dodo")
        if found or acknowledged[name] or faults:
            rows.append(Row(f"dodo {name}", tenant, acknowledged[name], found, few(faults)))
    return rows
