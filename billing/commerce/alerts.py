"""Dodo's bad news, and its end, as notices to the owner: failed payments, subscriptions on hold, dunning.

Knows which events are news and whom they are about; moves no money and changes no plan.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from billing.clock import Clock, now_ms
from billing.dodo.fields import Wire, inner, text
from billing.notices.log import Notices
from billing.notices.notice import Notice, NoticeKind
from billing.tenants.directory import Tenants

FACTS: Mapping[NoticeKind, tuple[str, ...]] = {
    NoticeKind.PAYMENT_FAILED: ("payment_id", "subscription_id", "error_code", "error_message"),
    NoticeKind.SUBSCRIPTION_PAST_DUE: ("subscription_id", "previous_billing_date", "past_due_ends_at"),
    NoticeKind.SUBSCRIPTION_ON_HOLD: ("subscription_id", "previous_billing_date"),
    NoticeKind.DUNNING_STARTED: ("subscription_id", "trigger_state", "created_at"),
    NoticeKind.DUNNING_RECOVERED: ("subscription_id", "trigger_state", "created_at"),
}
"""What each notice repeats of its event. Kinds are Dodo's own names."""
NAMED_BY = ("payment_id", "subscription_id", "previous_billing_date", "created_at")
"""Together they say which event it is, so that it is told once whatever its delivery's id."""


@dataclass(frozen=True, slots=True)
class Alerts:
    tenants: Tenants
    notices: Notices
    clock: Clock = now_ms

    async def tell(self, kind: str, data: Wire) -> bool:
        """Tell this event, once. False where it is no news, or about nobody we know."""
        news = next((one for one in FACTS if one == kind), None)
        customer_id = text(data, "customer_id", "") or text(inner(data, "customer"), "customer_id", "")
        tenant = await self.tenants.by_customer(customer_id) if news and customer_id else None
        if news is None or tenant is None:
            return False
        facts = {name: value for name in FACTS[news] if (value := text(data, name, ""))}
        once = ":".join([news, *(facts[name] for name in NAMED_BY if name in facts)])
        await self.notices.tell(Notice(news, tenant.id, once, self.clock(), facts))
        return True
