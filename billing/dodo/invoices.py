"""A tenant's payments as it wants to see them: what, when, how much, and where the invoice is.

Amounts are minor units of the payment's own currency, tax included. Knows no credit.
"""

from dataclasses import dataclass
from typing import Self

from billing.dodo.fields import Wire, as_object, integer, moment, text


@dataclass(frozen=True, slots=True)
class Invoice:
    """One payment and its invoice; an empty text where Dodo has none."""

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
