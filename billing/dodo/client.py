"""The real Dodo SDK behind a narrow face: our values in and out, two kinds of failure.

Knows the API's calls and its traps; knows no ledger. Nothing is retried here: whoever calls
has an id and a budget to retry with.
"""

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, Self, TypeVar, cast

import httpx
from dodopayments import (
    APIConnectionError,
    APIResponseValidationError,
    APIStatusError,
    AsyncDodoPayments,
    DefaultAsyncHttpxClient,
    omit,
)
from dodopayments.types import EventInputParam
from dodopayments.types.price_param import PriceParam
from pydantic import BaseModel

from billing.dodo.wire import (
    MS_PER_SECOND,
    Dispute,
    DodoEvent,
    DodoMeter,
    DodoProduct,
    DodoSubscription,
    Payment,
    UsagePeriod,
    Wire,
    WireError,
    to_iso,
)
from billing.errors import DodoMisconfigured, DodoRefused, DodoUnavailable
from billing.tenants import Tenant

TIMEOUT = httpx.Timeout(10.0, connect=3.0)
PAGE = 100
"""Dodo's largest page. The SDK's own iteration skips the second page, so pages are counted here."""
MAX_PAGES = 1_000
TENANT_TAG = "farebox_tenant"
"""Metadata key that says which tenant a Dodo customer is."""
TRANSIENT = (408, 409, 425, 429)
"""Statuses below 500 that a later try may change."""

_UNREADABLE = (APIConnectionError, APIResponseValidationError, httpx.HTTPError, ValueError, TypeError, AttributeError)
"""No answer, or none that the SDK can read: it trips over a list that is no JSON with an AttributeError."""

Environment = Literal["sandbox", "test_mode", "live_mode"]
T = TypeVar("T")


