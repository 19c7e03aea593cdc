"""What a person decides about a delivery that waits or is set aside: book its payment by hand, or drop it.

Safe to repeat: a command that was cut off is given again.
"""

from dataclasses import dataclass, replace

from redis.asyncio import Redis

from billing.clock import Clock, now_ms
from billing.commerce.alerts import payment_of
from billing.commerce.cash import CashBook, net_nanos, payment_entry
from billing.commerce.inbox import OPEN, Delivery, Inbox, Outcome, PurchasedCredit
from billing.commerce.subscriptions import DAY_MS
from billing.commerce.webhooks import PAYMENT
from billing.dodo.fields import WireError, inner, read_json
from billing.dodo.wire import Payment
from billing.errors import Refusal
from billing.ledger.account import Grant
from billing.ledger.errors import GrantRefused
from billing.ledger.ledger import Ledger
from billing.money import MAX_GRANT_NANOS
from billing.notices.log import Notices
from billing.notices.notice import Notice, NoticeKind
from billing.tenants.directory import Tenants
from billing.usage import TenantId, Unit

BY_HAND = "by-hand"
MOST_OPEN = 100_000


@dataclass(eq=False)
class NotDecidable(Refusal):
    """This cannot be decided about the delivery; the message says why, and what to do."""

    message: str

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class Booking:
    """Credit that a payment stands for, as a person decides."""

    tenant: TenantId
    unit: Unit
    amount: int
    expires_days: int = 0
    """From the payment on; 0 for never."""
    adapters: tuple[str, ...] = ()


class Decisions:
    def __init__(self, redis: Redis, clock: Clock = now_ms) -> None:
        self._inbox, self._ledger, self._tenants = Inbox(redis), Ledger(redis, clock), Tenants(redis, clock)
        self._notices, self._cash, self._clock = Notices(redis), CashBook(redis), clock

    async def drop(self, webhook_id: str, reason: str) -> Delivery:
        """End a delivery without applying it. A notice records the reason.

        Raises:
            NotDecidable: it is finished, or unknown.
        """
        delivery = await self._open(webhook_id)
        dropped = replace(delivery, outcome=Outcome.DROPPED, reason=f"dropped: {reason}")
        facts = {"webhook": webhook_id, "type": delivery.type, **payment_of(delivery), "reason": reason}
        once = f"{NoticeKind.WEBHOOK_DROPPED}:{webhook_id}"
        await self._notices.record(Notice(NoticeKind.WEBHOOK_DROPPED, TenantId(""), once, self._clock(), facts))
        await self._finish(dropped)
        return dropped

    async def book(self, webhook_id: str, booking: Booking) -> PurchasedCredit:
        """Grant credit for a payment, in place of what its cart would grant. Its refunds and disputes then count.

        Raises:
            NotDecidable: it is no payment, is finished or unknown, buys something else already, or waits and pays for a
                subscription: the usage that it may invoice comes off the exposure only once it is applied.
            UnknownTenant: there is no such tenant.
            GrantRefused: nothing, or more than one account may hold.
        """
        delivery = await self._open(webhook_id)
        if delivery.type != PAYMENT:
            raise NotDecidable(
                f"{webhook_id} is a {delivery.type}, and only a {PAYMENT} can be booked: drop it instead"
            )
        payment = _payment_in(delivery)
        await self._tenants.get(booking.tenant)
        is_of_subscription = bool(payment.subscription_ids) or payment.includes_usage
        if is_of_subscription and delivery.outcome is Outcome.WAITING and not await self._inbox.purchase(payment.id):
            raise NotDecidable(
                f"payment {payment.id} is for a subscription, and a booking would leave the usage that it invoices "
                f"unpaid: see in `farebox webhooks list` why it waits, then `farebox webhooks replay {webhook_id}`"
            )
        wanted = _credit_of(payment, booking, delivery.received_at_ms)
        if not 0 < wanted.amount <= MAX_GRANT_NANOS:
            raise GrantRefused(wanted.source, "give an amount above 0 and at most 1000000 dollars")
        fixed = await self._inbox.fix_purchase(payment.id, [wanted])
        if fixed != (wanted,):
            raise NotDecidable(f"payment {payment.id} buys something already: `farebox webhooks replay {webhook_id}`")
        sold = (wanted.unit, wanted.amount, wanted.expires_at_ms, wanted.adapters, wanted.price)
        await self._ledger.grant(Grant(wanted.source, booking.tenant, *sold))
        await self._cash.book(payment_entry(payment, booking.tenant, [wanted]))
        await self._inbox.reschedule(await self._reversals_of(payment.id), self._clock())
        await self._finish(replace(delivery, outcome=Outcome.BOOKED, reason=f"booked for {booking.tenant}"))
        return wanted

    async def _open(self, webhook_id: str) -> Delivery:
        delivery = await self._inbox.get(webhook_id)
        if delivery is None or delivery.outcome not in OPEN:
            state = "is unknown" if delivery is None else f"is {delivery.outcome}"
            raise NotDecidable(f"webhook {webhook_id} {state}: `farebox webhooks list` shows those that are open")
        return delivery

    async def _finish(self, delivery: Delivery) -> None:
        if not await self._inbox.finish(delivery):
            raise NotDecidable(f"webhook {delivery.id} was finished meanwhile: `farebox webhooks list` shows others")

    async def _reversals_of(self, payment_id: str) -> list[str]:
        """Refunds and disputes of this payment that were set aside: they count once it is booked."""
        unfinished = await self._inbox.unfinished(MOST_OPEN)
        aside = [one for one in unfinished if one.outcome is Outcome.SET_ASIDE and one.type != PAYMENT]
        return [one.id for one in aside if payment_of(one).get("payment_id") == payment_id]


def _credit_of(payment: Payment, booking: Booking, received_at_ms: int) -> PurchasedCredit:
    """Under the source that a grant of the payment's first product has."""
    products = sorted({line.product_id for line in payment.lines})
    paid_at_ms = received_at_ms if payment.created_at_ms is None else payment.created_at_ms
    return PurchasedCredit(
        source=f"payment:{payment.id}:{products[0] if products else BY_HAND}",
        unit=booking.unit,
        amount=booking.amount,
        expires_at_ms=paid_at_ms + booking.expires_days * DAY_MS if booking.expires_days else None,
        adapters=booking.adapters,
        price=net_nanos(payment),
        tenant=booking.tenant,
    )


def _payment_in(delivery: Delivery) -> Payment:
    try:
        return Payment.read(inner(read_json(delivery.body), "data"))
    except WireError as error:
        raise NotDecidable(
            f"payment {delivery.id} cannot be read ({error}): grant it with `farebox tenants grant`, then drop it"
        ) from None
