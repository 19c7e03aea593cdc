"""Values of what Dodo sends in API replies and webhooks, read leniently: numbers or strings, nulls, unknown fields."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from billing.dodo.fields import Wire, WireError, as_list, as_object, inner, integer, moment, moment_ms, one_of, text
from billing.tenants.tenant import SubscriptionStatus

DISPUTE_STATUSES = tuple(
    f"dispute_{name}" for name in ("opened", "expired", "accepted", "cancelled", "challenged", "won", "lost")
)
GRANT_STATUSES = ("Pending", "Delivered", "Failed", "Revoked")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a payment's cart."""

    product_id: str
    quantity: int


@dataclass(frozen=True, slots=True)
class Payment:
    """A payment, as far as credit depends on it. Amounts are minor units, tax included."""

    id: str
    customer_id: str
    status: str
    lines: tuple[Line, ...]
    total_amount: int
    currency: str
    created_at_ms: int | None
    subscription_ids: tuple[str, ...]
    includes_usage: bool
    service_starts_ms: Mapping[str, int]
    """By subscription, the start of the period this payment pays for; usage in it is of the period before."""
    metadata: Wire
    tax: int = 0
    settled_amount: int = 0
    """What it adds to the balance at Dodo, tax included, in ``settled_currency``."""
    settled_tax: int = 0
    settled_currency: str = ""
    service_ends_ms: Mapping[str, int] = field(default_factory=dict)
    """By subscription, the end of the period that this payment pays for."""
    charge_type: str = ""
    """``new``, ``renewal``, ``plan_change`` or ``on_demand`` for a charge of a subscription, else empty."""
    refund_status: str = ""
    """``partial`` or ``full``; empty where nothing was refunded."""
    refunds: Mapping[str, int] = field(default_factory=dict)
    """By reason, the amount of each of its refunds that did not fail."""

    @classmethod
    def read(cls, wire: Wire) -> Self:
        periods = [as_object(p) for p in as_list(wire.get("service_periods"))]
        one = text(wire, "subscription_id", "")
        total, tax, currency = integer(wire, "total_amount"), integer(wire, "tax", 0), text(wire, "currency", "")
        return cls(
            id=text(wire, "payment_id"),
            customer_id=text(as_object(wire.get("customer")), "customer_id"),
            status=text(wire, "status", ""),
            lines=tuple(_line(as_object(item)) for item in as_list(wire.get("product_cart"))),
            total_amount=total,
            currency=currency,
            created_at_ms=moment_ms(wire, "created_at"),
            subscription_ids=tuple(str(s) for s in as_list(wire.get("subscription_ids"))) or ((one,) if one else ()),
            includes_usage=wire.get("includes_usage") is True,
            service_starts_ms={text(p, "subscription_id", ""): moment(p, "starts_at") for p in periods},
            metadata=as_object(wire.get("metadata")),
            tax=tax,
            settled_amount=integer(wire, "settlement_amount", total),
            settled_tax=integer(wire, "settlement_tax", tax),
            settled_currency=text(wire, "settlement_currency", currency),
            service_ends_ms={
                text(p, "subscription_id", ""): end for p in periods if (end := moment_ms(p, "ends_at")) is not None
            },
            charge_type=text(wire, "charge_type", ""),
            refund_status=text(wire, "refund_status", ""),
            refunds={
                text(refund, "reason", ""): integer(refund, "amount", 0)
                for refund in map(as_object, as_list(wire.get("refunds")))
                if refund.get("status") != "failed"
            },
        )


@dataclass(frozen=True, slots=True)
class InvoiceLine:
    """One line of a payment's invoice, in its minor units."""

    id: str
    """Of the line, or of the product that it is about."""
    name: str
    refundable: int
    total: int = 0
    """With tax."""

    @property
    def refunded(self) -> int:
        return self.total - self.refundable

    @classmethod
    def read(cls, wire: Wire) -> Self:
        refundable, total = integer(wire, "refundable_amount", 0), integer(wire, "amount", 0) + integer(wire, "tax", 0)
        return cls(text(wire, "items_id"), text(wire, "name", ""), refundable, total)


