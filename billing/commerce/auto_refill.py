"""Charges saved cards for packs when balances are low, and finds out what became of each charge.

An attempt is written down before Dodo is asked. One whose answer was lost is looked up among the
payments by its id, never made again blindly.
"""

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from billing.catalog.plans import Pack, month_of
from billing.clock import Clock, now_ms
from billing.commerce.inbox import Inbox
from billing.commerce.payments import Payments
from billing.commerce.refill import Attempt, AttemptState, Refill
from billing.commerce.refill_store import Refills
from billing.commerce.waiting import CatalogSource
from billing.dodo.client import Dodo
from billing.dodo.errors import DodoRefused, DodoUnavailable
from billing.dodo.wire import Payment
from billing.ledger.admission import funding_for, plan_of
from billing.ledger.ledger import Ledger
from billing.money import NANOS_PER_CENT, divide_up, format_usd
from billing.notices.log import Notices
from billing.notices.notice import Notice, NoticeKind
from billing.tenants.directory import Tenants
from billing.tenants.tenant import Tenant
from billing.usage import TenantId

REFILL_TAG = "farebox_refill"
"""Metadata key that says which attempt a payment belongs to."""
LOST_MS = 3_600_000
"""After this an attempt that Dodo has no payment for is taken for one that was never made."""
UNFINISHED_MS = 24 * 3_600_000
"""After this a payment that waits for its buyer is taken for failed."""
WAITING = ("processing", "requires_customer_action", "requires_confirmation", "requires_capture", "")

log = logging.getLogger("farebox.billing.dodo.refiller")


