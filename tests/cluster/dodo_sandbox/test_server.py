"""The sandbox as a process, and its pages."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from dodopayments import DodoPayments, UnprocessableEntityError

from cluster.dodo_sandbox.app import create_app
from tests.support.sandbox_world import API_KEY, World, world


@pytest.fixture
def there(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path / "dodo") as running:
        yield running


@contextmanager
def process(state: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server and its URL. The key is in the environment, which ``ps`` does not show."""
    child = subprocess.Popen(
        [sys.executable, "-m", "cluster.dodo_sandbox.server", "--port", "0", "--state", str(state), *arguments],
        env=os.environ | {"DODO_PAYMENTS_API_KEY": API_KEY}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    assert child.stdout is not None
    try:
        yield child, child.stdout.readline().split()[-1]
    finally:
        child.kill()
        child.communicate()


def test_server_starts_and_stops(tmp_path: Path) -> None:
    start = time.monotonic()
    with process(tmp_path) as (child, url):
        httpx.get(f"{url}/_sandbox/health", trust_env=False).raise_for_status()
        # 1.5 s on an idle machine; the rest is for a machine that runs other tests.
        assert time.monotonic() - start < 6
        child.send_signal(signal.SIGTERM)
        assert child.wait(5) in (0, -signal.SIGTERM)


def test_state_survives_a_kill(tmp_path: Path) -> None:
    with process(tmp_path) as (child, url), DodoPayments(base_url=url, bearer_token=API_KEY, max_retries=0) as dodo:
        customer = dodo.customers.create(email="a@example.com", name="Ada").customer_id
        httpx.post(f"{url}/_sandbox/clock", json={"advance_s": 7200}, trust_env=False)
        dodo.usage_events.ingest(events=[{"event_id": "e1", "customer_id": customer, "event_name": "farebox.usage"}])
        child.kill()
        child.wait()
    with process(tmp_path) as (_, url), DodoPayments(base_url=url, bearer_token=API_KEY, max_retries=0) as dodo:
        assert dodo.customers.retrieve(customer).name == "Ada"
        assert dodo.usage_events.retrieve("e1").customer_id == customer
        assert httpx.get(f"{url}/_sandbox/clock", trust_env=False).json()["offset_s"] == 7200


def test_server_names_taken_port_and_missing_key(tmp_path: Path, there: World) -> None:
    port = there.url.rpartition(":")[2]
    command = [sys.executable, "-m", "cluster.dodo_sandbox.server", "--state", str(tmp_path), "--port", port]
    bare = {name: value for name, value in os.environ.items() if name != "DODO_PAYMENTS_API_KEY"}
    taken = subprocess.run([*command, "--api-key", "k"], env=bare, capture_output=True, text=True, timeout=30)
    assert taken.returncode != 0
    assert f"cannot listen on 127.0.0.1:{port}" in taken.stderr
    keyless = subprocess.run(command, env=bare, capture_output=True, text=True, timeout=30)
    assert "the API key is missing" in keyless.stderr


@pytest.mark.parametrize("secret", ["secret", "whsec_", "whsec_!!!!"])
def test_server_refuses_an_invalid_secret(tmp_path: Path, secret: str) -> None:
    with pytest.raises(ValueError, match="whsec_"):
        create_app(tmp_path, api_key=API_KEY, webhook_secret=secret)


def test_log_has_no_key(tmp_path: Path) -> None:
    with process(tmp_path, "--webhook-secret", "whsec_c2VjcmV0") as (child, url):
        with DodoPayments(base_url=url, bearer_token=API_KEY, max_retries=0) as dodo:
            dodo.webhooks.create(url="http://127.0.0.1:9/hook")
            customer = dodo.customers.create(email="a@example.com", name="Ada").customer_id
            assert customer
        child.terminate()
        output, _ = child.communicate(timeout=10)
        assert API_KEY not in output
        assert "whsec_" not in output


def test_checkout_page(there: World) -> None:
    there.control("settings", tax_bps=1000)
    session = there.session(there.customer(), there.pack(500), quantity=2)
    page = there.http.get(f"/checkout/{session}").text
    for text in ("no real money", "Pack x 2", "$10.00", "Tax", "$1.00", "Pay $11.00", "acme@example.com"):
        assert text in page
    assert "<script" not in page
    assert "http://" not in page.replace(there.url, "")


def test_pay_button_pays_once(there: World) -> None:
    session = there.session(there.customer(), there.pack(), return_url="http://127.0.0.1:8000/back?plan=x")
    sent = there.http.post(f"/checkout/{session}/pay", data={"card": "good"})
    payment = there.dodo.payments.list().items[0]
    assert sent.status_code == 303
    back = f"http://127.0.0.1:8000/back?plan=x&payment_id={payment.payment_id}&status=succeeded"
    assert sent.headers["location"] == back
    again = there.http.post(f"/checkout/{session}/pay", data={"card": "good"}, follow_redirects=True)
    assert "Paid $5.00" in again.text
    assert len(there.dodo.payments.list().items) == 1


def test_return_url_must_be_http(there: World) -> None:
    for url in ("javascript:alert(1)", "file:///etc/passwd", "back"):
        with pytest.raises(UnprocessableEntityError):
            there.session(there.customer(), there.pack(), return_url=url)


def test_declined_page_can_be_paid_again(there: World) -> None:
    session = there.session(there.customer(), there.pack())
    declined = there.http.post(f"/checkout/{session}/pay", data={"card": "declined"}, follow_redirects=True)
    assert "The card was declined" in declined.text
    assert "Paid $5.00" in there.http.post(f"/checkout/{session}/pay", follow_redirects=True).text


def test_pages_of_unknown_ids(there: World) -> None:
    for path in ("/checkout/cks_none", "/portal/cus_none"):
        page = there.http.get(path)
        assert page.status_code == 404
        assert "not found" in page.text
    assert there.http.post("/checkout/cks_none/pay").status_code == 404


def test_overview_page(there: World) -> None:
    there.dodo.webhooks.create(url="http://127.0.0.1:9/hook")
    customer = there.dodo.customers.create(email="a@example.com", name="<b>Acme</b>").customer_id
    there.subscribe(customer, there.metered(fixed_price=100))
    there.charge(customer, 1_234_567)
    page = there.http.get("/").text
    for text in ("farebox.charge", "1,234,567", "$1.00", "subscription.active", "&lt;b&gt;", "Pay as you go"):
        assert text in page
    assert "<b>Acme" not in page
    portal = there.http.get(f"/portal/{customer}").text
    assert "Pay as you go" in portal
