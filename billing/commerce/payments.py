"""Apply payments, refunds and disputes to a tenant's credit, in any order and any number of times.

Only a succeeded payment grants, by quantity and by the terms stored with the product that was paid for. Refunds and
disputes claw back their share of it, together never more than it granted.
"""

from collections.abc import Iterable

from billing.commerce.context import Commerce
from billing.commerce.dodo_ids import id_of
from billing.commerce.inbox import CHARGE_METER, Inbox, PurchasedCredit
from billing.commerce.plan_changes import LeftPeriod
from billing.commerce.products import Products
from billing.commerce.signups import Signups
from billing.commerce.subscriptions import DAY_MS, Subscriptions
from billing.commerce.waiting import NotYet
from billing.dodo.wire import Payment, Refund, UsagePeriod
from billing.ledger.account import Bucket, Clawback, Grant
from billing.ledger.admission import allowance_period
from billing.money import divide_up
from billing.tenants.tenant import Tenant
from billing.usage import BucketId

HOUR_MS = 60 * 60_000
SAME_PERIOD_MS = 60_000
"""How far Dodo may date the beginning of a period apart in its payment and in its subscription."""
OVER = 1
"""A moment that is past, for what no longer keeps credit from being extended."""


class Payments:
    """Turns Dodo's payments, refunds and disputes into grants, clawbacks, restorations and repayments."""

    def __init__(self, commerce: Commerce) -> None:
        self._dodo, self._ledger, self._tenants = commerce.dodo, commerce.ledger, commerce.tenants
        self._redis, self._clock = commerce.redis, commerce.clock
        self._inbox, self._products = Inbox(commerce.redis), Products(commerce.redis)
        self._subscriptions, self._signups = Subscriptions(commerce), Signups(commerce)

    async def succeeded(self, payment: Payment) -> None:
        """Grant what the cart buys, and take invoiced usage off the exposure."""
        if payment.status not in ("succeeded", ""):
            raise NotYet(f"payment {payment.id} is {payment.status}")
        tenant = await self._buyer(payment)
        await self._grant(tenant, payment)
        for subscription_id in payment.subscription_ids:
            await self._take_back_unused(tenant, payment, subscription_id)
            await self._subscriptions.refresh(subscription_id)
            if payment.includes_usage and not await self._subscriptions.is_doubled(subscription_id):
                await self._repay(tenant, payment, subscription_id)

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
            if credit.is_allowance:
                continue
            grant = Grant(credit.source, tenant.id, credit.unit, credit.amount, credit.expires_at_ms, credit.adapters)
            await self._ledger.grant(grant)

    async def _purchase(self, payment: Payment) -> tuple[PurchasedCredit, ...]:
        """What this payment buys, as it was when the payment was first seen."""
        known = await self._inbox.purchase(payment.id)
        return await self._inbox.fix_purchase(payment.id, await self._credits(payment)) if known is None else known

    async def _credits(self, payment: Payment) -> list[PurchasedCredit]:
        """What the cart's packs grant by the terms of their products, and the allowance that a plan's fee buys."""
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
            source = f"payment:{payment.id}:{product_id}"
            credits_.append(PurchasedCredit(source, grants.unit, grants.amount * quantity, expires, grants.adapters))
        for subscription_id in payment.subscription_ids:
            if allowance := await self._allowance(payment, subscription_id):
                credits_.append(allowance)
        return credits_

    async def _allowance(self, payment: Payment, subscription_id: str) -> PurchasedCredit | None:
        """The allowance of the period whose fee this payment pays; ``None`` where it pays none, or none is sold."""
        starts_ms, ends_ms = (of.get(subscription_id) for of in (payment.service_starts_ms, payment.service_ends_ms))
        if starts_ms is None or ends_ms is None:
            return None
        found = await self._dodo.retrieve_subscription(subscription_id)
        if abs(found.period_start_ms - starts_ms) <= SAME_PERIOD_MS:
            starts_ms, ends_ms = found.period_start_ms, found.period_end_ms
        bought = [await self._products.terms(line.product_id) for line in payment.lines]
        sold = next((one for one in bought if one is not None and one.kind == "plan"), None)
        if sold is None or len(payment.subscription_ids) > 1:
            sold = await self._products.terms(found.product_id)
        if sold is None or sold.grants is None:
            return None
        source = f"{allowance_period(subscription_id, starts_ms)}:{sold.plain_name}"
        return PurchasedCredit(source, sold.grants.unit, sold.grants.amount, ends_ms, sold.grants.adapters, True)

    async def _take_back_unused(self, tenant: Tenant, payment: Payment, subscription_id: str) -> None:
        """Claw back, of the allowance that a plan change of ours left, the share of its fee that Dodo took off.

        That is the share of the period that was left. What was spent of it already is a debt.
        """
        left, changed_ms = LeftPeriod.read(payment.metadata), payment.service_starts_ms.get(subscription_id)
        sold = await self._products.terms(left.product_id) if left is not None else None
        if left is None or changed_ms is None or sold is None or sold.grants is None:
            return
        unused_ms, quota = min(max(0, left.ends_ms - changed_ms), left.ends_ms - left.starts_ms), sold.grants
        source = f"{allowance_period(subscription_id, left.starts_ms)}:{sold.plain_name}"
        credit = PurchasedCredit(source, quota.unit, quota.amount, left.ends_ms, quota.adapters, True)
        if share := divide_up(credit.amount * unused_ms, left.ends_ms - left.starts_ms):
            await self._ledger.claw_back(_clawback(f"plan_change:{payment.id}", tenant, credit, share))

    async def refunded(self, refund: Refund) -> None:
        """Claw back the refunded share of what the payment grants, rounded up, never more than that.

        A refund grants nothing: where its payment has not succeeded yet, the clawback waits for the grant.
        """
        payment, source = await self._dodo.retrieve_payment(refund.payment_id), f"refund:{refund.id}"
        for clawback in await self._reversal(source, payment, refund.amount):
            await self._ledger.claw_back(clawback)
        if payment.refund_status == "full" or refund.amount in (None, payment.total_amount):
            await self._pause_credit(payment, source, is_open=False)

    async def disputed(self, dispute_id: str) -> None:
        """Claw back the disputed share while the dispute is open or lost; restore it where it was won or dropped.

        The event may be stale, so Dodo is asked for the dispute as it stands.
        """
        dispute = await self._dodo.retrieve_dispute(dispute_id)
        payment, source = await self._dodo.retrieve_payment(dispute.payment_id), f"dispute:{dispute.id}"
        for clawback in await self._reversal(source, payment, dispute.amount):
            await self._ledger.claw_back(clawback)
            if dispute.is_settled_for_us:
                await self._ledger.restore(clawback)
        await self._pause_credit(payment, source, dispute.is_open, dispute.is_settled_for_us)

    async def _pause_credit(
        self, payment: Payment, source: str, is_open: bool, is_settled_for_us: bool = False
    ) -> None:
        """Extend no credit while a fee is disputed, nor in the period of a fee that was lost or refunded in full."""
        for subscription_id, ends_ms in payment.service_ends_ms.items():
            tenant = await self._subscriptions.refresh(subscription_id)
            until_ms = OVER if is_settled_for_us else 0 if is_open else ends_ms
            await self._subscriptions.pause_credit(tenant, subscription_id, source, until_ms)

    async def _reversal(self, source: str, payment: Payment, amount: int | None) -> list[Clawback]:
        """The share of each of a payment's grants that ``amount`` of its minor units stands for; ``None`` is all."""
        tenant = await self._tenant(payment.customer_id)
        paid = payment.total_amount
        taken = paid if amount is None else min(max(amount, 0), paid)
        clawbacks = []
        for credit in await self._purchase(payment):
            share = credit.amount if taken == paid else divide_up(credit.amount * taken, paid)
            if share:
                about = credit.source if credit.is_allowance else credit.source.rpartition(":")[2]
                clawbacks.append(_clawback(f"{source}:{about}", tenant, credit, share))
        return clawbacks

    async def _repay(self, tenant: Tenant, payment: Payment, subscription_id: str) -> None:
        """Lower the exposure by what this payment invoiced: the usage of the period that it closes."""
        meter_id = await id_of(self._redis, CHARGE_METER)
        if not meter_id:
            raise NotYet("no meter was made at Dodo yet")
        period = _closed_period(payment, subscription_id, await self._dodo.usage_history(subscription_id))
        if period is None:
            raise NotYet(f"the period of {subscription_id} that payment {payment.id} bills has no usage yet")
        if nanos := period.units.get(meter_id, 0):
            await self._ledger.repay_overage(f"payment:{payment.id}:{subscription_id}", tenant.id, nanos)

    async def _tenant(self, customer_id: str) -> Tenant:
        tenant = await self._tenants.by_customer(customer_id)
        if tenant is None:
            raise NotYet(f"no tenant has Dodo customer {customer_id}")
        return tenant


def _clawback(source: str, tenant: Tenant, credit: PurchasedCredit, amount: int) -> Clawback:
    if not credit.is_allowance:
        return Clawback(source, tenant.id, credit.source, amount)
    whole = (credit.unit, credit.amount, credit.amount, credit.expires_at_ms, credit.adapters)
    allowance = Bucket(BucketId(credit.source), *whole, is_allowance=True)
    return Clawback(source, tenant.id, credit.source, amount, allowance)


def _closed_period(payment: Payment, subscription_id: str, periods: Iterable[UsagePeriod]) -> UsagePeriod | None:
    """The period whose usage a payment bills: it ends closest to where the paid one starts, or else to the payment."""
    starts_ms = payment.service_starts_ms.get(subscription_id)
    if starts_ms is not None:
        near = (p for p in periods if abs(p.end_ms - starts_ms) <= HOUR_MS)
        return min(near, key=lambda p: abs(p.end_ms - starts_ms), default=None)
    paid_at_ms = payment.created_at_ms or 0
    ended = (p for p in periods if p.end_ms <= paid_at_ms + HOUR_MS)
    return min(ended, key=lambda p: abs(p.end_ms - paid_at_ms), default=None)
