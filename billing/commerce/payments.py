"""Apply payments, refunds and disputes to a tenant's credit, in any order and any number of times.

Only a succeeded payment grants, by quantity and by the terms stored with the product that was paid for. Refunds and
disputes claw back their share of it, together never more than it granted.
"""

from collections.abc import Iterable

from billing.commerce.cash import CashBook, Fee, Kind, dispute_entry, payment_entry, refund_entry
from billing.commerce.context import Commerce
from billing.commerce.dodo_ids import id_of
from billing.commerce.inbox import CHARGE_METER, Inbox, PurchasedCredit
from billing.commerce.products import Products
from billing.commerce.signups import Signups
from billing.commerce.subscriptions import DAY_MS, Subscriptions
from billing.commerce.waiting import NotYet
from billing.dodo.wire import Payment, Refund, UsagePeriod
from billing.ledger.account import Clawback, Grant
from billing.money import Nanos, divide_up
from billing.tenants.tenant import Tenant

HOUR_MS = 60 * 60_000
LOST = ("dispute_lost", "dispute_accepted", "dispute_expired")


class Payments:
    """Turns Dodo's payments, refunds and disputes into grants, clawbacks, restorations and repayments."""

    def __init__(self, commerce: Commerce) -> None:
        self._dodo, self._ledger, self._tenants = commerce.dodo, commerce.ledger, commerce.tenants
        self._redis, self._clock = commerce.redis, commerce.clock
        self._inbox, self._products = Inbox(commerce.redis), Products(commerce.redis)
        self._cash = CashBook(commerce.redis)
        self._subscriptions, self._signups = Subscriptions(commerce), Signups(commerce)

    async def succeeded(self, payment: Payment) -> None:
        """Grant what the cart buys, and take invoiced usage off the exposure."""
        if payment.status not in ("succeeded", ""):
            raise NotYet(f"payment {payment.id} is {payment.status}")
        tenant = await self._buyer(payment)
        await self._grant(tenant, payment)
        usage_cents, fees = 0, list[tuple[Fee, Nanos]]()
        for subscription_id in payment.subscription_ids:
            if payment.includes_usage:
                usage_cents += await self._repay(tenant, payment, subscription_id)
            fees += await self._fee(await self._subscriptions.refresh(subscription_id), payment, subscription_id)
        credits_ = await self._purchase(payment)
        await self._cash.book(payment_entry(payment, tenant.id, credits_, fees, usage_cents))

    async def _fee(self, tenant: Tenant, payment: Payment, subscription_id: str) -> list[tuple[Fee, Nanos]]:
        """The period whose fee this payment pays, if it pays one, and its list price."""
        starts_ms, ends_ms = (of.get(subscription_id) for of in (payment.service_starts_ms, payment.service_ends_ms))
        if starts_ms is None or ends_ms is None:
            return []
        subscription = tenant.subscription
        if subscription is None or subscription.id != subscription_id:
            return [(Fee(subscription_id, starts_ms, ends_ms), Nanos(0))]
        if abs(subscription.period_start_ms - starts_ms) <= HOUR_MS:
            starts_ms = subscription.period_start_ms  # the allowance bears this one in its name
        price = Nanos(subscription.sold.price) if subscription.sold else Nanos(0)
        return [(Fee(subscription_id, starts_ms, ends_ms), price)]

    async def _buyer(self, payment: Payment) -> Tenant:
        """The tenant that paid. A customer becomes one by buying something of ours, and not otherwise."""
        known = await self._tenants.by_customer(payment.customer_id)
        if known is not None:
            return known
        if await self._purchase(payment):
            return await self._signups.tenant_of(payment.customer_id)
        for subscription_id in payment.subscription_ids:
            await self._subscriptions.refresh(subscription_id)
        return await self._tenant(payment.customer_id)

    async def _grant(self, tenant: Tenant, payment: Payment) -> None:
        for credit in await self._purchase(payment):
            sold = (credit.unit, credit.amount, credit.expires_at_ms, credit.adapters, credit.price)
            await self._ledger.grant(Grant(credit.source, tenant.id, *sold))

    async def _purchase(self, payment: Payment) -> tuple[PurchasedCredit, ...]:
        """What this payment buys, as it was when the payment was first seen."""
        known = await self._inbox.purchase(payment.id)
        return await self._inbox.fix_purchase(payment.id, await self._credits(payment)) if known is None else known

    async def _credits(self, payment: Payment) -> list[PurchasedCredit]:
        """What the cart's packs grant by the terms of their products. A plan grants by its subscription, not here."""
        lines = payment.lines
        if not lines and not payment.subscription_ids:
            lines = (await self._dodo.retrieve_payment(payment.id)).lines
            if not lines:
                raise NotYet(f"payment {payment.id} names no product")
        quantities: dict[str, int] = {}
        for line in lines:
            quantities[line.product_id] = quantities.get(line.product_id, 0) + line.quantity
        credits_: list[PurchasedCredit] = []
        for product_id, quantity in sorted(quantities.items()):
            sold = await self._products.terms(product_id)
            if sold is None:
                raise NotYet(f"product {product_id} of payment {payment.id} is no pack of ours")
            if sold.kind == "plan":
                continue
            if quantity < 1:
                raise NotYet(f"payment {payment.id} has {quantity} of {product_id}")
            grants = sold.grants
            assert grants is not None, "a pack grants something"
            paid_at = payment.created_at_ms if payment.created_at_ms is not None else self._clock()
            expires = None if sold.expires_days is None else paid_at + sold.expires_days * DAY_MS
            source, amount, price = (
                f"payment:{payment.id}:{product_id}",
                grants.amount * quantity,
                sold.price * quantity,
            )
            credits_.append(PurchasedCredit(source, grants.unit, amount, expires, grants.adapters, price))
        return credits_

    async def refunded(self, refund: Refund) -> None:
        """Claw back the refunded share of what the payment grants, rounded up, never more than that.

        A refund grants nothing: where its payment has not succeeded yet, the clawback waits for the grant.
        """
        for clawback in await self._reversal(f"refund:{refund.id}", refund.payment_id, refund.amount):
            await self._ledger.claw_back(clawback)
        payment = await self._dodo.retrieve_payment(refund.payment_id)
        await self._cash.book(refund_entry(refund, payment, (await self._tenant(payment.customer_id)).id))

    async def disputed(self, dispute_id: str) -> None:
        """Claw back the disputed share while the dispute is open or lost; restore it where it was won or dropped.

        The event may be stale, so Dodo is asked for the dispute as it stands.
        """
        dispute = await self._dodo.retrieve_dispute(dispute_id)
        for clawback in await self._reversal(f"dispute:{dispute.id}", dispute.payment_id, dispute.amount):
            await self._ledger.claw_back(clawback)
            if dispute.is_settled_for_us:
                await self._ledger.restore(clawback)
        payment = await self._dodo.retrieve_payment(dispute.payment_id)
        tenant = await self._tenant(payment.customer_id)
        won, lost = dispute.is_settled_for_us, dispute.status in LOST
        for kind in (Kind.DISPUTE_OPENED, *([Kind.DISPUTE_WON] if won else [Kind.DISPUTE_LOST] if lost else [])):
            await self._cash.book(dispute_entry(dispute, payment, tenant.id, kind))

    async def _reversal(self, source: str, payment_id: str, amount: int | None) -> list[Clawback]:
        """The share of each of a payment's grants that ``amount`` of its minor units stands for; ``None`` is all."""
        payment = await self._dodo.retrieve_payment(payment_id)
        tenant = await self._tenant(payment.customer_id)
        paid = payment.total_amount
        taken = paid if amount is None else min(max(amount, 0), paid)
        clawbacks = []
        for credit in await self._purchase(payment):
            share = credit.amount if taken == paid else divide_up(credit.amount * taken, paid)
            if share:
                product_id = credit.source.rpartition(":")[2]
                clawbacks.append(Clawback(f"{source}:{product_id}", tenant.id, credit.source, share))
        return clawbacks

    async def _repay(self, tenant: Tenant, payment: Payment, subscription_id: str) -> int:
        """Lower the exposure by what this payment invoiced: the usage of the period that it closes. Its cents."""
        meter_id = await id_of(self._redis, CHARGE_METER)
        if not meter_id:
            raise NotYet("no meter was made at Dodo yet")
        period = _closed_period(payment, subscription_id, await self._dodo.usage_history(subscription_id))
        if period is None:
            raise NotYet(f"the period of {subscription_id} that payment {payment.id} bills has no usage yet")
        if nanos := period.units.get(meter_id, 0):
            await self._ledger.repay_overage(f"payment:{payment.id}:{subscription_id}", tenant.id, nanos)
        return period.cents.get(meter_id, 0)

    async def _tenant(self, customer_id: str) -> Tenant:
        tenant = await self._tenants.by_customer(customer_id)
        if tenant is None:
            raise NotYet(f"no tenant has Dodo customer {customer_id}")
        return tenant


def _closed_period(payment: Payment, subscription_id: str, periods: Iterable[UsagePeriod]) -> UsagePeriod | None:
    """The period whose usage a payment bills: it ends closest to where the paid one starts, or else to the payment."""
    starts_ms = payment.service_starts_ms.get(subscription_id)
    if starts_ms is not None:
        near = (p for p in periods if abs(p.end_ms - starts_ms) <= HOUR_MS)
        return min(near, key=lambda p: abs(p.end_ms - starts_ms), default=None)
    paid_at_ms = payment.created_at_ms or 0
    ended = (p for p in periods if p.end_ms <= paid_at_ms + HOUR_MS)
    return min(ended, key=lambda p: abs(p.end_ms - paid_at_ms), default=None)
