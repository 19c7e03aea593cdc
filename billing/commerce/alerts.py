"""Record notices of what an owner should hear of: failed payments, refunds, disputes, subscriptions on hold, dunning,
and money that is not applied.

Moves no money and changes no plan.
"""

from collections.abc import Iterable, Mapping

from billing.commerce.context import Commerce
from billing.commerce.inbox import Delivery
from billing.dodo.fields import Wire, WireError, inner, read_json, text
from billing.notices.log import Notices
from billing.notices.notice import Notice, NoticeKind
from billing.usage import TenantId

REFUND = ("refund_id", "payment_id", "amount", "currency", "reason")
DISPUTE = ("dispute_id", "payment_id", "amount", "currency", "dispute_status", "dispute_stage")
FACTS: Mapping[NoticeKind, tuple[str, ...]] = {
    NoticeKind.PAYMENT_FAILED: ("payment_id", "subscription_id", "error_code", "error_message"),
    NoticeKind.REFUND_SUCCEEDED: REFUND,
    NoticeKind.DISPUTE_OPENED: DISPUTE,
    NoticeKind.DISPUTE_WON: DISPUTE,
    NoticeKind.DISPUTE_LOST: DISPUTE,
    NoticeKind.DISPUTE_CANCELLED: DISPUTE,
    NoticeKind.DISPUTE_ACCEPTED: DISPUTE,
    NoticeKind.DISPUTE_EXPIRED: DISPUTE,
    NoticeKind.SUBSCRIPTION_PAST_DUE: ("subscription_id", "previous_billing_date", "past_due_ends_at"),
    NoticeKind.SUBSCRIPTION_ON_HOLD: ("subscription_id", "previous_billing_date"),
    NoticeKind.DUNNING_STARTED: ("subscription_id", "trigger_state", "created_at"),
    NoticeKind.DUNNING_RECOVERED: ("subscription_id", "trigger_state", "created_at"),
}
"""The fields of its event that each notice repeats. Kinds are Dodo's own names."""
NAMED_BY = ("refund_id", "dispute_id", "payment_id", "subscription_id", "previous_billing_date", "created_at")
"""Fields that identify an event, so that it is recorded once whatever its delivery's id."""


DISPUTES = tuple(kind for kind in FACTS if kind.startswith("dispute."))
WAITS_LONG_MS = 15 * 60_000
"""How long a webhook about money may wait before it becomes a notice."""


class Alerts:
    def __init__(self, commerce: Commerce) -> None:
        self._dodo, self._tenants, self._clock = commerce.dodo, commerce.tenants, commerce.clock
        self._notices = Notices(commerce.redis)

    async def record(self, type_: str, data: Wire) -> bool:
        """Record a notice of this event, once.

        Returns:
            False where the event's type makes no notice, or its customer is no tenant's.
        """
        kind = next((one for one in FACTS if one == type_), None)
        customer_id = _customer(data)
        if kind in DISPUTES and not customer_id:  # Dodo's disputes name only a payment
            customer_id = (await self._dodo.retrieve_payment(text(data, "payment_id"))).customer_id
        tenant = await self._tenants.by_customer(customer_id) if kind and customer_id else None
        if kind is None or tenant is None:
            return False
        facts = {name: value for name in FACTS[kind] if (value := text(data, name, ""))}
        once = ":".join([kind, *(facts[name] for name in NAMED_BY if name in facts)])
        await self._notices.record(Notice(kind, tenant.id, once, self._clock(), facts))
        return True

    async def record_waiting(self, delivery: Delivery) -> None:
        """Record, once, that a delivery about money has waited for long."""
        now = self._clock()
        if is_about_money(delivery.type) and now - delivery.received_at_ms >= WAITS_LONG_MS:
            remedy = f"farebox webhooks replay {delivery.id}, book or drop"
            await self._record_about(NoticeKind.WEBHOOK_WAITING, delivery, delivery.id, remedy)

    async def record_set_aside(self, delivery: Delivery, products: Iterable[str]) -> None:
        """Record, once for each product, that payments for it are set aside. ``delivery`` is the first of them."""
        for product in products:
            remedy = f"farebox webhooks book {delivery.id}, where it was meant for farebox"
            await self._record_about(NoticeKind.PAYMENT_SET_ASIDE, delivery, product, remedy)

    async def _record_about(self, kind: NoticeKind, delivery: Delivery, subject: str, remedy: str) -> None:
        facts = {"webhook": delivery.id, "type": delivery.type, **payment_of(delivery), "reason": delivery.reason}
        once = f"{kind}:{subject}"
        await self._notices.record(Notice(kind, TenantId(""), once, self._clock(), facts | {"remedy": remedy}))


def is_about_money(type_: str) -> bool:
    """Does an event of this type move credit? One without a type may."""
    return type_ in ("payment.succeeded", "refund.succeeded", "") or type_.startswith("dispute.")


def payment_of(delivery: Delivery) -> Mapping[str, str]:
    """Id, amount and currency of the payment, refund or dispute that a delivery is about, as far as it names them."""
    try:
        data = inner(read_json(delivery.body), "data")
    except WireError:
        return {}
    names = ("payment_id", "total_amount", "amount", "currency")
    return {name: value for name in names if (value := text(data, name, ""))}


def _customer(data: Wire) -> str:
    return text(data, "customer_id", "") or text(inner(data, "customer"), "customer_id", "")
