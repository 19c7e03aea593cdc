"""Faults on demand: what the caller gets, and whether the work was done."""

import time
from collections.abc import Iterator
from pathlib import Path

import dodopayments
import httpx
import pytest

from cluster.dodo_sandbox.app import create_app
from tests.support.sandbox_world import API_KEY, World, world


@pytest.fixture
def there(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path / "dodo") as running:
        yield running


def ingest(there: World, customer: str, event_id: str = "e") -> int:
    event = {"event_id": event_id, "customer_id": customer, "event_name": "farebox.usage"}
    return there.dodo.usage_events.ingest(events=[event], timeout=0.5).ingested_count


def stored(there: World) -> int:
    return len(there.http.get("/_sandbox/events").json())


@pytest.mark.parametrize(
    ("kind", "seen", "done"),
    [
        ("status:500", dodopayments.InternalServerError, 0),
        ("status:429", dodopayments.RateLimitError, 0),
        ("status:401", dodopayments.AuthenticationError, 0),
        ("status:413", dodopayments.APIStatusError, 0),
        ("status_after:503", dodopayments.InternalServerError, 1),
        ("drop_before", dodopayments.APIConnectionError, 0),
        ("drop_after", dodopayments.APIConnectionError, 1),
        ("timeout_after_commit", dodopayments.APITimeoutError, 1),
        ("garbage", dodopayments.APIResponseValidationError, 1),
    ],
)
def test_each_kind_of_fault(there: World, kind: str, seen: type[Exception], done: int) -> None:
    customer = there.customer()
    there.control("faults", path="/events/ingest", kinds=[kind])
    with pytest.raises(seen):
        ingest(there, customer)
    assert stored(there) == done
    there.http.delete("/_sandbox/faults")
    assert ingest(there, customer) == 1
    assert stored(there) == 1


def test_dropped_connection_has_no_answer(there: World) -> None:
    there.control("faults", kinds=["drop_before"])
    with pytest.raises(httpx.RemoteProtocolError):
        there.http.get("/customers")


def test_latency_delays_the_answer(there: World) -> None:
    there.control("faults", path="/customers", kinds=["latency:0.3"])
    start = time.monotonic()
    there.customer()
    assert 0.3 <= time.monotonic() - start < 3


def test_fault_is_limited_to_path_method_and_count(there: World) -> None:
    there.control("faults", path="/customers", method="POST", kinds=["status:500"], count=2)
    for _ in range(2):
        with pytest.raises(dodopayments.InternalServerError):
            there.customer()
        there.dodo.customers.list()
    there.customer()
    assert there.http.get("/_sandbox/faults").json()[0]["hits"] == 2


def test_fault_rate(there: World) -> None:
    customer = there.customer()
    kinds = ["status:500", "drop_before", "drop_after", "status_after:500"]
    there.control("faults", path="/events/ingest", rate=0.6, kinds=kinds)
    failures = 0
    for number in range(60):
        while True:
            try:
                ingest(there, customer, f"e{number}")
                break
            except (dodopayments.InternalServerError, dodopayments.APIConnectionError):
                failures += 1
    assert stored(there) == 60
    assert 30 < failures < 240


def test_faults_spare_control_routes_and_pages(there: World) -> None:
    there.control("faults", path="*", kinds=["status:500"])
    assert there.http.get("/").status_code == 200
    assert there.http.get("/_sandbox/health").status_code == 200
    assert there.http.get("/checkout/cks_none").status_code == 404


async def test_drop_without_a_server_raises(tmp_path: Path) -> None:
    app = create_app(tmp_path, api_key=API_KEY)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://sandbox") as client:
        await client.post("/_sandbox/faults", json={"kinds": ["drop_before"]})
        with pytest.raises(ConnectionAbortedError):
            await client.get("/customers")
    app.state.sandbox.store.close()
