"""Usage events: ingestion with Dodo's limits, and reading them back.

From the docstring of the SDK's ``usage_events.ingest``: a request has at most 1000 events; a duplicate ``event_id`` in
it fails the whole request; an event with a known id is ignored; an event older than an hour or more than five minutes
ahead is refused. Not documented, and chosen here: an unknown customer fails the whole request, and ``ingested_count``
also counts ignored events.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr

from cluster.dodo_sandbox.customers import CustomerRecord
from cluster.dodo_sandbox.errors import ApiError, bad_request, not_found
from cluster.dodo_sandbox.meters import Meter, meter_of
from cluster.dodo_sandbox.state import Sandbox, SandboxDep
from cluster.dodo_sandbox.store import Store
from cluster.dodo_sandbox.wire import BUSINESS_ID, Metadata, Page, Paging, UtcTime, Wire, metadata_fault, to_ms

EVENTS_MAX = 1000
OLDEST = timedelta(hours=1)
NEWEST = timedelta(minutes=5)

router = APIRouter()

Value = StrictStr | StrictInt | StrictFloat | StrictBool


class EventInput(Wire):
    event_id: Annotated[str, Field(min_length=1)]
    customer_id: Annotated[str, Field(min_length=1)]
    event_name: Annotated[str, Field(min_length=1)]
    timestamp: UtcTime | None = None
    metadata: dict[str, Value] | None = None


class IngestRequest(Wire):
    events: list[EventInput]


class IngestResponse(Wire):
    ingested_count: int


class Event(Wire):
    business_id: str = BUSINESS_ID
    customer_id: str
    event_id: str
    event_name: str
    timestamp: datetime
    metadata: dict[str, Value] | None = None


class EventFilter(Paging):
    customer_id: str | None = None
    event_name: str | None = None
    meter_id: str | None = None
    start: UtcTime | None = None
    end: UtcTime | None = None


@dataclass
class Sum:
    """One customer's events of one name: how many, and the sum of each numeric metadata key."""

    events: int
    totals: dict[str, int | float]


@router.post("/events/ingest")
async def ingest(request: IngestRequest, sandbox: SandboxDep) -> IngestResponse:
    now = sandbox.clock.now()
    check_batch(request.events, now)
    for customer_id in {event.customer_id for event in request.events}:
        if sandbox.store.get(CustomerRecord, customer_id) is None:
            raise not_found_in_batch(customer_id)
    stamped = [event_at(event, now) for event in request.events]
    with sandbox.store.transaction():
        sandbox.store.db.executemany(
            "INSERT OR IGNORE INTO events (event_id, customer_id, event_name, timestamp_ms, ingested_ms, body)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            [
                (e.event_id, e.customer_id, e.event_name, to_ms(e.timestamp), to_ms(now), e.model_dump_json())
                for e in stamped
            ],
        )
    return IngestResponse(ingested_count=len(stamped))


def not_found_in_batch(customer_id: str) -> ApiError:
    return bad_request(f"Customer {customer_id} not found", "CUSTOMER_NOT_FOUND")


def event_at(event: EventInput, now: datetime) -> Event:
    return Event(
        customer_id=event.customer_id,
        event_id=event.event_id,
        event_name=event.event_name,
        timestamp=event.timestamp or now,
        metadata=event.metadata,
    )


def check_batch(events: Sequence[EventInput], now: datetime) -> None:
    """Raises ApiError 400 for a request that Dodo refuses as a whole."""
    if not 1 <= len(events) <= EVENTS_MAX:
        raise bad_request(f"A request has 1 to {EVENTS_MAX} events, this one has {len(events)}")
    seen: set[str] = set()
    for event in events:
        if event.event_id in seen:
            raise bad_request(f"Duplicate event_id {event.event_id} in one request", "DUPLICATE_EVENT_ID")
        seen.add(event.event_id)
        if event.timestamp is not None and not now - OLDEST <= event.timestamp <= now + NEWEST:
            raise bad_request(
                f"Timestamp of {event.event_id} is older than 1 hour or more than 5 minutes ahead", "INVALID_TIMESTAMP"
            )
        if event.metadata is not None and (fault := metadata_fault(event.metadata)):
            raise bad_request(f"Event {event.event_id}: {fault}", "INVALID_METADATA")


