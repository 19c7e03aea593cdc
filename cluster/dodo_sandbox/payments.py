"""Payments, succeeded or failed. Only refunds change a payment. Amounts are cents."""

from datetime import datetime
from typing import Annotated, ClassVar, Literal

from fastapi import APIRouter, Query
from pydantic import Field

from cluster.dodo_sandbox.customers import CustomerLimitedDetails, CustomerRecord, add_to_balance, customer_of, limited
from cluster.dodo_sandbox.endpoints import announce
from cluster.dodo_sandbox.errors import not_found
from cluster.dodo_sandbox.state import Sandbox, SandboxDep
from cluster.dodo_sandbox.wire import (
    BRAND_ID,
    BUSINESS_ID,
    Cents,
    LimitedMetadata,
    Page,
    Paging,
    Resource,
    UtcTime,
    Wire,
    new_id,
)

router = APIRouter()

PaymentStatus = Literal["succeeded", "failed", "processing", "cancelled"]
ChargeType = Literal["new", "renewal", "plan_change", "on_demand"]


class BillingAddress(Wire):
    country: str = "US"
    city: str | None = None
    state: str | None = None
    street: str | None = None
    zipcode: str | None = None


class CartItem(Wire):
    product_id: str
    quantity: int


class ServicePeriod(Wire):
    subscription_id: str
    starts_at: datetime
    ends_at: datetime
    proration_factor: str = "1"


class Line(Wire):
    """One line of an invoice. What the customer's balance pays is a negative line."""

    items_id: str
    name: str
    amount: int
    tax: Cents = 0
    refundable_amount: int = 0
    description: str | None = None


class LineItems(Wire):
    currency: str
    items: list[Line]
    partial_refund_allowed: bool = True


class RefundSummary(Wire):
    """The fields of a refund in its payment and in lists."""

    business_id: str = BUSINESS_ID
    created_at: datetime
    is_partial: bool
    payment_id: str
    refund_id: str
    status: Literal["succeeded"] = "succeeded"
    amount: Cents
    currency: str
    reason: str | None = None


class Payment(Wire):
    billing: BillingAddress = BillingAddress()
    brand_id: str = BRAND_ID
    business_id: str = BUSINESS_ID
    created_at: datetime
    currency: str
    customer: CustomerLimitedDetails
    digital_products_delivered: bool = False
    has_license_key: bool = False
    disputes: list[str] = Field(default_factory=list)
    includes_usage: bool = False
    is_multi_subscription: bool = False
    is_update_payment_method: bool = False
    metadata: LimitedMetadata = Field(default_factory=dict)
    payment_id: str
    payment_provider: Literal["dodo"] = "dodo"
    refunds: list[RefundSummary] = Field(default_factory=list)
    retry_attempt: int = 0
    service_periods: list[ServicePeriod] = Field(default_factory=list)
    settlement_amount: Cents
    settlement_currency: str
    settlement_tax: Cents | None = None
    subscription_ids: list[str] = Field(default_factory=list)
    total_amount: Cents
    tax: Cents | None = None
    charge_type: ChargeType | None = None
    checkout_session_id: str | None = None
    error_code: str | None = None
    error_message: str | None = None
    invoice_id: str | None = None
    invoice_url: str | None = None
    payment_method: str | None = "card"
    payment_method_id: str | None = None
    card_network: str | None = "visa"
    card_last_four: str | None = "4242"
    product_cart: list[CartItem] | None = None
    refund_status: Literal["partial", "full"] | None = None
    status: PaymentStatus
    subscription_id: str | None = None
    updated_at: datetime


class PaymentRecord(Payment, Resource):
    kind: ClassVar[str] = "payment"
    lines: list[Line] = Field(default_factory=list)

    @property
    def key(self) -> str:
        return self.payment_id

    @property
    def owner(self) -> str:
        return self.customer.customer_id


class Charge(Wire):
    """A charge of a customer's card, before tax."""

    customer_id: str
    currency: str
    lines: list[Line]
    metadata: LimitedMetadata = Field(default_factory=dict)
    charge_type: ChargeType | None = None
    includes_usage: bool = False
    subscription_ids: list[str] = Field(default_factory=list)
    service_periods: list[ServicePeriod] = Field(default_factory=list)
    product_cart: list[CartItem] | None = None
    checkout_session_id: str | None = None
    payment_method_id: str | None = None
    retry_attempt: int = 0


