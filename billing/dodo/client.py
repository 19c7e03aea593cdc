"""Call Dodo Payments through its SDK: values of our own in and out, and two kinds of failure.

Nothing is retried here: the caller has an id and a budget to retry with.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, cast

import httpx
from dodopayments import AsyncDodoPayments, DefaultAsyncHttpxClient, omit
from dodopayments.types import EventInputParam
from dodopayments.types.attach_product_entitlement_param import AttachProductEntitlementParam
from dodopayments.types.price_param import PriceParam
from dodopayments.types.refund_create_params import Item as RefundItem

from billing.dodo.errors import DodoRefused, DodoUnavailable
from billing.dodo.fields import MS_PER_SECOND, Wire, inner, text, to_iso
from billing.dodo.reply import answered, as_wire, listed, parsed, read_as, readable, text_in
from billing.dodo.settings import DodoSettings
from billing.dodo.wire import (
    BalanceLine,
    Dispute,
    DodoCustomer,
    DodoEvent,
    DodoMeter,
    DodoProduct,
    DodoSubscription,
    Invoice,
    InvoiceLine,
    LicenceGrant,
    Payment,
    PlanQuote,
    Refund,
    UsagePeriod,
)
from billing.tenants.tenant import Tenant

TIMEOUT = httpx.Timeout(10.0, connect=3.0)
PAGE = 100
"""Dodo's largest page. The SDK's own iteration skips the second page, so pages are counted here."""
MAX_PAGES = 1_000
TENANT_TAG = "farebox_tenant"
"""Metadata key that says which tenant a Dodo customer is."""
PRORATION: Literal["prorated_immediately"] = "prorated_immediately"
"""How Dodo prices a change of plan: what is left of the period is taken off the new plan's first fee."""


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
        """``on_call`` counts each call before it is made, for callers that take none from a budget."""
        if on_call is not None and http_client is None:

            async def count(_: httpx.Request) -> None:
                await on_call()

            http_client = DefaultAsyncHttpxClient(event_hooks={"request": [count]})
        where: dict[str, str] = (
            {"base_url": settings.base_url} if settings.base_url else {"environment": settings.environment}
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
        reply = await answered(self._sdk.usage_events.ingest(events=[event.to_wire() for event in events]))
        count = getattr(reply, "ingested_count", None)
        if not isinstance(count, int):  # a proxy's page with status 200, say: Dodo has no events
            raise DodoUnavailable(f"no ingested_count in the reply: {str(reply)[:100]!r}")
        return count

    async def has_event(self, event_id: str) -> bool:
        try:
            reply = await answered(self._sdk.usage_events.retrieve(event_id))
        except DodoRefused as refused:
            if refused.status == httpx.codes.NOT_FOUND:
                return False
            raise
        return getattr(reply, "event_id", None) == event_id

    async def events_since(self, name: str, since_ms: int, page: int) -> list[DodoEvent]:
        """One page of all customers' events of a name, numbered from 0; the last one is shorter than ``PAGE``."""
        since = datetime.fromtimestamp(since_ms // MS_PER_SECOND, UTC)
        call = self._sdk.usage_events.list(event_name=name, start=since, page_number=page, page_size=PAGE)
        return [parsed(DodoEvent.read, item) for item in await listed(call)]

    async def create_customer(self, tenant: Tenant) -> str:
        """The id of this tenant's customer: the one that carries its tag, else a new one.

        Raises:
            DodoRefused: Dodo gives the email's customer instead, and its tag is missing or another tenant's.
        """
        for wire in await self._pages(lambda page: self._list_customers(tenant.email, page)):
            if cast(Wire, wire.get("metadata") or {}).get(TENANT_TAG) == tenant.id:
                return str(wire["customer_id"])
        made = await answered(
            self._sdk.customers.create(
                email=tenant.email, name=tenant.name or tenant.id, metadata={TENANT_TAG: tenant.id}
            )
        )
        wire = as_wire(made)
        owner = cast(Wire, wire.get("metadata") or {}).get(TENANT_TAG)
        if owner != tenant.id:
            whose = f"tenant {owner}'s" if owner else f"no tenant's: it has no {TENANT_TAG} in its metadata"
            raise DodoRefused(409, "CUSTOMER_SHARED", f"the customer of {tenant.email} is {whose}")
        return text_in(wire, "customer_id")

    async def retrieve_customer(self, customer_id: str) -> DodoCustomer:
        return read_as(DodoCustomer.read, await answered(self._sdk.customers.retrieve(customer_id)))

    async def checkout(
        self, tenant: Tenant, product_id: str, metadata: Mapping[str, str], return_url: str, quantity: int = 1
    ) -> str:
        """A page where this tenant pays for a product. The tenant has a Dodo customer."""
        assert tenant.dodo_customer_id, "an email could find, or make, the customer of another tenant"
        reply = await answered(
            self._sdk.checkout_sessions.create(
                product_cart=[{"product_id": product_id, "quantity": quantity}],
                customer={"customer_id": tenant.dodo_customer_id},
                metadata=dict(metadata),
                return_url=return_url,
            )
        )
        return text_in(as_wire(reply), "checkout_url")

    async def payment_methods(self, customer_id: str) -> list[str]:
        """Ids of a customer's saved cards that may be charged without it being there, the last used first."""
        items = await listed(self._sdk.customers.retrieve_payment_methods(customer_id))
        usable = [item for item in items if item.get("recurring_enabled") is not False]
        usable.sort(key=lambda item: str(item.get("last_used_at") or ""), reverse=True)
        return [str(item["payment_method_id"]) for item in usable if item.get("payment_method_id")]

    async def charge_saved(
        self, tenant: Tenant, product_id: str, payment_method_id: str, metadata: Mapping[str, str]
    ) -> str:
        """Charge a saved card for one of a product, at once; the payment's id. It may yet fail.

        Raises:
            DodoUnavailable: whether the card was charged is unknown: look it up by ``metadata``.
            DodoRefused: it was not.
        """
        assert tenant.dodo_customer_id, "a saved card is a customer's"
        reply = await answered(
            self._sdk.checkout_sessions.create(
                product_cart=[{"product_id": product_id, "quantity": 1}],
                customer={"customer_id": tenant.dodo_customer_id},
                metadata=dict(metadata),
                payment_method_id=payment_method_id,
                confirm=True,
            )
        )
        return text_in(as_wire(reply), "payment_id")

    async def payments_of(self, customer_id: str, since_ms: int) -> list[Payment]:
        """A customer's payments made since then, without their carts."""
        pages = await self._pages(
            lambda page: self._sdk.payments.list(
                customer_id=customer_id, created_at_gte=to_iso(since_ms), page_number=page, page_size=PAGE
            )
        )
        return [parsed(Payment.read, wire) for wire in pages]

    async def invoices(self, customer_id: str, page: int, size: int) -> list[Invoice]:
        """One page of a customer's payments, numbered from 0, without those that cannot be read."""
        call = self._sdk.payments.list(customer_id=customer_id, page_number=page, page_size=size)
        return readable(Invoice.read, await listed(call))

    async def portal(self, customer_id: str) -> str:
        """A link to Dodo's own page where a customer sees invoices and cancels."""
        return text_in(as_wire(await answered(self._sdk.customers.customer_portal.create(customer_id))), "link")

    async def retrieve_subscription(self, subscription_id: str) -> DodoSubscription:
        return read_as(DodoSubscription.read, await answered(self._sdk.subscriptions.retrieve(subscription_id)))

    async def running_subscriptions(self, customer_id: str) -> list[DodoSubscription]:
        """A customer's subscriptions that are active at Dodo."""
        pages = await self._pages(
            lambda page: self._sdk.subscriptions.list(
                customer_id=customer_id, status="active", page_number=page, page_size=PAGE
            )
        )
        return [parsed(DodoSubscription.read, wire) for wire in pages]

    async def end_subscription(self, subscription_id: str, metadata: Mapping[str, str], why: str) -> None:
        """End a subscription now, whose metadata is these from then on. Its open usage is not invoiced."""
        await answered(
            self._sdk.subscriptions.update(
                subscription_id, status="cancelled", metadata=dict(metadata), cancellation_comment=why
            )
        )

    async def quote_plan(self, subscription_id: str, product_id: str, is_at_period_end: bool) -> PlanQuote:
        """What a change to this product would charge; nothing is changed."""
        call = self._sdk.subscriptions.preview_change_plan(
            subscription_id,
            product_id=product_id,
            quantity=1,
            proration_billing_mode=PRORATION,
            effective_at="next_billing_date" if is_at_period_end else "immediately",
            cancel_scheduled_change_plan=True,
        )
        return read_as(PlanQuote.read, await answered(call))

    async def change_plan(
        self, subscription_id: str, product_id: str, is_at_period_end: bool, metadata: Mapping[str, str]
    ) -> str:
        """Change a subscription's product, now or at the end of its period, in place of a change scheduled before.

        Returns:
            The id of the payment, which has ``metadata``; empty where nothing is charged now. If it fails, the
            subscription stays as it was.

        Raises:
            DodoUnavailable: whether it was changed is unknown: retrieve it.
            DodoRefused: it was not.
        """
        reply = await answered(
            self._sdk.subscriptions.change_plan(
                subscription_id,
                product_id=product_id,
                quantity=1,
                proration_billing_mode=PRORATION,
                effective_at="next_billing_date" if is_at_period_end else "immediately",
                on_payment_failure="prevent_change",
                cancel_scheduled_change_plan=True,
                metadata=dict(metadata),
            )
        )
        return text(as_wire(reply), "payment_id", "")

    async def keep_plan(self, subscription_id: str) -> None:
        """Take back a change of plan that is scheduled for the end of the period."""
        await answered(self._sdk.subscriptions.cancel_change_plan(subscription_id))

    async def subscription_payments(self, subscription_id: str) -> list[Payment]:
        """Every payment of a subscription that succeeded, without its cart."""
        pages = await self._pages(
            lambda page: self._sdk.payments.list(
                subscription_id=subscription_id, status="succeeded", page_number=page, page_size=PAGE
            )
        )
        return [parsed(Payment.read, wire) for wire in pages]

    async def invoice_lines(self, payment_id: str) -> list[InvoiceLine]:
        wire = as_wire(await answered(self._sdk.payments.retrieve_line_items(payment_id)))
        return [parsed(InvoiceLine.read, item) for item in cast(Sequence[Wire], wire.get("items") or ())]

    async def refund(self, payment_id: str, reason: str, line_id: str = "") -> Refund:
        """Refund what is left of a payment, or of one line of it.

        Raises:
            DodoUnavailable: whether it was refunded is unknown: retrieve the payment.
            DodoRefused: it was not.
        """
        items = [RefundItem(item_id=line_id)] if line_id else omit
        return read_as(
            Refund.read, await answered(self._sdk.refunds.create(payment_id=payment_id, reason=reason, items=items))
        )

    async def retrieve_payment(self, payment_id: str) -> Payment:
        return read_as(Payment.read, await answered(self._sdk.payments.retrieve(payment_id)))

    async def retrieve_dispute(self, dispute_id: str) -> Dispute:
        return read_as(Dispute.read, await answered(self._sdk.disputes.retrieve(dispute_id)))

    async def usage_history(self, subscription_id: str) -> list[UsagePeriod]:
        """Billing periods of a subscription with what each meter consumed."""
        pages = await self._pages(
            lambda page: self._sdk.subscriptions.retrieve_usage_history(
                subscription_id, page_number=page, page_size=PAGE
            )
        )
        return [parsed(UsagePeriod.read, wire) for wire in pages]

    async def balance_lines(self, since_ms: int) -> list[BalanceLine]:
        """Lines of Dodo's own ledger from then on: what it took in, kept and paid out for us."""
        pages = await self._pages(
            lambda page: self._sdk.balances.retrieve_ledger(
                created_at_gte=to_iso(since_ms), page_number=page, page_size=PAGE
            )
        )
        return [parsed(BalanceLine.read, wire) for wire in pages]

    async def meters(self) -> list[DodoMeter]:
        pages = await self._pages(lambda page: self._sdk.meters.list(page_number=page, page_size=PAGE))
        return [parsed(DodoMeter.read, wire) for wire in pages]

    async def create_meter(self, name: str, event_name: str, key: str, unit: str) -> DodoMeter:
        """A meter that sums the metadata value ``key`` of events named ``event_name``."""
        call = self._sdk.meters.create(
            name=name, event_name=event_name, measurement_unit=unit, aggregation={"type": "sum", "key": key}
        )
        return read_as(DodoMeter.read, await answered(call))

    async def products(self) -> list[DodoProduct]:
        """All of the account; one of another kind than ours that cannot be read is left out."""
        pages = await self._pages(lambda page: self._sdk.products.list(page_number=page, page_size=PAGE))
        return readable(DodoProduct.read, pages)

    async def retrieve_product(self, product_id: str) -> DodoProduct:
        return read_as(DodoProduct.read, await answered(self._sdk.products.retrieve(product_id)))

    async def product_tag(self, product_id: str) -> str:
        """Our own name for a product, from its metadata; empty for others' products, and where Dodo has none."""
        try:
            wire = as_wire(await answered(self._sdk.products.retrieve(product_id)))
        except DodoRefused as refused:
            if refused.status == httpx.codes.NOT_FOUND:
                return ""
            raise
        return text(inner(wire, "metadata"), "farebox", "")

    async def create_product(
        self, tag: str, name: str, price: PriceParam, entitlement_ids: Sequence[str] = ()
    ) -> DodoProduct:
        """A product; a buyer of it is handed what each entitlement grants."""
        attached = [AttachProductEntitlementParam(entitlement_id=one) for one in entitlement_ids]
        call = self._sdk.products.create(
            name=name, price=price, tax_category="saas", metadata={"farebox": tag}, entitlements=attached or omit
        )
        return read_as(DodoProduct.read, await answered(call))

    async def licence_entitlements(self) -> Mapping[str, str]:
        """Ids of the licence-key entitlements by the tag that we gave them; others' are left out."""
        pages = await self._pages(lambda page: self._sdk.entitlements.list(page_number=page, page_size=PAGE))
        tags = {str(wire["id"]): cast(Wire, wire.get("metadata") or {}).get("farebox") for wire in pages}
        return {str(tag): id_ for id_, tag in tags.items() if tag}

    async def create_licence_entitlement(self, tag: str, name: str) -> str:
        call = self._sdk.entitlements.create(
            name=name, integration_type="license_key", integration_config={}, metadata={"farebox": tag}
        )
        return text_in(as_wire(await answered(call)), "id")

    async def licence_grants(self, entitlement_id: str, customer_id: str) -> list[LicenceGrant]:
        """Every key that a customer was ever handed under an entitlement, as it is now."""
        pages = await self._pages(
            lambda page: self._sdk.entitlements.grants.list(
                entitlement_id, customer_id=customer_id, page_number=page, page_size=PAGE
            )
        )
        return [parsed(LicenceGrant.read, wire) for wire in pages]

    async def webhooks(self) -> list[WebhookEndpoint]:
        found: list[WebhookEndpoint] = []
        iterator: str | None = None
        for _ in range(MAX_PAGES):
            reply = as_wire(await answered(self._sdk.webhooks.list(limit=PAGE, iterator=iterator or omit)))
            items = cast(Sequence[Wire], reply.get("data") or ())
            found += [WebhookEndpoint(str(item["id"]), str(item["url"])) for item in items]
            iterator = cast(str | None, reply.get("iterator"))
            if reply.get("done") is not False or not iterator:
                break
        return found

    async def create_webhook(self, url: str, idempotency_key: str) -> WebhookEndpoint:
        made = as_wire(
            await answered(self._sdk.webhooks.create(url=url, description="farebox", idempotency_key=idempotency_key))
        )
        return WebhookEndpoint(text_in(made, "id"), str(made.get("url", url)))

    async def webhook_secret(self, webhook_id: str) -> str:
        return text_in(as_wire(await answered(self._sdk.webhooks.retrieve_secret(webhook_id))), "secret")

    def _list_customers(self, email: str, page: int) -> Awaitable[object]:
        return self._sdk.customers.list(email=email, page_number=page, page_size=PAGE)

    async def _pages(self, fetch: Callable[[int], Awaitable[object]]) -> list[Wire]:
        """All items of a list that Dodo numbers from page 0."""
        found: list[Wire] = []
        for page in range(MAX_PAGES):
            items = await listed(fetch(page))
            found += items
            if len(items) < PAGE:
                break
        return found
