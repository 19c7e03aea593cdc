"""A running sandbox with Dodo's SDK as its client, and a merchant that receives its webhooks."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
from dodopayments import DodoPayments
from dodopayments.types import Product, Subscription

from billing.clock import now_ms
from cluster.dodo_sandbox.server import SandboxServer
from tests.support.waiting import eventually

API_KEY = "dodo_test_key"
MONTH = {
    "payment_frequency_count": 1,
    "payment_frequency_interval": "Month",
    "subscription_period_count": 20,
    "subscription_period_interval": "Year",
    "currency": "USD",
    "discount": 0,
    "purchasing_power_parity": False,
}
ONCE = {"type": "one_time_price", "currency": "USD", "discount": 0, "purchasing_power_parity": False}
"""A one-time price but for its amount; Dodo's document requires all of it."""


@dataclass
class Received:
    """One webhook as it arrived."""

    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def type(self) -> str:
        return str(json.loads(self.body)["type"])

    @property
    def data(self) -> dict[str, object]:
        data: dict[str, object] = json.loads(self.body)["data"]
        return data


@dataclass
class Merchant:
    """Receives webhooks; answers each with the next of ``answers``, then with 200."""

    url: str = ""
    received: list[Received] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)

    def types(self) -> list[str]:
        return [one.type for one in self.received]

    def wait(self, count: int) -> list[Received]:
        eventually(lambda: len(self.received) >= count)
        return self.received


@contextmanager
def merchant() -> Iterator[Merchant]:
    listener = Merchant()

    class Listening(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            listener.received.append(Received({k.lower(): v for k, v in self.headers.items()}, body))
            self.send_response(listener.answers.pop(0) if listener.answers else 200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Listening)
    listener.url = f"http://127.0.0.1:{server.server_port}/webhooks/dodo"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield listener
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class World:
    url: str
    dodo: DodoPayments
    http: httpx.Client

    def control(self, path: str, /, **body: object) -> httpx.Response:
        answer = self.http.post(f"/_sandbox/{path}", json=body)
        assert answer.is_success, answer.text
        return answer

    def customer(self, name: str = "Acme") -> str:
        return self.dodo.customers.create(email=f"{name.lower()}@example.com", name=name).customer_id

    def pack(self, cents: int = 500) -> Product:
        price = ONCE | {"price": cents}
        return self.dodo.products.create(name="Pack", price=price, tax_category="saas")

    def meter(self, kind: str = "sum", event_name: str = "farebox.charge") -> str:
        aggregation = {"type": kind} if kind == "count" else {"type": kind, "key": "charge_nanos"}
        return self.dodo.meters.create(
            name="Charges", event_name=event_name, aggregation=aggregation, measurement_unit="nanos"
        ).id

    def metered(self, *meters: dict[str, object], fixed_price: int = 0, **price: object) -> Product:
        """A usage based plan; without meters, one that sums ``charge_nanos`` at a nano of a dollar."""
        priced = meters or ({"meter_id": self.meter(), "price_per_unit": "0.0000001"},)
        terms = MONTH | {"type": "usage_based_price", "fixed_price": fixed_price, "meters": list(priced)} | price
        return self.dodo.products.create(name="Pay as you go", price=terms, tax_category="saas")

    def recurring(self, cents: int = 2000, **price: object) -> Product:
        terms = MONTH | {"type": "recurring_price", "price": cents} | price
        return self.dodo.products.create(name="Pro", price=terms, tax_category="saas")

    def session(self, customer: str, product: Product, quantity: int = 1, **more: object) -> str:
        cart = [{"product_id": product.product_id, "quantity": quantity}]
        return self.dodo.checkout_sessions.create(
            product_cart=cart, customer={"customer_id": customer}, **more
        ).session_id

    def buy(self, customer: str, product: Product, quantity: int = 1, **more: object) -> dict[str, object]:
        paid: dict[str, object] = self.control(f"pay/{self.session(customer, product, quantity, **more)}").json()
        return paid

    def subscribe(self, customer: str, product: Product) -> Subscription:
        return self.dodo.subscriptions.retrieve(str(self.buy(customer, product)["subscription_id"]))

    def charge(self, customer: str, *nanos: int, prefix: str = "e") -> None:
        events = [
            {
                "event_id": f"{prefix}{number}",
                "customer_id": customer,
                "event_name": "farebox.charge",
                "metadata": {"charge_nanos": one},
            }
            for number, one in enumerate(nanos)
        ]
        self.dodo.usage_events.ingest(events=events)

    def days(self, days: float) -> None:
        self.control("clock", advance_s=days * 86_400)

    def payments(self, customer: str) -> Sequence[object]:
        return self.dodo.payments.list(customer_id=customer, page_size=100).items


@contextmanager
def world(state_dir: Path, webhook_secret: str | None = None) -> Iterator[World]:
    """A sandbox with its state in ``state_dir``. The SDK raises for an answer that does not fit its types."""
    with (
        SandboxServer(state_dir, API_KEY, webhook_secret=webhook_secret, clock=now_ms) as server,
        httpx.Client(base_url=server.url, trust_env=False) as http,
        DodoPayments(
            base_url=server.url, bearer_token=API_KEY, max_retries=0, timeout=5, _strict_response_validation=True
        ) as dodo,
    ):
        yield World(server.url, dodo, http)