@dataclass(frozen=True, slots=True)
class Refund:
    """Money given back on a payment, in the payment's minor units; ``None`` is the whole payment."""

    id: str
    payment_id: str
    status: str
    amount: int | None
    created_at_ms: int | None = None
    reason: str = ""

    @classmethod
    def read(cls, wire: Wire) -> Self:
        """Dodo may leave out the amount of a full refund. That of a partial one is never guessed."""
        is_whole = wire.get("amount") is None and wire.get("is_partial") is False
        amount = None if is_whole else integer(wire, "amount")
        ids, status = (text(wire, "refund_id"), text(wire, "payment_id")), text(wire, "status")
        return cls(*ids, status, amount, moment_ms(wire, "created_at"), text(wire, "reason", ""))


@dataclass(frozen=True, slots=True)
class Dispute:
    """A buyer's bank asking for a payment back, in the payment's minor units; ``None`` is the whole payment."""

    id: str
    payment_id: str
    status: str
    amount: int | None
    created_at_ms: int | None = None

    @property
    def is_settled_for_us(self) -> bool:
        """Won, or withdrawn by the buyer: the money stays with us."""
        return self.status in ("dispute_won", "dispute_cancelled")

    @classmethod
    def read(cls, wire: Wire) -> Self:
        """Dodo does not say whether its amount is in minor units: what is no whole number stands for everything."""
        try:
            amount = integer(wire, "amount")
        except WireError:
            amount = None
        ids = (text(wire, "dispute_id"), text(wire, "payment_id"))
        status = one_of(wire, "dispute_status", DISPUTE_STATUSES)
        return cls(*ids, status, amount, moment_ms(wire, "created_at"))


@dataclass(frozen=True, slots=True)
class LicenceGrant:
    """A licence key that a purchase handed out, as Dodo has it now."""

    id: str
    customer_id: str
    entitlement_id: str
    status: str
    """``Pending``, ``Delivered``, ``Failed`` or ``Revoked``."""
    key: str
    """Empty while there is none."""
    subscription_id: str
    payment_id: str

    @classmethod
    def read(cls, wire: Wire) -> Self:
        return cls(
            id=text(wire, "id"),
            customer_id=text(wire, "customer_id"),
            entitlement_id=text(wire, "entitlement_id"),
            status=one_of(wire, "status", GRANT_STATUSES),
            key=text(inner(wire, "license_key"), "key", ""),
            subscription_id=text(wire, "subscription_id", ""),
            payment_id=text(wire, "payment_id", ""),
        )


@dataclass(frozen=True, slots=True)
class DodoCustomer:
    id: str
    email: str
    name: str

    @classmethod
    def read(cls, wire: Wire) -> Self:
        return cls(text(wire, "customer_id"), text(wire, "email"), text(wire, "name", ""))


@dataclass(frozen=True, slots=True)
class DodoSubscription:
    """A subscription as Dodo has it."""

    id: str
    customer_id: str
    product_id: str
    status: SubscriptionStatus
    period_start_ms: int
    period_end_ms: int
    cancel_at_period_end: bool
    past_due_ends_at_ms: int | None = None
    """Only webhooks carry it."""
    paused_at_ms: int | None = None
    """Only while it is paused."""
    product_name: str = ""
    created_at_ms: int = 0
    scheduled_product_id: str = ""
    """That it changes to at the end of its period; empty where no change is scheduled."""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_running(self) -> bool:
        """Does it charge for its periods, or try to?"""
        return self.status in (SubscriptionStatus.ACTIVE, SubscriptionStatus.PAST_DUE)

    @classmethod
    def read(cls, wire: Wire) -> Self:
        return cls(
            id=text(wire, "subscription_id"),
            customer_id=text(as_object(wire.get("customer")), "customer_id"),
            product_id=text(wire, "product_id"),
            status=SubscriptionStatus(one_of(wire, "status", tuple(SubscriptionStatus))),
            period_start_ms=moment(wire, "previous_billing_date"),
            period_end_ms=moment(wire, "next_billing_date"),
            cancel_at_period_end=wire.get("cancel_at_next_billing_date") is True,
            past_due_ends_at_ms=moment_ms(wire, "past_due_ends_at"),
            paused_at_ms=moment_ms(wire, "paused_at"),
            product_name=text(wire, "product_name", ""),
            created_at_ms=moment_ms(wire, "created_at") or 0,
            scheduled_product_id=text(as_object(wire.get("scheduled_change")), "product_id", ""),
            metadata={str(key): str(value) for key, value in as_object(wire.get("metadata")).items()},
        )