@router.get("/events")
async def list_events(filters: Annotated[EventFilter, Query()], sandbox: SandboxDep) -> Page[Event]:
    """The newest first."""
    name, meter = filters.event_name, None
    if filters.meter_id is not None:
        meter = meter_of(sandbox, filters.meter_id)
        if name is not None and name != meter.event_name:
            raise bad_request(f"event_name {name} is not the meter's, {meter.event_name}")
        name = meter.event_name
    if meter is None or meter.filter is None:
        return Page(items=_page(sandbox.store, filters, name))
    found = select(sandbox.store, filters.customer_id, name, filters.start, filters.end)
    return filters.of([event for event in found if meter.filter.admits(event.metadata or {})][::-1])


def _page(store: Store, filters: EventFilter, event_name: str | None) -> list[Event]:
    """Read one page only: there may be very many events."""
    rows = store.db.execute(
        f"SELECT body FROM events WHERE {_WANTED} ORDER BY timestamp_ms DESC, seq DESC LIMIT ?5 OFFSET ?6",
        (
            *_wanted(filters.customer_id, event_name, filters.start, filters.end),
            filters.page_size,
            filters.page_number * filters.page_size,
        ),
    )
    return [Event.model_validate_json(body) for (body,) in rows]


@router.get("/events/{event_id}")
async def retrieve_event(event_id: str, sandbox: SandboxDep) -> Event:
    row = sandbox.store.db.execute("SELECT body FROM events WHERE event_id = ?", (event_id,)).fetchone()
    if row is None:
        raise not_found("event", event_id)
    return Event.model_validate_json(row[0])


def select(
    store: Store, customer_id: str | None, event_name: str | None, start: datetime | None, end: datetime | None
) -> list[Event]:
    """Events with ``start <= timestamp < end``, the oldest first."""
    rows = store.db.execute(
        f"SELECT body FROM events WHERE {_WANTED} ORDER BY timestamp_ms, seq",
        _wanted(customer_id, event_name, start, end),
    )
    return [Event.model_validate_json(body) for (body,) in rows]


_WANTED = (
    "(?1 IS NULL OR customer_id = ?1) AND (?2 IS NULL OR event_name = ?2)"
    " AND (?3 IS NULL OR timestamp_ms >= ?3) AND (?4 IS NULL OR timestamp_ms < ?4)"
)


def _wanted(
    customer_id: str | None, event_name: str | None, start: datetime | None, end: datetime | None
) -> tuple[str | None, str | None, int | None, int | None]:
    return customer_id, event_name, None if start is None else to_ms(start), None if end is None else to_ms(end)


def counted_metadata(
    sandbox: Sandbox, meter: Meter, customer_id: str, start: datetime, end: datetime
) -> list[Metadata]:
    """The metadata of one customer's events in a period that have the meter's name."""
    return [event.metadata or {} for event in select(sandbox.store, customer_id, meter.event_name, start, end)]


def sums(store: Store) -> dict[str, dict[str, Sum]]:
    """Per customer and event name, over every stored event; whole numbers are added exactly."""
    result: dict[str, dict[str, Sum]] = {}
    for customer_id, event_name, metadata in _metadata_of_all(store):
        total = result.setdefault(customer_id, {}).setdefault(event_name, Sum(0, {}))
        total.events += 1
        for key, value in metadata.items():
            if not isinstance(value, str | bool):
                total.totals[key] = total.totals.get(key, 0) + value
    return result


def _metadata_of_all(store: Store) -> Iterator[tuple[str, str, Metadata]]:
    rows = store.db.execute("SELECT customer_id, event_name, body FROM events ORDER BY customer_id, event_name, seq")
    for customer_id, event_name, body in rows:
        yield customer_id, event_name, json.loads(body)["metadata"] or {}
