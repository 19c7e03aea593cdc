"""The shape of every answer about buying, as the OpenAPI document tells it."""

from typing import Literal

from billing.catalog.plans import Limits
from deployments.gateway.api.bodies import Body, Dollars


class QuotaBody(Body):
    """Credit in dollars, or in requests on the named adapters (none named: on all)."""

    unit: Literal["usd", "requests"]
    amount: Dollars | int
    adapters: list[str]


class BuyBody(Body):
    """How to buy it: send this."""

    method: Literal["POST"]
    url: str
    body: dict[str, str]


class PackOffer(Body):
    id: str
    price_usd: Dollars
    grants: QuotaBody
    expires_days: int | None
    """After the payment; null is never."""
    licence_key: bool
    buy: BuyBody


class PlanOffer(Body):
    id: str
    kind: Literal["pay_as_you_go", "subscription"]
    monthly_price_usd: Dollars
    grants: QuotaBody | None
    """Of each month; it ends with the month."""
    overage_cap_usd: Dollars
    limits: Limits
    licence_key: bool
    buy: BuyBody


class OffersBody(Body):
    """``plans`` is empty while a subscription is live: ``subscribed_to`` names its plan."""

    object: Literal["offers"]
    packs: list[PackOffer]
    plans: list[PlanOffer]
    subscribed_to: str | None


class CheckoutBody(Body):
    object: Literal["checkout"]
    checkout_url: str
    session_id: str


class PortalBody(Body):
    object: Literal["portal"]
    url: str


class InvoiceBody(Body):
    """One payment. ``total_amount`` is in minor units of ``currency``, tax included."""

    payment_id: str
    status: str
    product: str | None
    subscription_id: str | None
    total_amount: int
    currency: str
    created_at_ms: int
    refund_status: str | None
    invoice_id: str | None
    invoice_url: str | None
    """Dodo's link, null where nothing was paid. Where it asks for a key, `POST /v1/portal` leads to the same."""


class InvoicePage(Body):
    object: Literal["list"]
    data: list[InvoiceBody]
    next_page: int | None
