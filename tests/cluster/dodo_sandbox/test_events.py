"""Usage events: Dodo's limits, on both sides of each boundary, and meters."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import dodopayments
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.dodo_sandbox.cycle import priced_usage
from cluster.dodo_sandbox.meters import Aggregation, Filter, Meter, units
from cluster.dodo_sandbox.subscriptions import SubscribedMeter
from tests.support.sandbox_world import API_KEY, World, world

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def there(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path / "dodo") as running:
        yield running


def event(customer: str, event_id: str = "e", **more: object) -> dict[str, object]:
    return {"event_id": event_id, "customer_id": customer, "event_name": "farebox.usage"} | more


def refused(there: World, *events: dict[str, object]) -> str:
    with pytest.raises(dodopayments.BadRequestError) as error:
        there.dodo.usage_events.ingest(events=events)
    return str(error.value.body["code"])


def taken(there: World, *events: dict[str, object]) -> int:
    return there.dodo.usage_events.ingest(events=events).ingested_count


def stored(there: World) -> int:
    return len(there.http.get("/_sandbox/events").json())


def test_request_has_1_to_1000_events(there: World) -> None:
    customer = there.customer()
    assert refused(there) == "INVALID_REQUEST_PARAMETERS"
    assert taken(there, *(event(customer, f"e{n}") for n in range(1000))) == 1000
    assert refused(there, *(event(customer, f"f{n}") for n in range(1001))) == "INVALID_REQUEST_PARAMETERS"
    assert stored(there) == 1000


def test_duplicate_id_fails_the_request(there: World) -> None:
    customer = there.customer()
    assert refused(there, event(customer, "a"), event(customer, "b"), event(customer, "a")) == "DUPLICATE_EVENT_ID"
    assert stored(there) == 0


def test_known_id_is_ignored(there: World) -> None:
    customer = there.customer()
    taken(there, event(customer, "a", metadata={"n": 1}))
    taken(there, event(customer, "a", metadata={"n": 999}), event(customer, "b", metadata={"n": 2}))
    assert there.http.get("/_sandbox/sums").json() == {customer: {"farebox.usage": {"events": 2, "n": 3}}}
    assert there.dodo.usage_events.retrieve("a").metadata == {"n": 1}


@pytest.mark.parametrize(
    ("offset", "accepted"),
    [
        (timedelta(minutes=-59), True),
        (timedelta(minutes=-61), False),
        (timedelta(minutes=4), True),
        (timedelta(minutes=6), False),
    ],
)
def test_timestamp_window(there: World, offset: timedelta, accepted: bool) -> None:
    customer = there.customer()
    late = event(customer, "late", timestamp=(datetime.now(UTC) + offset).isoformat())
    if accepted:
        assert taken(there, late) == 1
        return
    assert refused(there, event(customer, "good"), late) == "INVALID_TIMESTAMP"
    assert stored(there) == 0


def test_timestamp_window_follows_the_clock(there: World) -> None:
    customer = there.customer()
    there.days(2)
    assert refused(there, event(customer, timestamp=datetime.now(UTC).isoformat())) == "INVALID_TIMESTAMP"
    moved = datetime.now(UTC) + timedelta(days=2)
    assert taken(there, event(customer, timestamp=moved.isoformat())) == 1
    assert taken(there, event(customer, "now")) == 1
    assert abs(there.dodo.usage_events.retrieve("now").timestamp - moved) < timedelta(minutes=1)


@pytest.mark.parametrize(
    ("metadata", "accepted"),
    [
        ({f"k{n}": n for n in range(50)}, True),
        ({f"k{n}": n for n in range(51)}, False),
        ({"k" * 100: 1}, True),
        ({"k" * 101: 1}, False),
        ({"k": "v" * 500}, True),
        ({"k": "v" * 501}, False),
        ({"k": 2**63 - 1, "f": 0.5, "b": True, "s": "x"}, True),
        ({"k": 2**63}, False),
        (None, True),
    ],
)
def test_metadata_limits(there: World, metadata: dict[str, object] | None, accepted: bool) -> None:
    customer = there.customer()
    if accepted:
        taken(there, event(customer, metadata=metadata))
        # Read raw: the SDK's type for a number is float, which rounds what 64 bits hold.
        assert there.http.get("/_sandbox/events").json()[0]["metadata"] == metadata
        return
    assert refused(there, event(customer, metadata=metadata)) == "INVALID_METADATA"


@pytest.mark.parametrize(
    "bad",
    [
        {"metadata": {"nested": {"a": 1}}},
        {"metadata": {"list": [1]}},
        {"metadata": {"none": None}},
        {"event_id": 5},
        {"event_name": ""},
        {"timestamp": "yesterday"},
    ],
)
def test_invalid_event_is_422(there: World, bad: dict[str, object]) -> None:
    body = {"events": [event(there.customer()) | bad]}
    answer = there.http.post("/events/ingest", json=body, headers={"authorization": f"Bearer {API_KEY}"})
    assert answer.status_code == 422
    assert stored(there) == 0


def test_unknown_customer_fails_the_request(there: World) -> None:
    assert refused(there, event(there.customer(), "a"), event("cus_none", "b")) == "CUSTOMER_NOT_FOUND"
    assert stored(there) == 0


def test_event_filters(there: World) -> None:
    ada, bob = there.customer("Ada"), there.customer("Bob")
    meter = there.dodo.meters.create(
        name="big",
        event_name="farebox.usage",
        measurement_unit="u",
        aggregation={"type": "count"},
        filter={"conjunction": "and", "clauses": [{"key": "n", "operator": "greater_than", "value": 2}]},
    ).id
    start = datetime.now(UTC) - timedelta(minutes=30)
    events = [event(ada, f"a{n}", metadata={"n": n}, timestamp=start + timedelta(minutes=n)) for n in range(5)]
    taken(there, *events, event(bob, "b0", event_name="farebox.charge"))
    found = there.dodo.usage_events.list
    assert [one.event_id for one in found(customer_id=ada).items] == ["a4", "a3", "a2", "a1", "a0"]
    assert [one.event_id for one in found(event_name="farebox.charge").items] == ["b0"]
    assert [one.event_id for one in found(meter_id=meter).items] == ["a4", "a3"]
    assert [one.event_id for one in found(customer_id=ada, page_size=2, page_number=1).items] == ["a2", "a1"]
    cut = found(customer_id=ada, start=start + timedelta(minutes=1), end=start + timedelta(minutes=3))
    assert [one.event_id for one in cut.items] == ["a2", "a1"]
    with pytest.raises(dodopayments.BadRequestError):
        found(meter_id=meter, event_name="farebox.charge")


def test_sums_are_exact(there: World) -> None:
    customer = there.customer()
    taken(there, event(customer, "a", metadata={"n": 2**62}), event(customer, "b", metadata={"n": 2**62 + 1, "x": "9"}))
    assert there.http.get("/_sandbox/sums").json()[customer]["farebox.usage"] == {"events": 2, "n": 2**63 + 1}


def meter(kind: str, filter_: Filter | None = None) -> Meter:
    aggregation = Aggregation.model_validate({"type": kind, "key": None if kind == "count" else "n"})
    return Meter(
        id="m", aggregation=aggregation, created_at=NOW, updated_at=NOW, event_name="e", measurement_unit="u",
        name="m", filter=filter_,
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "expected"), [("count", 4), ("sum", 11), ("max", 7), ("last", 1)])
def test_meter_counts_only_numbers(kind: str, expected: int) -> None:
    assert units(meter(kind), [{"n": 3}, {"n": 7}, {"n": "100"}, {"n": 1}]) == expected


@pytest.mark.parametrize(
    ("operator", "value", "admitted"),
    [
        ("equals", "gold", ["gold"]),
        ("not_equals", "gold", ["silver", "5"]),
        ("contains", "ol", ["gold"]),
        ("does_not_contain", "ol", ["silver", "5"]),
        ("greater_than", 4, []),
    ],
)
def test_filter_needs_the_property(operator: str, value: object, admitted: list[str]) -> None:
    clauses = [{"key": "tier", "operator": operator, "value": value}]
    filter_ = Filter.model_validate({"conjunction": "and", "clauses": clauses})
    tiers = ["gold", "silver", "5"]
    assert [tier for tier in tiers if filter_.admits({"tier": tier})] == admitted
    assert not filter_.admits({"other": "gold"})


def test_nested_filters() -> None:
    low = {"key": "n", "operator": "less_than_or_equals", "value": 1}
    high = {"key": "n", "operator": "greater_than_or_equals", "value": 9}
    on = {"conjunction": "and", "clauses": [{"key": "on", "operator": "equals", "value": True}]}
    both = {"conjunction": "and", "clauses": [{"conjunction": "or", "clauses": [low, high]}, on]}
    filter_ = Filter.model_validate(both)
    assert [n for n in range(11) if filter_.admits({"n": n, "on": True})] == [0, 1, 9, 10]
    assert not filter_.admits({"n": 0, "on": False})


@given(nanos=st.integers(0, 2**63), free=st.integers(0, 2**40))
def test_cost_of_a_period(nanos: int, free: int) -> None:
    priced = SubscribedMeter(
        currency="USD", free_threshold=free, measurement_unit="nanos", meter_id="m", name="m",
        price_per_unit="0.0000001",
    )  # fmt: skip
    billed = priced_usage(priced, Decimal(nanos))
    assert billed.total_price == (max(nanos - free, 0) + 5_000_000) // 10_000_000
    assert billed.chargeable_units == str(max(nanos - free, 0))