@dataclass(frozen=True, slots=True)
class PlanQuote:
    """What a change of plan would charge now, in minor units and with tax."""

    total: int
    currency: str
    credited: int
    """What goes to the customer's credit at Dodo; below 0 it pays a part of the change."""
    effective_at_ms: int

    @classmethod
    def read(cls, wire: Wire) -> Self:
        charge = as_object(wire.get("immediate_charge"))
        summary = as_object(charge.get("summary"))
        return cls(
            total=integer(summary, "total_amount"),
            currency=text(summary, "currency", ""),
            credited=integer(summary, "customer_credits", 0),
            effective_at_ms=moment(charge, "effective_at"),
        )


@dataclass(frozen=True, slots=True)
class UsagePeriod:
    """What a subscription's meters consumed in one billing period, by meter id, in whole units."""

    start_ms: int
    end_ms: int
    units: Mapping[str, int]
    cents: Mapping[str, int] = field(default_factory=dict)
    """What each meter's units cost, as Dodo invoices them."""

    @classmethod
    def read(cls, wire: Wire) -> Self:
        meters = [as_object(m) for m in as_list(wire.get("meters"))]
        units = {text(m, "id"): integer(m, "chargeable_units", 0) for m in meters}
        cents = {text(m, "id"): integer(m, "total_price", 0) for m in meters}
        return cls(moment(wire, "start_date"), moment(wire, "end_date"), units, cents)


@dataclass(frozen=True, slots=True)
class DodoMeter:
    id: str
    name: str
    event_name: str
    aggregation: str
    key: str

    @classmethod
    def read(cls, wire: Wire) -> Self:
        aggregation = as_object(wire.get("aggregation"))
        return cls(
            id=text(wire, "id"),
            name=text(wire, "name", ""),
            event_name=text(wire, "event_name", ""),
            aggregation=text(aggregation, "type", ""),
            key=text(aggregation, "key", ""),
        )


@dataclass(frozen=True, slots=True)
class MeterPrice:
    """What one unit of a meter costs in a product: cents, as a decimal string."""

    meter_id: str
    price_per_unit: str
    free_threshold: int = 0


@dataclass(frozen=True, slots=True)
class DodoProduct:
    """A product; ``cents`` is its one-time or monthly fixed price."""

    id: str
    name: str
    kind: str
    """Dodo's type of the price: ``one_time_price``, ``recurring_price`` or ``usage_based_price``."""
    cents: int
    currency: str
    tag: str
    """Our own name for it, such as ``pack:small``, from its metadata; empty for others' products."""
    meters: tuple[MeterPrice, ...] = ()
    hands_out_key: bool = False
    """Does a licence-key entitlement hang on it?"""

    @classmethod
    def read(cls, wire: Wire) -> Self:
        price = as_object(wire.get("price_detail")) or as_object(wire.get("price"))
        return cls(
            id=text(wire, "product_id"),
            name=text(wire, "name", ""),
            kind=text(price, "type", ""),
            cents=integer(price, "fixed_price" if "fixed_price" in price else "price", 0),
            currency=text(price, "currency", ""),
            tag=text(as_object(wire.get("metadata")), "farebox", ""),
            meters=tuple(_meter_price(as_object(m)) for m in as_list(price.get("meters"))),
            hands_out_key=any(
                as_object(e).get("integration_type") == "license_key" for e in as_list(wire.get("entitlements"))
            ),
        )