@dataclass(frozen=True)
class DodoSettings:
    """Which Dodo to talk to, and the secrets for it."""

    api_key: str
    webhook_key: str = ""
    environment: Environment = "sandbox"
    base_url: str = ""
    """The sandbox's address; empty for Dodo itself."""

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Read the settings.

        Raises:
            DodoMisconfigured: a variable is missing, or two contradict each other.
        """
        environment = environ.get("FAREBOX_DODO_ENVIRONMENT", "") or "sandbox"
        base_url, api_key = environ.get("DODO_PAYMENTS_BASE_URL", ""), environ.get("DODO_PAYMENTS_API_KEY", "")
        if environment not in ("sandbox", "test_mode", "live_mode"):
            raise DodoMisconfigured(
                f"FAREBOX_DODO_ENVIRONMENT is {environment!r}: set it to sandbox, test_mode or live_mode"
            )
        if (environment == "sandbox") != bool(base_url):
            wanted = "needs DODO_PAYMENTS_BASE_URL" if environment == "sandbox" else "forbids DODO_PAYMENTS_BASE_URL"
            raise DodoMisconfigured(f"FAREBOX_DODO_ENVIRONMENT={environment} {wanted}, the address of a sandbox")
        if not api_key:
            raise DodoMisconfigured("DODO_PAYMENTS_API_KEY is not set: create a key in Dodo's dashboard")
        webhook_key = environ.get("DODO_PAYMENTS_WEBHOOK_KEY", "")
        return cls(api_key, webhook_key, cast(Environment, environment), base_url)


@dataclass(frozen=True, slots=True)
class Event:
    """One usage event. The same ``id`` twice is one event to Dodo, so a re-send keeps id and quantities."""

    id: str
    customer_id: str
    name: str
    timestamp_ms: int
    metadata: Mapping[str, str | int | bool]

    def to_wire(self) -> EventInputParam:
        return {
            "event_id": self.id,
            "customer_id": self.customer_id,
            "event_name": self.name,
            "timestamp": to_iso(self.timestamp_ms),
            "metadata": dict(self.metadata),
        }


@dataclass(frozen=True, slots=True)
class WebhookEndpoint:
    id: str
    url: str


class Dodo:
    """Calls to Dodo. Every method raises ``DodoUnavailable`` or ``DodoRefused`` and nothing else."""

    def __init__(
        self,
        settings: DodoSettings,
        http_client: httpx.AsyncClient | None = None,
        on_call: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """``on_call`` counts a call, before it is made, that asked no budget."""
        if on_call is not None and http_client is None:

            async def count(_: httpx.Request) -> None:
                await on_call()

            http_client = DefaultAsyncHttpxClient(event_hooks={"request": [count]})
        where: dict[str, str] = (
            {"base_url": settings.base_url}
            if settings.environment == "sandbox"
            else {"environment": settings.environment}
        )
        self._sdk = AsyncDodoPayments(
            bearer_token=settings.api_key,
            webhook_key=settings.webhook_key or None,
            timeout=TIMEOUT,
            max_retries=0,
            http_client=http_client,
            **where,  # type: ignore[arg-type]
        )

    async def close(self) -> None:
        await self._sdk.close()

    async def ingest(self, events: Sequence[Event]) -> int:
        """Send up to 1000 events with different ids; the count that Dodo says it took (repeats left out)."""
        assert len({event.id for event in events}) == len(events), "Dodo refuses a call that repeats an id"
        reply = await _call(self._sdk.usage_events.ingest(events=[event.to_wire() for event in events]))
        count = getattr(reply, "ingested_count", None)
        if not isinstance(count, int):  # a proxy's page with status 200, say: nobody took our events
            raise DodoUnavailable(f"no ingested_count in the reply: {str(reply)[:100]!r}")
        return count

    async def has_event(self, event_id: str) -> bool:
        try:
            reply = await _call(self._sdk.usage_events.retrieve(event_id))
        except DodoRefused as refused:
            if refused.status == httpx.codes.NOT_FOUND:
                return False
            raise
        return getattr(reply, "event_id", None) == event_id

    async def events_since(self, name: str, since_ms: int, page: int) -> list[DodoEvent]:
        """One page of all customers' events of a name, numbered from 0; the last one is shorter than ``PAGE``."""
        since = datetime.fromtimestamp(since_ms // MS_PER_SECOND, UTC)
        call = self._sdk.usage_events.list(event_name=name, start=since, page_number=page, page_size=PAGE)
        return [_parse(DodoEvent.read, item) for item in await _items(call)]

    async def create_customer(self, tenant: Tenant) -> str:
        """The id of this tenant's customer: the one that carries its tag, else a new one.

        Raises:
            DodoRefused: Dodo gives the email's customer instead, and its tag is missing or another tenant's.
        """
        for wire in await self._pages(lambda page: self._list_customers(tenant.email, page)):
            if cast(Wire, wire.get("metadata") or {}).get(TENANT_TAG) == tenant.id:
                return str(wire["customer_id"])
        made = await _call(
            self._sdk.customers.create(
                email=tenant.email, name=tenant.name or tenant.id, metadata={TENANT_TAG: tenant.id}
            )
        )
        wire = _wire(made)
        owner = cast(Wire, wire.get("metadata") or {}).get(TENANT_TAG)
        if owner != tenant.id:
            whose = f"tenant {owner}'s" if owner else f"none of ours: it has no {TENANT_TAG} in its metadata"
            raise DodoRefused(409, "CUSTOMER_SHARED", f"the customer of {tenant.email} is {whose}")
        return _text(wire, "customer_id")

    async def checkout(
        self, tenant: Tenant, product_id: str, metadata: Mapping[str, str], return_url: str, quantity: int = 1
    ) -> str:
        """A page where this tenant pays for a product. The tenant has a Dodo customer."""
        assert tenant.dodo_customer_id, "an email would find, or make, somebody else's customer"
        reply = await _call(
            self._sdk.checkout_sessions.create(
                product_cart=[{"product_id": product_id, "quantity": quantity}],
                customer={"customer_id": tenant.dodo_customer_id},
                metadata=dict(metadata),
                return_url=return_url,
            )
        )
        return _text(_wire(reply), "checkout_url")

    async def portal(self, customer_id: str) -> str:
        """A link to Dodo's own page where a customer sees invoices and cancels."""
        return _text(_wire(await _call(self._sdk.customers.customer_portal.create(customer_id))), "link")

    async def retrieve_subscription(self, subscription_id: str) -> DodoSubscription:
        return _read(DodoSubscription.read, await _call(self._sdk.subscriptions.retrieve(subscription_id)))

    async def retrieve_payment(self, payment_id: str) -> Payment:
        return _read(Payment.read, await _call(self._sdk.payments.retrieve(payment_id)))

    async def retrieve_dispute(self, dispute_id: str) -> Dispute:
        return _read(Dispute.read, await _call(self._sdk.disputes.retrieve(dispute_id)))

    async def usage_history(self, subscription_id: str) -> list[UsagePeriod]:
        """Billing periods of a subscription with what each meter consumed."""
        pages = await self._pages(
            lambda page: self._sdk.subscriptions.retrieve_usage_history(
                subscription_id, page_number=page, page_size=PAGE
            )
        )
        return [_parse(UsagePeriod.read, wire) for wire in pages]

    async def meters(self) -> list[DodoMeter]:
        pages = await self._pages(lambda page: self._sdk.meters.list(page_number=page, page_size=PAGE))
        return [_parse(DodoMeter.read, wire) for wire in pages]

    async def create_meter(self, name: str, event_name: str, key: str, unit: str) -> DodoMeter:
        """A meter that sums the metadata value ``key`` of events named ``event_name``."""
        call = self._sdk.meters.create(
            name=name, event_name=event_name, measurement_unit=unit, aggregation={"type": "sum", "key": key}
        )
        return _read(DodoMeter.read, await _call(call))

    async def products(self) -> list[DodoProduct]:
        pages = await self._pages(lambda page: self._sdk.products.list(page_number=page, page_size=PAGE))
        return [_parse(DodoProduct.read, wire) for wire in pages]

    async def retrieve_product(self, product_id: str) -> DodoProduct:
        return _read(DodoProduct.read, await _call(self._sdk.products.retrieve(product_id)))

    async def create_product(self, tag: str, name: str, price: PriceParam) -> DodoProduct:
        call = self._sdk.products.create(name=name, price=price, tax_category="saas", metadata={"farebox": tag})
        return _read(DodoProduct.read, await _call(call))

    async def webhooks(self) -> list[WebhookEndpoint]:
        found: list[WebhookEndpoint] = []
        iterator: str | None = None
        for _ in range(MAX_PAGES):
            reply = _wire(await _call(self._sdk.webhooks.list(limit=PAGE, iterator=iterator or omit)))
            items = cast(Sequence[Wire], reply.get("data") or ())
            found += [WebhookEndpoint(str(item["id"]), str(item["url"])) for item in items]
            iterator = cast(str | None, reply.get("iterator"))
            if reply.get("done") is not False or not iterator:
                break
        return found

    async def create_webhook(self, url: str, idempotency_key: str) -> WebhookEndpoint:
        made = _wire(
            await _call(self._sdk.webhooks.create(url=url, description="farebox", idempotency_key=idempotency_key))
        )
        return WebhookEndpoint(_text(made, "id"), str(made.get("url", url)))

    async def webhook_secret(self, webhook_id: str) -> str:
        return _text(_wire(await _call(self._sdk.webhooks.retrieve_secret(webhook_id))), "secret")

    def _list_customers(self, email: str, page: int) -> Awaitable[object]:
        return self._sdk.customers.list(email=email, page_number=page, page_size=PAGE)

    async def _pages(self, fetch: Callable[[int], Awaitable[object]]) -> list[Wire]:
        """All items of a list that Dodo numbers from page 0."""
        found: list[Wire] = []
        for page in range(MAX_PAGES):
            items = await _items(fetch(page))
            found += items
            if len(items) < PAGE:
                break
        return found


async def _items(call: Awaitable[object]) -> list[Wire]:
    items = _wire(await _call(call)).get("items")
    if not isinstance(items, list):
        raise DodoUnavailable("no items in the reply")
    return cast(list[Wire], items)


async def _call(call: Awaitable[T]) -> T:
    try:
        return await call
    except APIStatusError as error:
        raise _refusal(error) from error
    except _UNREADABLE as error:
        raise DodoUnavailable(f"{type(error).__name__}: {error}") from error


def _refusal(error: APIStatusError) -> DodoUnavailable | DodoRefused:
    body = error.body if isinstance(error.body, dict) else {}
    message = str(body.get("message") or error.message)[:500]
    if error.status_code in TRANSIENT or error.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
        return DodoUnavailable(f"{error.status_code}: {message}", _retry_after(error.response))
    return DodoRefused(error.status_code, str(body.get("code") or ""), message)


def _retry_after(response: httpx.Response) -> float:
    try:
        return max(float(response.headers.get("retry-after", "0")), 0.0)
    except ValueError:
        return 0.0


def _wire(reply: object) -> Wire:
    if not isinstance(reply, BaseModel):
        raise DodoUnavailable(f"no JSON object in the reply: {str(reply)[:100]!r}")
    try:
        return reply.model_dump(mode="json", warnings=False)
    except ValueError as error:
        raise DodoUnavailable(f"unreadable reply: {error}") from error


def _read(read: Callable[[Wire], T], reply: object) -> T:
    return _parse(read, _wire(reply))


def _parse(read: Callable[[Wire], T], wire: Wire) -> T:
    try:
        return read(wire)
    except WireError as error:
        raise DodoUnavailable(f"unreadable reply: {error}") from error


def _text(wire: Wire, name: str) -> str:
    value = wire.get(name)
    if not isinstance(value, str) or not value:
        raise DodoUnavailable(f"no {name} in the reply")
    return value