@dataclass(frozen=True, slots=True)
class Refiller:
    dodo: Dodo
    ledger: Ledger
    tenants: Tenants
    refills: Refills
    inbox: Inbox
    payments: Payments
    notices: Notices
    catalog: CatalogSource
    clock: Clock = now_ms

    async def run_once(self) -> int:
        """Look after every tenant that has auto-refill. How many attempts were begun.

        Raises:
            DodoUnavailable: the rest is looked at the next time.
        """
        begun = 0
        for tenant_id in await self.refills.tenants():
            refill = await self.refills.get(tenant_id)
            if refill is not None and refill.open_attempt is not None:
                await self._follow(await self.tenants.get(tenant_id), refill.open_attempt)
            elif refill is not None and refill.is_on:
                begun += await self._begin(await self.tenants.get(tenant_id), refill)
        return begun

    async def _begin(self, tenant: Tenant, refill: Refill) -> bool:
        catalog = await self.catalog()
        pack = catalog.packs.get(refill.pack) if catalog else None
        product_id = await self._product(refill.pack)
        if catalog is None or pack is None or not product_id or not tenant.dodo_customer_id or tenant.suspended:
            return False
        now, cents = self.clock(), divide_up(pack.price, NANOS_PER_CENT)
        rests = tenant.subscription is not None and tenant.subscription.is_resting(now)
        # A pause is no reason to charge a card: the allowance that rests with it counts as if it were there.
        funding = None if rests else funding_for(tenant, plan_of(tenant, catalog), now)
        balance = (await self.ledger.account(tenant.id, funding)).balance_nanos
        if not refill.is_due(balance, cents, now, _month_start(now)):
            return False
        methods = await self.dodo.payment_methods(tenant.dodo_customer_id)
        attempt = Attempt(id=f"refill_{secrets.token_hex(8)}", started_at_ms=now, cents=cents)

        def begun(current: Refill) -> Refill:
            is_due = current.is_due(balance, cents, now, _month_start(now))
            return current.begun(attempt, _month_start(now)) if is_due and methods else current

        changed = await self.refills.change(tenant.id, begun)
        if not methods:
            await self._stop(tenant.id, "no card is saved: buy a pack once by hand")
            return False
        if changed.open_attempt == attempt:
            await self._charge(tenant, product_id, methods[0], attempt)
            return True
        return False

    async def _charge(self, tenant: Tenant, product_id: str, method_id: str, attempt: Attempt) -> None:
        """What Dodo refuses was not charged; what it does not answer is followed up later."""
        try:
            payment_id = await self.dodo.charge_saved(tenant, product_id, method_id, {REFILL_TAG: attempt.id})
        except DodoRefused as refused:
            await self._fail(tenant.id, attempt, str(refused))
        except DodoUnavailable as error:
            log.warning("refill %s of %s: %s; it will be looked up", attempt.id, tenant.id, error)
        else:
            await self.refills.change(tenant.id, lambda refill: refill.charged(attempt.id, payment_id))
            await self._follow(tenant, attempt.model_copy(update={"payment_id": payment_id}))

    async def _follow(self, tenant: Tenant, attempt: Attempt) -> None:
        """Find out what became of an open attempt."""
        payment = await self._payment_of(tenant, attempt)
        age_ms = self.clock() - attempt.started_at_ms
        if payment is None:
            if age_ms > LOST_MS:
                await self._fail(tenant.id, attempt, "Dodo has no payment of this attempt")
            return
        if attempt.state is AttemptState.STARTED and not attempt.payment_id:
            await self.refills.change(tenant.id, lambda refill: refill.charged(attempt.id, payment.id))
        if payment.status == "succeeded":
            await self.payments.succeeded(payment)
            await self.refills.change(tenant.id, lambda refill: refill.succeeded(attempt.id, self.clock()))
            await self._tell(NoticeKind.REFILL_SUCCEEDED, tenant.id, attempt, payment_id=payment.id)
        elif payment.status not in WAITING or age_ms > UNFINISHED_MS:
            await self._fail(tenant.id, attempt, f"the payment is {payment.status}")

    async def _payment_of(self, tenant: Tenant, attempt: Attempt) -> Payment | None:
        if attempt.payment_id:
            return await self.dodo.retrieve_payment(attempt.payment_id)
        for payment in await self.dodo.payments_of(tenant.dodo_customer_id, attempt.started_at_ms):
            if payment.metadata.get(REFILL_TAG) == attempt.id:
                return await self.dodo.retrieve_payment(payment.id)
        return None

    async def _fail(self, tenant: TenantId, attempt: Attempt, reason: str) -> None:
        await self.refills.change(tenant, lambda refill: refill.failed(attempt.id, reason, self.clock()))
        await self._tell(NoticeKind.REFILL_FAILED, tenant, attempt, reason=reason)

    async def _stop(self, tenant: TenantId, reason: str) -> None:
        off = {"is_on": False, "stopped_because": reason}
        await self.refills.change(tenant, lambda refill: refill.model_copy(update=off))

    async def _tell(self, kind: NoticeKind, tenant: TenantId, attempt: Attempt, **facts: str) -> None:
        told = {"attempt": attempt.id, "amount_usd": format_usd(attempt.cents * NANOS_PER_CENT, 2), **facts}
        await self.notices.tell(Notice(kind, tenant, f"{kind}:{attempt.id}", self.clock(), told))

    async def _product(self, pack: str) -> str:
        names = await self.inbox.names()
        return next((id_ for id_, name in names.items() if name == f"pack:{pack}"), "")


def refusal_of(refill: Refill, packs: Mapping[str, Pack]) -> str:
    """Why a tenant that may buy these packs may not have this auto-refill; empty where it may."""
    pack = packs.get(refill.pack)
    if pack is None or pack.grants.usd is None:
        sold = ", ".join(sorted(name for name, one in packs.items() if one.grants.usd is not None))
        return f"pack {refill.pack!r} is no pack of dollars: choose one of {sold or 'none'}"
    if refill.threshold_nanos >= pack.grants.amount:
        return f"the threshold must be below what the pack gives, ${format_usd(pack.grants.amount, 2)}"
    if refill.monthly_cap_cents * NANOS_PER_CENT < pack.price:
        return f"the monthly cap does not pay for one pack of ${format_usd(pack.price, 2)}"
    return ""


def _month_start(now: int) -> int:
    return int(month_of(datetime.fromtimestamp(now // 1_000, UTC))[0].timestamp()) * 1_000
