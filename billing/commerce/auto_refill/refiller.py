"""Charge saved cards for packs when balances are low, and find out what became of each charge.

An attempt is stored before Dodo is asked to charge. One whose answer was lost, or that was refused on the way, is
looked up among the customer's payments by its id; it is never made again on a guess.
"""

import logging
import secrets

from billing.catalog.terms import Terms
from billing.clock import month_start_ms
from billing.commerce.auto_refill.refill import Attempt, AttemptState, Refill
from billing.commerce.auto_refill.store import Refills
from billing.commerce.context import Commerce
from billing.commerce.dodo_ids import id_of
from billing.commerce.payments import Payments
from billing.commerce.products import Products
from billing.dodo.errors import DodoRefused, DodoUnavailable, DodoUnreadable
from billing.dodo.wire import Payment
from billing.ledger.admission import funding_for, plan_of
from billing.money import NANOS_PER_CENT, divide_up, format_usd
from billing.notices.log import Notices
from billing.notices.notice import Notice, NoticeKind
from billing.sweep import Sweep
from billing.tenants.tenant import SubscriptionStatus, Tenant
from billing.usage import TenantId

REFILL_TAG = "farebox_refill"
"""Metadata key that says which attempt a payment belongs to."""
LOST_MS = 3_600_000
"""An attempt that Dodo has no payment for after this time is taken for one that was never made."""
CLOCKS_APART_MS = 24 * 3_600_000
"""Payments are looked up from this long before the attempt: Dodo dates them by its own clock. Their ids decide."""
UNFINISHED_MS = 24 * 3_600_000
"""A payment that still waits for its customer after this time is taken for failed."""
WAITING = ("processing", "requires_customer_action", "requires_confirmation", "requires_capture", "")

log = logging.getLogger("farebox.billing.commerce.auto_refill")