class PaymentFilter(Paging):
    created_at_gte: UtcTime | None = None
    created_at_lte: UtcTime | None = None
    customer_id: str | None = None
    product_id: str | None = None
    status: str | None = None
    subscription_id: str | None = None
    currency: str | None = None

    def admits(self, payment: Payment) -> bool:
        return (
            (self.created_at_gte is None or payment.created_at >= self.created_at_gte)
            and (self.created_at_lte is None or payment.created_at <= self.created_at_lte)
            and self.status in (None, payment.status)
            and self.currency in (None, payment.currency)
            and (self.subscription_id is None or self.subscription_id in payment.subscription_ids)
            and (self.product_id is None or self.product_id in [i.product_id for i in payment.product_cart or []])
        )


def line(name: str, amount: int, description: str | None = None) -> Line:
    return Line(items_id=new_id("itm"), name=name, amount=amount, description=description)


class Quote(Wire):
    """What a charge would come to, in cents."""

    tax: int
    from_balance: int
    total: int
    """What the card pays."""


def quote(sandbox: Sandbox, customer: CustomerRecord, asked: Charge) -> Quote:
    lines = [taxed(one, sandbox.settings.tax_bps, refundable=True) for one in asked.lines]
    tax = sum(one.tax for one in lines)
    total = sum(one.amount for one in lines) + tax
    used = min(customer.balance, total) if asked.subscription_ids else 0
    return Quote(tax=tax, from_balance=used, total=total - used)


def charge(sandbox: Sandbox, asked: Charge, at: datetime, declined: bool = False) -> PaymentRecord:
    """Charge the customer's card at ``at``, and send ``payment.succeeded`` or ``payment.failed``.

    An invoice of a subscription uses the customer's balance first; the total is what the card pays.
    """
    customer = customer_of(sandbox, asked.customer_id)
    failed = declined or customer.card_declines
    quoted, payment_id = quote(sandbox, customer, asked), new_id("pay")
    tax, total = quoted.tax, quoted.total
    lines = [taxed(one, sandbox.settings.tax_bps, refundable=not failed) for one in asked.lines]
    if quoted.from_balance:
        lines.append(taxed(line("Customer balance", -quoted.from_balance), 0, refundable=not failed))
        if not failed:
            add_to_balance(sandbox, customer.customer_id, -quoted.from_balance)
    payment = PaymentRecord(
        payment_id=payment_id, created_at=at, updated_at=at, customer=limited(customer), currency=asked.currency,
        lines=lines, total_amount=total, tax=None if failed else tax, settlement_amount=total,
        settlement_currency=asked.currency, settlement_tax=None if failed else tax,
        status="failed" if failed else "succeeded", metadata=asked.metadata, charge_type=asked.charge_type,
        includes_usage=asked.includes_usage, subscription_ids=asked.subscription_ids,
        is_multi_subscription=len(asked.subscription_ids) > 1, service_periods=[] if failed else asked.service_periods,
        subscription_id=asked.subscription_ids[0] if len(asked.subscription_ids) == 1 else None,
        product_cart=asked.product_cart, checkout_session_id=asked.checkout_session_id,
        payment_method_id=asked.payment_method_id, retry_attempt=asked.retry_attempt,
        invoice_id=None if failed else new_id("inv"),
        invoice_url=None if failed else f"{sandbox.public_url}/invoices/payments/{payment_id}",
        error_code="CARD_DECLINED" if failed else None,
        error_message="The card was declined" if failed else None,
    )  # fmt: skip
    sandbox.store.put(payment)
    announce(sandbox, f"payment.{payment.status}", "payment", payment, at)
    return payment


def taxed(one: Line, tax_bps: int, refundable: bool) -> Line:
    """The line with its tax, rounded half up to the cent."""
    tax = (one.amount * tax_bps + 5_000) // 10_000
    return one.model_copy(update={"tax": tax, "refundable_amount": one.amount + tax if refundable else 0})


def payment_of(sandbox: Sandbox, payment_id: str) -> PaymentRecord:
    """Raises ApiError 404 for an unknown id."""
    payment = sandbox.store.get(PaymentRecord, payment_id)
    if payment is None:
        raise not_found("payment", payment_id)
    return payment


@router.get("/payments")
async def list_payments(filters: Annotated[PaymentFilter, Query()], sandbox: SandboxDep) -> Page[Payment]:
    return filters.of([one for one in sandbox.store.find(PaymentRecord, filters.customer_id) if filters.admits(one)])


@router.get("/payments/{payment_id}")
async def retrieve_payment(payment_id: str, sandbox: SandboxDep) -> Payment:
    return payment_of(sandbox, payment_id)


@router.get("/payments/{payment_id}/line-items")
async def retrieve_line_items(payment_id: str, sandbox: SandboxDep) -> LineItems:
    payment = payment_of(sandbox, payment_id)
    return LineItems(currency=payment.currency, items=payment.lines)
