"""The response models of the routes about buying."""

from dataclasses import asdict
from typing import Literal, Self

from billing.catalog.plans import Limits, Pack, Plan, PlanKind, Quota
from billing.commerce.auto_refill.refill import Attempt, AttemptState, Refill
from billing.commerce.inbox import PurchasedCredit
from billing.commerce.plan_changes import ChangeState, PlanChange
from billing.commerce.receipts import State
from billing.dodo.wire import Invoice, PlanQuote
from billing.money import NANOS_PER_CENT, format_usd
from deployments.gateway.api.bodies import Body, Dollars, UnitName, amount_of, unit_name


class QuotaBody(Body):
    """Credit in dollars, or in requests on the named adapters (none named: on all)."""

    unit: UnitName
    amount: Dollars | int
    adapters: list[str]

    @classmethod
    def of(cls, quota: Quota) -> Self:
        return cls(
            unit=unit_name(quota.unit), amount=amount_of(quota.unit, quota.amount), adapters=list(quota.adapters)
        )


class BuyBody(Body):
    """How to buy it: send this."""

    method: Literal["POST"] = "POST"
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

    @classmethod
    def of(cls, name: str, pack: Pack, checkout_url: str) -> Self:
        return cls(
            id=name,
            price_usd=format_usd(pack.price),
            grants=QuotaBody.of(pack.grants),
            expires_days=pack.expires_days,
            licence_key=pack.licence_key,
            buy=BuyBody(url=checkout_url, body={"pack": name}),
        )


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

    @classmethod
    def of(cls, name: str, plan: Plan, url: str) -> Self:
        return cls(
            id=name,
            kind="subscription" if plan.kind is PlanKind.SUBSCRIPTION else "pay_as_you_go",
            monthly_price_usd=format_usd(plan.monthly_price),
            grants=None if plan.allowance is None else QuotaBody.of(plan.allowance),
            overage_cap_usd=format_usd(plan.credit_limit),
            limits=plan.limits,
            licence_key=plan.licence_key,
            buy=BuyBody(url=url, body={"plan": name}),
        )


class OffersBody(Body):
    """While a subscription is live, ``subscribed_to`` names its plan, and ``plans`` are those that it can change to."""

    object: Literal["offers"] = "offers"
    packs: list[PackOffer]
    plans: list[PlanOffer]
    subscribed_to: str | None


class CheckoutBody(Body):
    object: Literal["checkout"] = "checkout"
    checkout_url: str
    session_id: str


class TopUpBody(Body):
    """What a link offers, what helps most first. POST what ``buy`` says; no API key is needed."""

    object: Literal["top_up"] = "top_up"
    packs: list[PackOffer]
    plans: list[PlanOffer]


class GrantedBody(Body):
    """What a payment added, and when that ends; null is never."""

    unit: UnitName
    amount: Dollars | int
    adapters: list[str]
    expires_at_ms: int | None

    @classmethod
    def of(cls, credit: PurchasedCredit) -> Self:
        return cls(
            unit=unit_name(credit.unit),
            amount=amount_of(credit.unit, credit.amount),
            adapters=list(credit.adapters),
            expires_at_ms=credit.expires_at_ms,
        )


class ReceiptBody(Body):
    """``confirming`` until Dodo's webhook has come; ``granted`` and ``balance_usd`` come with ``paid``."""

    object: Literal["receipt"] = "receipt"
    state: State
    product: str
    granted: GrantedBody | None
    """Null for a plan."""
    balance_usd: Dollars | None
    try_again_url: str | None
    """Only where the payment was declined."""


class PlanChangeBody(Body):
    """``state``: `changed`, `scheduled` for the end of the period, `pending` until its payment is decided, or
    `unchanged` where the subscription had this plan already; a change that was scheduled is then taken back."""

    object: Literal["plan_change"] = "plan_change"
    plan: str
    state: ChangeState
    effective_at_ms: int
    payment_id: str | None
    """Of the change's own payment; null where nothing is charged now."""

    @classmethod
    def of(cls, plan: str, change: PlanChange) -> Self:
        return cls(
            plan=plan,
            state=change.state,
            effective_at_ms=change.effective_at_ms,
            payment_id=change.payment_id or None,
        )


class PlanPreviewBody(Body):
    """Amounts are in minor units of ``currency``, tax and usage so far included."""

    object: Literal["plan_preview"] = "plan_preview"
    plan: str
    total_amount: int
    """What the card would be charged now."""
    credit_amount: int
    """What would go to the customer's credit at the payments provider; below 0 it would pay a part."""
    currency: str
    effective_at_ms: int

    @classmethod
    def of(cls, plan: str, quote: PlanQuote) -> Self:
        return cls(
            plan=plan,
            total_amount=quote.total,
            credit_amount=quote.credited,
            currency=quote.currency,
            effective_at_ms=quote.effective_at_ms,
        )


class PortalBody(Body):
    object: Literal["portal"] = "portal"
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

    @classmethod
    def of(cls, invoice: Invoice) -> Self:
        optional = ("product", "subscription_id", "refund_status", "invoice_id", "invoice_url")
        return cls(**asdict(invoice) | {name: getattr(invoice, name) or None for name in optional})


class InvoicePage(Body):
    object: Literal["list"] = "list"
    data: list[InvoiceBody]
    next_page: int | None


class RefillAttempt(Body):
    id: str
    state: AttemptState
    amount_usd: Dollars
    payment_id: str | None
    reason: str | None
    started_at_ms: int
    ended_at_ms: int | None

    @classmethod
    def of(cls, attempt: Attempt) -> Self:
        return cls(
            id=attempt.id,
            state=attempt.state,
            amount_usd=format_usd(attempt.cents * NANOS_PER_CENT),
            payment_id=attempt.payment_id or None,
            reason=attempt.reason or None,
            started_at_ms=attempt.started_at_ms,
            ended_at_ms=attempt.ended_at_ms or None,
        )


class RefillBody(Body):
    object: Literal["auto_refill"] = "auto_refill"
    pack: str
    threshold_usd: Dollars
    monthly_cap_usd: Dollars
    on: bool
    stopped_because: str
    attempts: list[RefillAttempt]

    @classmethod
    def of(cls, refill: Refill) -> Self:
        return cls(
            pack=refill.pack,
            threshold_usd=format_usd(refill.threshold_nanos),
            monthly_cap_usd=format_usd(refill.monthly_cap_cents * NANOS_PER_CENT),
            on=refill.is_on,
            stopped_because=refill.stopped_because,
            attempts=[RefillAttempt.of(attempt) for attempt in reversed(refill.attempts)],
        )