class Refiller:
    def __init__(self, commerce: Commerce) -> None:
        self._dodo, self._ledger, self._tenants = commerce.dodo, commerce.ledger, commerce.tenants
        self._catalog, self._clock = commerce.catalog, commerce.clock
        self._redis, self._products, self._payments = commerce.redis, Products(commerce.redis), Payments(commerce)
        self._refills, self._notices = Refills(commerce.redis), Notices(commerce.redis)

    async def run_once(self, sweep: Sweep) -> int:
        """Look after every tenant that has set up auto-refill. How many attempts were begun."""
        return sum(await sweep.run(await self._refills.tenants(), self._look_after, own=(DodoUnreadable,)))

    async def _look_after(self, tenant_id: TenantId) -> bool:
        """Follow the open attempt, or begin one that is due. Was one begun?"""
        refill = await self._refills.get(tenant_id)
        if refill is not None and refill.open_attempt is not None:
            await self._follow(await self._tenants.get(tenant_id), refill.open_attempt)
        elif refill is not None and refill.is_on:
            return await self._begin(await self._tenants.get(tenant_id), refill)
        return False

    async def _begin(self, tenant: Tenant, refill: Refill) -> bool:
        catalog = await self._catalog()
        pack = catalog.packs.get(refill.pack) if catalog else None
        if catalog is not None and pack is None:
            await self._stop(tenant.id, f"pack {refill.pack} is sold no more: choose another one for auto-refill")
        terms = None if pack is None else Terms.of_pack(refill.pack, pack)
        product_id = "" if terms is None else await self._products.id_for(terms)
        if (
            catalog is None
            or pack is None
            or terms is None
            or not product_id
            or not tenant.dodo_customer_id
            or tenant.suspended
        ):
            return False
        now, price_cents = self._clock(), divide_up(pack.price, NANOS_PER_CENT)
        cents = refill.expected_cents(price_cents)
        month = month_start_ms(now)
        funding = funding_for(_as_if_active(tenant, now), plan_of(tenant, catalog), now)
        balance = (await self._ledger.account(tenant.id, funding)).balance_nanos
        if not refill.is_due(balance, cents, now, month):
            return False
        if await self._agreed(refill) not in ("", terms.key):
            await self._stop(tenant.id, f"pack {refill.pack} is sold on other terms now: switch auto-refill on again")
            return False
        at_dodo = await self._dodo.retrieve_product(product_id)
        if (at_dodo.cents, at_dodo.currency) != (price_cents, "USD"):
            await self._stop(tenant.id, f"pack {refill.pack} costs something else at Dodo: switch auto-refill on again")
            return False
        methods = await self._dodo.payment_methods(tenant.dodo_customer_id)
        attempt = Attempt(id=f"refill_{secrets.token_hex(8)}", started_at_ms=now, cents=cents, price_cents=price_cents)

        def begun(current: Refill) -> Refill:
            is_due = current.is_due(balance, cents, now, month)
            return current.begun(attempt, month) if is_due and methods else current

        changed = await self._refills.change(tenant.id, begun)
        if not methods:
            await self._stop(tenant.id, "no card is saved: buy a pack once by hand")
            return False
        if changed.open_attempt == attempt:
            await self._charge(tenant, refill.pack, product_id, methods[0], attempt)
            return True
        return False

    async def _agreed(self, refill: Refill) -> str:
        """The key of the terms that its tenant agreed to; one set up before 0.2 agreed to those of its time."""
        if refill.terms:
            return refill.terms
        before = await self._products.terms(await id_of(self._redis, f"pack:{refill.pack}"))
        return "" if before is None else before.key

    async def _charge(self, tenant: Tenant, pack: str, product_id: str, method_id: str, attempt: Attempt) -> None:
        """A charge that is refused, and that Dodo has no payment of, was not made; one without an answer is looked
        up later.
        """
        try:
            tags = {REFILL_TAG: attempt.id, "farebox_tenant": tenant.id, "farebox_product": f"pack:{pack}"}
            payment_id = await self._dodo.charge_saved(tenant, product_id, method_id, tags)
        except DodoRefused as refused:
            if await self._payment_of(tenant, attempt) is None:
                await self._fail(tenant.id, attempt, str(refused))
            else:
                await self._follow(tenant, attempt)
        except DodoUnavailable as error:
            log.warning("refill %s of %s: %s; it will be looked up", attempt.id, tenant.id, error)
        else:
            await self._refills.change(tenant.id, lambda refill: refill.charged(attempt.id, payment_id))
            await self._follow(tenant, attempt.model_copy(update={"payment_id": payment_id}))

    async def _follow(self, tenant: Tenant, attempt: Attempt) -> None:
        """Find out what became of an open attempt."""
        payment = await self._payment_of(tenant, attempt)
        age_ms = self._clock() - attempt.started_at_ms
        if payment is None:
            if age_ms > LOST_MS:
                await self._fail(tenant.id, attempt, "Dodo has no payment of this attempt")
            return
        if attempt.state is AttemptState.STARTED and not attempt.payment_id:
            await self._refills.change(tenant.id, lambda refill: refill.charged(attempt.id, payment.id))
        if payment.status == "succeeded":
            await self._payments.succeeded(payment)
            cents = payment.total_amount if payment.currency in ("USD", "") else attempt.cents
            # The notice comes first: an attempt that has ended is not followed again.
            paid = attempt.model_copy(update={"cents": cents})
            await self._record(NoticeKind.REFILL_SUCCEEDED, tenant.id, paid, payment_id=payment.id)
            await self._refills.change(tenant.id, lambda refill: refill.succeeded(attempt.id, cents, self._clock()))
        elif payment.status not in WAITING or age_ms > UNFINISHED_MS:
            await self._fail(tenant.id, attempt, f"the payment is {payment.status}")

    async def _payment_of(self, tenant: Tenant, attempt: Attempt) -> Payment | None:
        if attempt.payment_id:
            return await self._dodo.retrieve_payment(attempt.payment_id)
        since_ms = attempt.started_at_ms - CLOCKS_APART_MS
        for payment in await self._dodo.payments_of(tenant.dodo_customer_id, since_ms):
            if payment.metadata.get(REFILL_TAG) == attempt.id:
                return await self._dodo.retrieve_payment(payment.id)
        return None

    async def _fail(self, tenant: TenantId, attempt: Attempt, reason: str) -> None:
        await self._record(NoticeKind.REFILL_FAILED, tenant, attempt, reason=reason)
        await self._refills.change(tenant, lambda refill: refill.failed(attempt.id, reason, self._clock()))

    async def _stop(self, tenant: TenantId, reason: str) -> None:
        off = {"is_on": False, "stopped_because": reason}
        stopped = await self._refills.change(tenant, lambda refill: refill.model_copy(update=off))
        now = self._clock()
        once = f"{NoticeKind.REFILL_STOPPED}:{tenant}:{now}"
        await self._notices.record(
            Notice(NoticeKind.REFILL_STOPPED, tenant, once, now, {"pack": stopped.pack, "reason": reason})
        )

    async def _record(self, kind: NoticeKind, tenant: TenantId, attempt: Attempt, **more: str) -> None:
        facts = {"attempt": attempt.id, "amount_usd": format_usd(attempt.cents * NANOS_PER_CENT, 2), **more}
        await self._notices.record(Notice(kind, tenant, f"{kind}:{attempt.id}", self._clock(), facts))


def _as_if_active(tenant: Tenant, now_ms: int) -> Tenant:
    """A pause charges no card: the allowance of a resting subscription counts as if it could be drawn on."""
    subscription = tenant.subscription
    if subscription is None or not subscription.is_resting(now_ms):
        return tenant
    active = subscription.model_copy(update={"status": SubscriptionStatus.ACTIVE})
    return tenant.model_copy(update={"subscription": active})
