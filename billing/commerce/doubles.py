"""End a second paid subscription of one tenant, and give its fee back.

The subscription that counts stays. The other one is ended at Dodo by a call that also writes on it which one it
doubled, so that another process can go on after a crash. Usage needs no care: the meters of both count the same events,
one that is ended invoices none of them, and what it had invoiced already is given back with its fee.
"""

from collections.abc import Sequence

import stamina

from billing.commerce.context import Commerce
from billing.commerce.waiting import NotYet
from billing.dodo.errors import DodoRefused
from billing.dodo.wire import DodoSubscription, InvoiceLine, Payment, Refund
from billing.notices.log import Notices
from billing.notices.notice import Notice, NoticeKind
from billing.store.connection import guarded
from billing.store.guard import BULK_DEADLINE_S
from billing.store.keys import REFUNDING
from billing.store.write import write
from billing.tenants.tenant import Tenant

DOUBLED = "farebox_doubled"
"""Metadata key of a subscription that was ended here: the id of the one that stayed."""
REFUNDING_MS = 60_000
"""How long one process alone may refund a payment: longer than its calls to Dodo can take."""

CLAIM_S = 3.0


class Doubles:
    def __init__(self, commerce: Commerce) -> None:
        self._dodo, self._redis, self._clock = commerce.dodo, commerce.redis, commerce.clock
        self._notices = Notices(commerce.redis)

    async def end(self, double: DodoSubscription, kept_id: str, tenant: Tenant) -> None:
        """End ``double`` at Dodo at once, give its fee back, and record a notice that names both."""
        why = f"the customer has subscription {kept_id} already"
        try:
            await self._dodo.end_subscription(double.id, {**double.metadata, DOUBLED: kept_id}, why)
        except DodoRefused:  # another process may have ended it meanwhile
            ended_for = (await self._dodo.retrieve_subscription(double.id)).metadata.get(DOUBLED)
            if not ended_for:
                raise
            kept_id = ended_for
        await self.give_back(double, kept_id, tenant)

    async def give_back(self, double: DodoSubscription, kept_id: str, tenant: Tenant) -> None:
        """Refund what was paid for a subscription that was ended here, once however often this is called.

        All of it where it began after the one that stayed. One that began before it, and came back, has served and
        billed its usage until then: only fees of periods that reach beyond the other's beginning are refunded.

        Raises:
            NotYet: another process refunds at this moment.
            DodoUnavailable, DodoRefused: not everything is refunded.
        """
        kept = await self._dodo.retrieve_subscription(kept_id)
        is_later = double.created_at_ms >= kept.created_at_ms
        refunded: dict[str, int] = {}
        currency = ""
        for listed in await self._dodo.subscription_payments(double.id):
            payment = await self._dodo.retrieve_payment(listed.id)
            ends_ms = payment.service_ends_ms.get(double.id)
            reaches = payment.charge_type == "new" if ends_ms is None else ends_ms > kept.created_at_ms
            if not payment.total_amount or not (is_later or reaches):
                continue
            is_whole = is_later and _pays_only(payment, double)
            refunded[payment.id] = await self._refund(payment, double, kept_id, tenant, is_whole)
            currency = payment.currency
        facts = {"kept": kept_id, "ended": double.id, "payments": ", ".join(refunded)}
        if refunded:
            facts |= {"amount": str(sum(refunded.values())), "currency": currency}
        once = f"{NoticeKind.SUBSCRIPTION_DOUBLED}:{double.id}"
        await self._notices.record(Notice(NoticeKind.SUBSCRIPTION_DOUBLED, tenant.id, once, self._clock(), facts))

    async def _refund(
        self, payment: Payment, double: DodoSubscription, kept_id: str, tenant: Tenant, is_whole: bool
    ) -> int:
        """Refund a payment or its line about the subscription; the amount in minor units."""
        reason = f"subscription {double.id} doubled {kept_id}"
        if reason in payment.refunds:
            return payment.refunds[reason]
        await self._claim(payment.id)
        payment = await self._dodo.retrieve_payment(payment.id)
        if reason in payment.refunds:
            made = payment.refunds[reason]
        elif payment.refund_status == "full":  # a person was faster
            made = payment.total_amount
        else:
            try:
                refund = await self._ask_for(payment, double, reason, is_whole)
            except DodoRefused as refused:
                await self._tell(payment, double, kept_id, tenant, str(refused))
                raise
            made = payment.total_amount if refund.amount is None else refund.amount
        async with guarded(BULK_DEADLINE_S):
            await write(self._redis, ("DEL", REFUNDING + payment.id))
        return made

    async def _ask_for(self, payment: Payment, double: DodoSubscription, reason: str, is_whole: bool) -> Refund:
        if is_whole:
            return await self._dodo.refund(payment.id, reason)
        line = _line_of(await self._dodo.invoice_lines(payment.id), double)
        if line is None:
            raise DodoRefused(400, "NO_LINE", f"payment {payment.id} has no line that is clearly {double.id}'s fee")
        return await self._dodo.refund(payment.id, reason, line.id)

    @stamina.retry(on=NotYet, attempts=None, timeout=CLAIM_S, wait_initial=0.05, wait_max=0.3)
    async def _claim(self, payment_id: str) -> None:
        """Wait for another process that refunds it. A claim whose outcome is unknown is not given up, but expires.

        Raises:
            NotYet: the other one is not done within ``CLAIM_S``.
        """
        async with guarded(BULK_DEADLINE_S):
            (is_mine,) = await write(self._redis, ("SET", REFUNDING + payment_id, 1, "NX", "PX", REFUNDING_MS))
        if not is_mine:
            raise NotYet(f"payment {payment_id} is being refunded")

    async def _tell(
        self, payment: Payment, double: DodoSubscription, kept_id: str, tenant: Tenant, reason: str
    ) -> None:
        """Record that a refund needs a person. It is tried again all the same."""
        kind, remedy = NoticeKind.SUBSCRIPTION_DOUBLED, f"refund the fee in payment {payment.id} at Dodo"
        facts = {"kept": kept_id, "ended": double.id, "payments": payment.id, "reason": reason, "remedy": remedy}
        once = f"{kind}:{double.id}:{payment.id}"
        await self._notices.record(Notice(kind, tenant.id, once, self._clock(), facts))


def _pays_only(payment: Payment, subscription: DodoSubscription) -> bool:
    """Does a payment buy nothing but this subscription?"""
    others = {line.product_id for line in payment.lines} - {subscription.product_id}
    return not others and set(payment.subscription_ids) <= {subscription.id}


def _line_of(lines: Sequence[InvoiceLine], subscription: DodoSubscription) -> InvoiceLine | None:
    """The one line of an invoice that is this subscription's fee; ``None`` where that is not clear."""
    name = subscription.product_name
    by_id = [one for one in lines if one.id == subscription.product_id]
    found = by_id or [one for one in lines if one.name == name or one.name.startswith(f"{name} ")]
    return found[0] if len(found) == 1 else None
