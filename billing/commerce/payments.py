"""Apply payments, refunds and disputes to a tenant's credit, in any order and any number of times.

Only a succeeded payment grants, by quantity and by the terms stored with the product that was paid for. Refunds and
disputes claw back their share of it, together never more than it granted.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress

from billing.commerce.allowances import Periods, allowance_of, clawback_of
from billing.commerce.cash import NO_TENANT, CashBook, Fee, Kind, dispute_entry, payment_entry, refund_entry, sold_for
from billing.commerce.context import Commerce
from billing.commerce.dodo_ids import id_of
from billing.commerce.doubles import subscription_in
from billing.commerce.foreign import foreign_among
from billing.commerce.inbox import CHARGE_METER, Inbox, PurchasedCredit
from billing.commerce.products import Products
from billing.commerce.refund_lines import line_of, refunded_lines
from billing.commerce.signups import Signups
from billing.commerce.subscriptions import DAY_MS, Subscriptions
from billing.commerce.waiting import NotOurs, NotYet
from billing.dodo.wire import Dispute, InvoiceLine, Payment, Refund, UsagePeriod
from billing.ledger.account import Clawback, Grant
from billing.money import Nanos, divide_up
from billing.tenants.tenant import Tenant
from billing.usage import TenantId

HOUR_MS = 60 * 60_000
OVER = 1
"""A period that is past, for what no longer keeps credit from being extended."""
SUCCEEDED = "succeeded"
"""The status of a payment or a refund that has moved money."""
LOST = ("dispute_lost", "dispute_accepted", "dispute_expired")


class Payments:
    """Turns Dodo's payments, refunds and disputes into grants, clawbacks, restorations and repayments."""

    def __init__(self, commerce: Commerce) -> None:
        self._dodo, self._ledger, self._tenants = commerce.dodo, commerce.ledger, commerce.tenants
        self._redis, self._clock = commerce.redis, commerce.clock
        self._inbox, self._products = Inbox(commerce.redis), Products(commerce.redis)
        self._cash, self._periods = CashBook(commerce.redis), Periods(commerce.redis)
        self._subscriptions, self._signups = Subscriptions(commerce), Signups(commerce)

    async def succeeded(self, payment: Payment) -> set[str]:
        """Grant what the cart buys, take invoiced usage off the exposure, and book what was paid.

        Returns:
            Products in the cart that are not ours: they grant nothing.

        Raises:
            NotOurs: nothing in the cart is ours.
        """
        payment = await self._complete(payment)
        known = await self._inbox.purchase(payment.id)
        if known and known[0].tenant:  # a person has booked it
            await self._grant(TenantId(known[0].tenant), payment.id, known)
            await self._cash.book(payment_entry(payment, TenantId(known[0].tenant), known))
            return set()
        try:
            foreign = await self._foreign(payment, known or ())
        except NotOurs:
            await self._cash.book(payment_entry(payment, await self._owner(payment), is_foreign=True))
            raise
        credits_ = known or await self._credits(payment)
        tenant = await self._buyer(payment, credits_)
        await self._grant(tenant.id, payment.id, credits_)
        usage_cents, fees = 0, list[tuple[Fee, Nanos]]()
        for subscription_id in payment.subscription_ids:
            try:
                refreshed = await self._subscriptions.refresh(subscription_id)
            except NotOurs as reason:  # the rest of the cart is
                foreign |= set(reason.products)
                continue
            fees += await self._fee(refreshed, payment, subscription_id)
            if payment.includes_usage and not await self._subscriptions.is_given_back(payment, subscription_id):
                usage_cents += await self._repay(tenant, payment, subscription_id)
        packs = [credit for credit in credits_ if not credit.is_allowance]
        await self._cash.book(payment_entry(payment, tenant.id, packs, fees, usage_cents, bool(foreign)))
        return foreign

    async def _fee(self, tenant: Tenant, payment: Payment, subscription_id: str) -> list[tuple[Fee, Nanos]]:
        """The period whose fee this payment pays, if it pays one, and its list price."""
        starts_ms, ends_ms = (of.get(subscription_id) for of in (payment.service_starts_ms, payment.service_ends_ms))
        if starts_ms is None or ends_ms is None:
            return []
        subscription = tenant.subscription
        if subscription is None or subscription.id != subscription_id:
            return [(Fee(subscription_id, starts_ms, ends_ms), Nanos(0))]
        starts_ms, product_id = await self._periods.paid(subscription_id, starts_ms)  # as the allowance's name has it
        sold = await self._products.terms(product_id) if product_id else subscription.sold
        return [(Fee(subscription_id, starts_ms, ends_ms), Nanos(sold.price if sold else 0))]

    async def _owner(self, payment: Payment) -> TenantId:
        """Whose payment it is: the tenant that a person booked it for, or the customer's, or ``NO_TENANT``."""
        known = await self._inbox.purchase(payment.id)
        if known and known[0].tenant:
            return TenantId(known[0].tenant)
        tenant = await self._tenants.by_customer(payment.customer_id)
        return NO_TENANT if tenant is None else tenant.id

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
        granted = {credit.source.rpartition(":")[2] for credit in known}
        foreign = await foreign_among(self._dodo, self._products, products - granted)
        if foreign == products:  # the cart may leave out what recurs
            subscriptions = [await self._dodo.retrieve_subscription(one) for one in payment.subscription_ids]
            products |= {one.product_id for one in subscriptions}
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
            with suppress(NotOurs):
                await self._subscriptions.refresh(subscription_id)
        return await self._tenant(payment.customer_id)

    async def _grant(self, tenant: TenantId, payment_id: str, credits_: Sequence[PurchasedCredit]) -> None:
        """Fix what this payment buys, and grant it: to this tenant, or to whom a person booked it for meanwhile.

        An allowance is not granted: holds put it in place.
        """
        for credit in await self._inbox.fix_purchase(payment_id, credits_):
            if credit.is_allowance:
                continue
            to = TenantId(credit.tenant) if credit.tenant else tenant
            sold = (credit.unit, credit.amount, credit.expires_at_ms, credit.adapters, credit.price)
            await self._ledger.grant(Grant(credit.source, to, *sold))

    async def _credits(self, payment: Payment) -> list[PurchasedCredit]:
        """What the cart's packs grant by the terms of their products, and the allowance that a plan's fee buys."""
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
            source, amount, price = (
                f"payment:{payment.id}:{product_id}",
                grants.amount * quantity,
                sold.price * quantity,
            )
            sale = PurchasedCredit(source, grants.unit, amount, expires, grants.adapters, price=price)
            credits_.append(sale)
        if len(credits_) == len(quantities) and not payment.subscription_ids:
            credits_ = sold_for(payment, credits_)
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
        starts_ms, product_id = await self._periods.paid(subscription_id, starts_ms, found)
        if starts_ms == found.period_start_ms:
            ends_ms = found.period_end_ms
        bought = [await self._products.terms(line.product_id) for line in payment.lines]
        sold = next((one for one in bought if one is not None and one.kind == "plan"), None)
        if product_id or sold is None or len(payment.subscription_ids) > 1:
            sold = await self._products.terms(product_id or found.product_id)
        return None if sold is None else allowance_of(sold, subscription_id, starts_ms, ends_ms)

    async def refunded(self, refund: Refund) -> None:
        """Claw back the refunded share of what the payment grants, rounded up, never more than that.

        A refund grants nothing: where its payment has not succeeded yet, the clawback waits for the grant.
        """
        if refund.status != SUCCEEDED:
            raise NotYet(f"refund {refund.id} is {refund.status}")
        payment = await self._dodo.retrieve_payment(refund.payment_id)
        try:
            lines = await refunded_lines(self._dodo, payment, refund.amount)
            clawbacks = await self._reversal(f"refund:{refund.id}", payment, refund.amount, lines, refund.reason)
            for clawback in clawbacks:
                # A refund that came later changes the lines, and so what this one would take.
                if not await self._ledger.has_moved(clawback.tenant, clawback.source):
                    await self._ledger.claw_back(clawback)
        except NotOurs:
            await self._cash.book(refund_entry(refund, payment, await self._owner(payment)))
            raise
        if payment.refund_status == "full" or refund.amount in (None, payment.total_amount):
            await self._pause_credit(payment, f"refund:{refund.id}", is_open=False)
        what = await self._only_refunded(payment, lines)
        await self._cash.book(refund_entry(refund, payment, await self._owner(payment), what))

    async def _only_refunded(self, payment: Payment, lines: Sequence[InvoiceLine]) -> str:
        """``pack`` or ``fee``, where one such line of a payment is all that was refunded of it; else empty."""
        refunded = [line for line in lines if line.refunded]
        for credit in await self._inbox.purchase(payment.id) or ():
            if len(refunded) == 1 and await line_of(self._dodo, lines, credit) == refunded[0]:
                return "fee" if credit.is_allowance else "pack"
        return ""

    async def disputed(self, dispute_id: str) -> None:
        """Claw back the disputed share while the dispute is open or lost; restore it where it was won or dropped.

        The event may be stale, so Dodo is asked for the dispute as it stands.
        """
        dispute = await self._dodo.retrieve_dispute(dispute_id)
        payment = await self._dodo.retrieve_payment(dispute.payment_id)
        try:
            for clawback in await self._reversal(f"dispute:{dispute.id}", payment, dispute.amount):
                await self._ledger.claw_back(clawback)
                if dispute.is_settled_for_us:
                    await self._ledger.restore(clawback)
        except NotOurs:
            await self._book_dispute(dispute, payment)
            raise
        is_open = not dispute.is_settled_for_us and dispute.status not in LOST
        await self._pause_credit(payment, f"dispute:{dispute.id}", is_open, dispute.is_settled_for_us)
        await self._book_dispute(dispute, payment)

    async def _pause_credit(
        self, payment: Payment, source: str, is_open: bool, is_settled_for_us: bool = False
    ) -> None:
        """Extend no credit while a fee is disputed, nor in the period of a fee that was lost or refunded in full."""
        for subscription_id, starts_ms in payment.service_starts_ms.items():
            try:
                tenant = await self._subscriptions.refresh(subscription_id)
            except NotOurs:  # credit is extended on ours only
                continue
            period_ms, _ = await self._periods.paid(subscription_id, starts_ms)
            settled_ms = OVER if is_settled_for_us else period_ms
            await self._subscriptions.pause_credit(tenant, subscription_id, source, 0 if is_open else settled_ms)

    async def _book_dispute(self, dispute: Dispute, payment: Payment) -> None:
        won, lost = dispute.is_settled_for_us, dispute.status in LOST
        for kind in (Kind.DISPUTE_OPENED, *([Kind.DISPUTE_WON] if won else [Kind.DISPUTE_LOST] if lost else [])):
            await self._cash.book(dispute_entry(dispute, payment, await self._owner(payment), kind))

    async def _reversal(
        self,
        source: str,
        payment: Payment,
        amount: int | None,
        lines: Sequence[InvoiceLine] = (),
        reason: str = "",
    ) -> list[Clawback]:
        """The share of each of a payment's grants that ``amount`` of its minor units stands for; ``None`` is all.

        Where ``lines`` say what was refunded of the line that bought a grant, it is the share of that. A refund that we
        made ourselves, as its reason says, is of one subscription's fee and takes that allowance.

        Raises:
            NotOurs: nothing that was paid for is ours, and no person has booked it.
        """
        credits_ = await self._inbox.purchase(payment.id)
        if credits_ is None:
            await self._foreign(payment)
            await self._tenant(payment.customer_id)
            credits_ = await self._inbox.fix_purchase(payment.id, await self._credits(payment))
        paid = payment.total_amount
        taken = paid if amount is None else min(max(amount, 0), paid)
        if fee_of := subscription_in(reason):
            credits_ = tuple(one for one in credits_ if one.source.startswith(f"allowance:{fee_of}:"))
            taken = paid
        clawbacks = []
        for credit in credits_:
            line = None if fee_of else await line_of(self._dodo, lines, credit)
            part, whole = (taken, paid) if line is None else (min(taken, line.refunded), line.total)
            share = credit.amount if part == whole else divide_up(credit.amount * part, whole)
            if share:
                about = credit.source if credit.is_allowance else credit.source.rpartition(":")[2]
                owner = TenantId(credit.tenant) if credit.tenant else (await self._tenant(payment.customer_id)).id
                clawbacks.append(clawback_of(f"{source}:{about}", owner, credit, share))
        return clawbacks

    async def _repay(self, tenant: Tenant, payment: Payment, subscription_id: str) -> int:
        """Lower the exposure by what this payment invoiced: the usage of the period that it closes. Its cents."""
        meter_id = await id_of(self._redis, CHARGE_METER)
        if not meter_id:
            raise NotYet("no meter was made at Dodo yet")
        history = await self._dodo.usage_history(subscription_id)
        period = _closed_period(payment, subscription_id, history, self._clock())
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
