"""Record Dodo's events that an owner should hear of as notices: failed payments, subscriptions on hold, dunning.

Moves no money and changes no plan.
"""

from collections.abc import Mapping

from billing.commerce.context import Commerce
from billing.dodo.fields import Wire, inner, text
from billing.notices.log import Notices
from billing.notices.notice import Notice, NoticeKind

FACTS: Mapping[NoticeKind, tuple[str, ...]] = {
    NoticeKind.PAYMENT_FAILED: ("payment_id", "subscription_id", "error_code", "error_message"),
    NoticeKind.SUBSCRIPTION_PAST_DUE: ("subscription_id", "previous_billing_date", "past_due_ends_at"),
    NoticeKind.SUBSCRIPTION_ON_HOLD: ("subscription_id", "previous_billing_date"),
    NoticeKind.DUNNING_STARTED: ("subscription_id", "trigger_state", "created_at"),
    NoticeKind.DUNNING_RECOVERED: ("subscription_id", "trigger_state", "created_at"),
}
"""The fields of its event that each notice repeats. Kinds are Dodo's own names."""
NAMED_BY = ("payment_id", "subscription_id", "previous_billing_date", "created_at")
"""Fields that identify an event, so that it is recorded once whatever its delivery's id."""


class Alerts:
    def __init__(self, commerce: Commerce) -> None:
        self._tenants, self._clock = commerce.tenants, commerce.clock
        self._notices = Notices(commerce.redis)

    async def record(self, type_: str, data: Wire) -> bool:
        """Record a notice of this event, once.

        Returns:
            False where the event's type makes no notice, or its customer is no tenant's.
        """
        kind = next((one for one in FACTS if one == type_), None)
        customer_id = text(data, "customer_id", "") or text(inner(data, "customer"), "customer_id", "")
        tenant = await self._tenants.by_customer(customer_id) if kind and customer_id else None
        if kind is None or tenant is None:
            return False
        facts = {name: value for name in FACTS[kind] if (value := text(data, name, ""))}
        once = ":".join([kind, *(facts[name] for name in NAMED_BY if name in facts)])
        await self._notices.record(Notice(kind, tenant.id, once, self._clock(), facts))
        return True
