"""What became of a checkout, for the page that its buyer comes back to.

What Dodo adds to the return address is only a hint: what was bought is what our ledger and tenant record say, and only
of the receipt's own tenant and product.
"""

from dataclasses import dataclass
from enum import StrEnum

from redis.asyncio import Redis

from billing.clock import now_ms
from billing.commerce.inbox import Inbox, PurchasedCredit
from billing.commerce.links import Receipt
from billing.ledger.ledger import Ledger
from billing.tenants.tenant import Tenant

DECLINED = frozenset({"failed", "cancelled", "expired", "requires_payment_method"})
"""Dodo's statuses of a payment that took nothing."""


@dataclass(frozen=True, slots=True)
class Returned:
    """What Dodo adds to the return address; anybody can write something else there."""

    payment_id: str = ""
    subscription_id: str = ""
    status: str = ""


class State(StrEnum):
    PAID = "paid"
    CONFIRMING = "confirming"
    """Dodo's webhook has not come."""
    DECLINED = "declined"


@dataclass(frozen=True, slots=True)
class Outcome:
    state: State
    credit: PurchasedCredit | None = None
    """What a pack granted."""


async def outcome_of(redis: Redis, ledger: Ledger, tenant: Tenant, receipt: Receipt, returned: Returned) -> Outcome:
    """Raises StoreUnavailable."""
    kind, _, name = receipt.product.partition(":")
    if kind == "plan":
        one = tenant.subscription
        is_this = one is not None and (one.id, one.plan) == (returned.subscription_id, name)
        if is_this and one is not None and one.is_live(now_ms()):
            return Outcome(State.PAID)
    else:
        credit = await _credit(redis, receipt, returned.payment_id)
        if credit is not None and await ledger.has_moved(tenant.id, credit.source):
            return Outcome(State.PAID, credit)
    return Outcome(State.DECLINED if returned.status in DECLINED else State.CONFIRMING)


async def _credit(redis: Redis, receipt: Receipt, payment_id: str) -> PurchasedCredit | None:
    bought = await Inbox(redis).purchase(payment_id) if payment_id else None
    source = f"payment:{payment_id}:{receipt.product_id}"
    return next((one for one in bought or () if one.source == source), None)
