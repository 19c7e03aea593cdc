"""Apply payments, refunds and disputes to a tenant's credit, in any order and any number of times.

Only a succeeded payment grants, by quantity and by the terms stored with the product that was paid for. Refunds and
disputes claw back their share of it, together never more than it granted.
"""

from collections.abc import Iterable, Sequence

from billing.commerce.context import Commerce
from billing.commerce.dodo_ids import id_of
from billing.commerce.foreign import foreign_among
from billing.commerce.inbox import CHARGE_METER, Inbox, PurchasedCredit
from billing.commerce.products import Products
from billing.commerce.signups import Signups
from billing.commerce.subscriptions import DAY_MS, Subscriptions
from billing.commerce.waiting import NotOurs, NotYet
from billing.dodo.wire import Payment, Refund, UsagePeriod
from billing.ledger.account import Clawback, Grant
from billing.money import divide_up
from billing.tenants.tenant import Tenant
from billing.usage import TenantId

HOUR_MS = 60 * 60_000
SUCCEEDED = "succeeded"
"""The status of a payment or a refund that has moved money."""


class Payments:
    """Turns Dodo's payments, refunds and disputes into grants, clawbacks, restorations and repayments."""

    def __init__(self, commerce: Commerce) -> None:
        self._dodo, self._ledger, self._tenants = commerce.dodo, commerce.ledger, commerce.tenants
        self._redis, self._clock = commerce.redis, commerce.clock
        self._inbox, self._products = Inbox(commerce.redis), Products(commerce.redis)
        self._subscriptions, self._signups = Subscriptions(commerce), Signups(commerce)

    async def succeeded(self, payment: Payment) -> set[str]:
        """Grant what the cart buys, and take invoiced usage off the exposure.

        Returns:
            Products in the cart that are not ours: they grant nothing.

        Raises:
            NotOurs: nothing in the cart is ours.
        """
        payment = await self._complete(payment)
        known = await self._inbox.purchase(payment.id)
        if known and known[0].tenant:  # a person has booked it
            await self._grant(TenantId(known[0].tenant), payment.id, known)
            return set()
        foreign = await self._foreign(payment, known or ())
        credits_ = known or await self._credits(payment)
        tenant = await self._buyer(payment, credits_)
        await self._grant(tenant.id, payment.id, credits_)
        for subscription_id in payment.subscription_ids:
            if payment.includes_usage:
                await self._repay(tenant, payment, subscription_id)
            await self._subscriptions.refresh(subscription_id)
        return foreign

    async def _complete(self, payment: Payment) -> Payment:
        """Itself, or as Dodo has it now, where it does not say that it succeeded or what it is for."""
        if payment.status == SUCCEEDED and (payment.lines or payment.subscription_ids):
            return payment
        found = await self._dodo.retrieve_payment(payment.id)
        if found.status != SUCCEEDED:
            raise NotYet(f"payment {found.id} is {found.status or 'without a status'}")
        return found

    async def _foreign(self, payment: Payment, known: Sequence[PurchasedCredit] = ()) -> set[str]:
        """Products of a payment that are not ours. Raises NotOurs where none is, NotYet where one may become ours."""
        products = {line.product_id for line in payment.lines}
        if not products:
            subscriptions = [await self._dodo.retrieve_subscription(one) for one in payment.subscription_ids]
            products = {one.product_id for one in subscriptions}
        granted = {credit.source.rpartition(":")[2] for credit in known}
        foreign = await foreign_among(self._dodo, self._products, products - granted)
        if foreign and foreign == products:
            raise NotOurs(f"payment {payment.id}", foreign)
        return foreign

    async def _buyer(self, payment: Payment, credits_: Sequence[PurchasedCredit]) -> Tenant:
        """The tenant that paid. A customer becomes one by buying something of ours, and not otherwise."""
        known = await self._tenants.by_customer(payment.customer_id)
        if known is not None:
            return known
        if credits_:
            return await self._signups.tenant_of(payment.customer_id)
        for subscription_id in payment.subscription_ids:
            await self._subscriptions.refresh(subscription_id)
        return await self._tenant(payment.customer_id)

    async def _grant(self, tenant: TenantId, payment_id: str, credits_: Sequence[PurchasedCredit]) -> None:
        """Fix what this payment buys, and grant it: to this tenant, or to whom a person booked it for meanwhile."""
        for credit in await self._inbox.fix_purchase(payment_id, credits_):
            to = TenantId(credit.tenant) if credit.tenant else tenant
            await self._ledger.grant(
                Grant(credit.source, to, credit.unit, credit.amount, credit.expires_at_ms, credit.adapters)
            )

    async def _credits(self, payment: Payment) -> list[PurchasedCredit]:
        """What the cart's packs grant by the terms of their products. A plan grants by its subscription, not here."""
        if not payment.lines and not payment.subscription_ids:
            raise NotYet(f"payment {payment.id} names no product")
        quantities: dict[str, int] = {}
        for line in payment.lines:
            quantities[line.product_id] = quantities.get(line.product_id, 0) + line.quantity
        credits_: list[PurchasedCredit] = []
        for product_id, quantity in sorted(quantities.items()):
            sold = await self._products.terms(product_id)
            if sold is None or sold.kind == "plan":
                continue
            if quantity < 1:
                raise NotYet(f"payment {payment.id} has {quantity} of {product_id}")
            grants = sold.grants
            assert grants is not None, "a pack grants something"
            # It lasts from when we grant it: the payment's own time may be late, or by another clock.
            expires = None if sold.expires_days is None else self._clock() + sold.expires_days * DAY_MS
            source = f"payment:{payment.id}:{product_id}"
            credits_.append(PurchasedCredit(source, grants.unit, grants.amount * quantity, expires, grants.adapters))
        return credits_

    async def refunded(self, refund: Refund) -> None:
        """Claw back the refunded share of what the payment grants, rounded up, never more than that.

        A refund grants nothing: where its payment has not succeeded yet, the clawback waits for the grant.
        """
        if refund.status != SUCCEEDED:
            raise NotYet(f"refund {refund.id} is {refund.status}")
        for clawback in await self._reversal(f"refund:{refund.id}", refund.payment_id, refund.amount):
            await self._ledger.claw_back(clawback)

    async def disputed(self, dispute_id: str) -> None:
        """Claw back the disputed share while the dispute is open or lost; restore it where it was won or dropped.

        The event may be stale, so Dodo is asked for the dispute as it stands.
        """
        dispute = await self._dodo.retrieve_dispute(dispute_id)
        for clawback in await self._reversal(f"dispute:{dispute.id}", dispute.payment_id, dispute.amount):
            await self._ledger.claw_back(clawback)
            if dispute.is_settled_for_us:
                await self._ledger.restore(clawback)

    async def _reversal(self, source: str, payment_id: str, amount: int | None) -> list[Clawback]:
        """The share of each of a payment's grants that ``amount`` of its minor units stands for; ``None`` is all.

        Raises:
            NotOurs: nothing that was paid for is ours, and nobody has booked it.
        """
        payment = await self._dodo.retrieve_payment(payment_id)
        credits_ = await self._inbox.purchase(payment.id)
        if credits_ is None:
            await self._foreign(payment)
            await self._tenant(payment.customer_id)
            credits_ = await self._inbox.fix_purchase(payment.id, await self._credits(payment))
        paid = payment.total_amount
        taken = paid if amount is None else min(max(amount, 0), paid)
        clawbacks = []
        for credit in credits_:
            share = credit.amount if taken == paid else divide_up(credit.amount * taken, paid)
            if share:
                product_id = credit.source.rpartition(":")[2]
                owner = TenantId(credit.tenant) if credit.tenant else (await self._tenant(payment.customer_id)).id
                clawbacks.append(Clawback(f"{source}:{product_id}", owner, credit.source, share))
        return clawbacks

    async def _repay(self, tenant: Tenant, payment: Payment, subscription_id: str) -> None:
        """Lower the exposure by what this payment invoiced: the usage of the period that it closes."""
        meter_id = await id_of(self._redis, CHARGE_METER)
        if not meter_id:
            raise NotYet("no meter was made at Dodo yet")
        history = await self._dodo.usage_history(subscription_id)
        period = _closed_period(payment, subscription_id, history, self._clock())
        if period is None:
            raise NotYet(f"the period of {subscription_id} that payment {payment.id} bills has no usage yet")
        if nanos := period.units.get(meter_id, 0):
            await self._ledger.repay_overage(f"payment:{payment.id}:{subscription_id}", tenant.id, nanos)

    async def _tenant(self, customer_id: str) -> Tenant:
        tenant = await self._tenants.by_customer(customer_id)
        if tenant is None:
            raise NotYet(f"no tenant has Dodo customer {customer_id}")
        return tenant


def _closed_period(
    payment: Payment, subscription_id: str, periods: Iterable[UsagePeriod], now_ms: int
) -> UsagePeriod | None:
    """The period whose usage a payment bills: it ends closest to where the paid one starts, or else to the payment,
    which was made before ``now_ms`` whatever time it bears.
    """
    starts_ms = payment.service_starts_ms.get(subscription_id)
    if starts_ms is not None:
        near = (p for p in periods if abs(p.end_ms - starts_ms) <= HOUR_MS)
        return min(near, key=lambda p: abs(p.end_ms - starts_ms), default=None)
    paid_at_ms = min(payment.created_at_ms or 0, now_ms)
    ended = (p for p in periods if p.end_ms <= paid_at_ms + HOUR_MS)
    return min(ended, key=lambda p: abs(p.end_ms - paid_at_ms), default=None)
