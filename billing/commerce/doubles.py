"""End a second paid subscription of one tenant, and give its fee back.

The subscription that counts stays. The other one is ended at Dodo by a call that also writes on it which one it
doubled, so that another process can go on after a crash. The meters of both count the same events: one that is ended
invoices no more of them, and a payment that invoiced usage from beside the one that stayed is given back whole.
"""

import re
from collections.abc import Sequence
from enum import Enum

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


class Given(Enum):
    """What is given back of a payment of a subscription that doubled another."""

    NOTHING = "nothing"
    FEE = "fee"
    ALL = "all"


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

        That are the fees of periods that reach beyond the beginning of the one that stayed; ``given_back`` decides.

        Raises:
            NotYet: another process refunds at this moment.
            DodoUnavailable, DodoRefused: not everything is refunded.
        """
        kept = await self._dodo.retrieve_subscription(kept_id)
        refunded: dict[str, int] = {}
        currency = ""
        for listed in await self._dodo.subscription_payments(double.id):
            payment = await self._dodo.retrieve_payment(listed.id)
            given = given_back(payment, double, kept)
            if not payment.total_amount or given is Given.NOTHING:
                continue
            refunded[payment.id] = await self._refund(payment, double, kept_id, tenant, given is Given.ALL)
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


def given_back(payment: Payment, double: DodoSubscription, kept: DodoSubscription) -> Given:
    """What is refunded of a payment of ``double``, which was ended because of ``kept``.

    The fee of a period that reaches beyond the beginning of ``kept``. Usage in it is of the period before: where that
    one reaches beyond it too, both invoice it, and it is refunded with the fee.
    """
    starts_ms = payment.service_starts_ms.get(double.id, payment.created_at_ms or 0)
    ends_ms, since_ms = payment.service_ends_ms.get(double.id), kept.created_at_ms
    reaches = payment.charge_type == "new" or starts_ms >= since_ms if ends_ms is None else ends_ms > since_ms
    if not reaches:
        return Given.NOTHING
    is_usage_doubled = not payment.includes_usage or starts_ms >= since_ms
    return Given.ALL if is_usage_doubled and _pays_only(payment, double) else Given.FEE


def subscription_in(reason: str) -> str:
    """The subscription whose fee a refund for this reason gave back here; empty for any other refund."""
    found = re.fullmatch(r"subscription (\S+) doubled \S+", reason)
    return found[1] if found else ""


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