@dataclass(frozen=True, slots=True)
class DodoEvent:
    """A usage event as Dodo keeps it."""

    id: str
    name: str
    customer_id: str
    at_ms: int
    metadata: Wire

    @property
    def until(self) -> tuple[int, int] | None:
        """The last entry of its window, as stream ids are sorted; ``None`` where the event is none of ours."""
        ms, _, number = text(self.metadata, "until", "").partition("-")
        return (int(ms), int(number)) if ms.isdecimal() and number.isdecimal() else None

    @classmethod
    def read(cls, wire: Wire) -> Self:
        return cls(
            id=text(wire, "event_id"),
            name=text(wire, "event_name"),
            customer_id=text(wire, "customer_id", ""),
            at_ms=moment(wire, "timestamp"),
            metadata=as_object(wire.get("metadata")),
        )

    def quantity(self, name: str) -> int:
        """A whole metadata value, 0 where there is none.

        Raises:
            WireError: it is no whole number.
        """
        return integer(self.metadata, name, 0)


def _line(wire: Wire) -> Line:
    return Line(text(wire, "product_id"), integer(wire, "quantity"))


def _meter_price(wire: Wire) -> MeterPrice:
    return MeterPrice(
        meter_id=text(wire, "meter_id"),
        price_per_unit=text(wire, "price_per_unit", ""),
        free_threshold=integer(wire, "free_threshold", 0),
    )


@dataclass(frozen=True, slots=True)
class BalanceLine:
    """One line of Dodo's own ledger of what it owes us. Amounts are minor units and not below zero."""

    id: str
    kind: str
    """Dodo's ``event_type``, such as ``payment_fees``."""
    amount: int
    currency: str
    usd_cents: int
    is_credit: bool
    """Does it add to the balance?"""
    at_ms: int
    reference_id: str
    """The payment, refund or dispute that it is about; empty where it is about none."""

    @classmethod
    def read(cls, wire: Wire) -> Self:
        return cls(
            id=text(wire, "id"),
            kind=text(wire, "event_type"),
            amount=abs(integer(wire, "amount")),
            currency=text(wire, "currency", ""),
            usd_cents=abs(integer(wire, "usd_equivalent_amount")),
            is_credit=wire.get("is_credit") is True,
            at_ms=moment(wire, "created_at"),
            reference_id=text(wire, "reference_object_id", ""),
        )


@dataclass(frozen=True, slots=True)
class Invoice:
    """One payment as its tenant wants to see it, and its invoice; an empty text where Dodo has none.

    Amounts are minor units of the payment's own currency, tax included.
    """

    payment_id: str
    status: str
    product: str
    """Our name of what was bought, such as ``pack:small``."""
    subscription_id: str
    total_amount: int
    currency: str
    created_at_ms: int
    refund_status: str
    invoice_id: str
    invoice_url: str
    """Dodo's own link. An owner can ask Dodo to open it only with a key; the customer's portal always shows it."""

    @classmethod
    def read(cls, wire: Wire) -> Self:
        return cls(
            payment_id=text(wire, "payment_id"),
            status=text(wire, "status", ""),
            product=text(as_object(wire.get("metadata")), "farebox_product", ""),
            subscription_id=text(wire, "subscription_id", ""),
            total_amount=integer(wire, "total_amount", 0),
            currency=text(wire, "currency", ""),
            created_at_ms=moment(wire, "created_at"),
            refund_status=text(wire, "refund_status", ""),
            invoice_id=text(wire, "invoice_id", ""),
            invoice_url=text(wire, "invoice_url", ""),
        )
