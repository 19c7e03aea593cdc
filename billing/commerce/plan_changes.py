"""Change the plan of a subscription at Dodo, and say before what that costs.

A dearer plan counts at once: what is left of the period is taken off its first fee, and usage so far is billed with it.
A cheaper one counts from the next period on, and nothing is charged before. A change that Dodo refuses, or whose
payment fails, changes nothing.
"""

from dataclasses import dataclass
from enum import StrEnum

from billing.catalog.terms import Terms
from billing.commerce.context import Commerce
from billing.commerce.products import Products
from billing.commerce.subscriptions import Subscriptions
from billing.dodo.errors import DodoRefused, DodoUnavailable
from billing.dodo.fields import to_iso
from billing.dodo.wire import DodoSubscription, PlanQuote
from billing.errors import BillingError, Refusal
from billing.notices.log import Notices
from billing.notices.notice import Notice, NoticeKind
from billing.tenants.tenant import SubscriptionStatus, Tenant


@dataclass(eq=False)
class PlanChangeRefused(Refusal):
    """The subscription cannot change to this plan now; the message says what to do first."""

    message: str

    def __str__(self) -> str:
        return self.message


@dataclass(eq=False)
class PlanPaymentFailed(BillingError):
    """The payment of a plan change failed: nothing was changed."""

    plan: str
    kept: str
    payment_id: str

    def __str__(self) -> str:
        return (
            f"the payment for plan {self.plan!r} failed, and the subscription stays on {self.kept!r}: "
            "put another card in the portal (POST /v1/portal) and change again"
        )


class ChangeState(StrEnum):
    CHANGED = "changed"
    SCHEDULED = "scheduled"
    """For the end of the period."""
    PENDING = "pending"
    """Its payment is not decided yet: Dodo's webhook brings the plan."""
    UNCHANGED = "unchanged"
    """The subscription has this plan, at its terms of now. A change that was scheduled is taken back."""


@dataclass(frozen=True, slots=True)
class PlanChange:
    state: ChangeState
    effective_at_ms: int
    payment_id: str = ""


@dataclass(frozen=True, slots=True)
class _Target:
    """What a change would be made of."""

    found: DodoSubscription
    terms: Terms
    product_id: str
    current: Terms

    @property
    def is_made(self) -> bool:
        """Is it the plan of now? At other terms too, where that takes back the change that is scheduled."""
        takes_back = self.found.scheduled_product_id not in ("", self.product_id)
        return self.found.product_id == self.product_id or (takes_back and self.terms.name == self.current.name)

    @property
    def is_at_period_end(self) -> bool:
        return self.terms.price < self.current.price


def carries_other_plan(tenant: Tenant, plan: str, now_ms: int) -> bool:
    """Would moving the tenant to this plan contradict its live subscription?"""
    one = tenant.subscription
    return one is not None and one.is_live(now_ms) and one.plan != plan


class PlanChanges:
    def __init__(self, commerce: Commerce) -> None:
        self._dodo, self._catalog, self._clock = commerce.dodo, commerce.catalog, commerce.clock
        self._products, self._subscriptions = Products(commerce.redis), Subscriptions(commerce)
        self._notices = Notices(commerce.redis)

    async def quote(self, tenant: Tenant, plan: str) -> PlanQuote:
        """What ``change`` would charge now. Raises as that does."""
        target = await self._target(tenant, plan)
        if target.is_made:
            return PlanQuote(0, "USD", 0, self._clock())
        return await self._dodo.quote_plan(target.found.id, target.product_id, target.is_at_period_end)

    async def change(self, tenant: Tenant, plan: str) -> PlanChange:
        """Bring the tenant's subscription to this plan at its terms of now. The same call again changes nothing more.

        Raises:
            PlanChangeRefused: no subscription is active, or no such plan is sold.
            PlanPaymentFailed: it would have cost something, which the card did not pay.
            DodoUnavailable: whether it was changed is unknown: call again.
            DodoRefused: Dodo does not make this change.
        """
        target = await self._target(tenant, plan)
        if target.is_made:
            if target.found.scheduled_product_id:
                await self._dodo.keep_plan(target.found.id)
            await self._subscriptions.refresh(target.found.id)
            return PlanChange(ChangeState.UNCHANGED, target.found.period_start_ms)
        try:
            bought = {"farebox_product": target.terms.name}
            payment_id = await self._dodo.change_plan(
                target.found.id, target.product_id, target.is_at_period_end, bought
            )
        except DodoRefused as refused:
            now = await self._dodo.retrieve_subscription(target.found.id)
            if now.product_id == target.product_id:  # another call made it meanwhile
                await self._subscriptions.refresh(now.id)
                return PlanChange(ChangeState.UNCHANGED, now.period_start_ms)
            if not target.is_at_period_end or now.scheduled_product_id != target.product_id:
                await self._tell(tenant, target, str(refused))
                raise
            payment_id = ""
        if target.is_at_period_end:
            return PlanChange(ChangeState.SCHEDULED, target.found.period_end_ms)
        changed = (await self._subscriptions.refresh(target.found.id)).subscription
        if changed is not None and changed.product_id == target.product_id:
            return PlanChange(ChangeState.CHANGED, changed.period_start_ms, payment_id)
        if payment_id and (await self._dodo.retrieve_payment(payment_id)).status in ("failed", "cancelled"):
            await self._tell(tenant, target, "its payment failed", payment_id)
            raise PlanPaymentFailed(plan, target.current.plain_name, payment_id)
        return PlanChange(ChangeState.PENDING, self._clock(), payment_id)

    async def _target(self, tenant: Tenant, plan: str) -> _Target:
        one, catalog = tenant.subscription, await self._catalog()
        if one is None or not one.is_live(self._clock()):
            raise PlanChangeRefused(
                "there is no active subscription to change: subscribe to the plan (POST /v1/checkout)"
            )
        sold = catalog.plans.get(plan) if catalog is not None else None
        if sold is None or not sold.is_postpaid:
            raise PlanChangeRefused(
                f"no subscription is sold to plan {plan!r}: to leave a plan, cancel (POST /v1/portal)"
            )
        found = await self._dodo.retrieve_subscription(one.id)
        if found.status is not SubscriptionStatus.ACTIVE:
            raise PlanChangeRefused(f"the subscription is {found.status}: settle that first (POST /v1/portal)")
        if found.cancel_at_period_end:
            ends = to_iso(found.period_end_ms)
            raise PlanChangeRefused(f"the subscription ends on {ends}: take that back first (POST /v1/portal)")
        terms = Terms.of_plan(plan, sold)
        product_id, current = await self._products.id_for(terms), await self._products.terms(found.product_id)
        if not product_id or current is None:
            missing = terms.name if current is not None else f"product {found.product_id}"
            raise DodoUnavailable(f"{missing} is not at the payments provider: the operator makes it there")
        return _Target(found, terms, product_id, current)

    async def _tell(self, tenant: Tenant, target: _Target, reason: str, payment_id: str = "") -> None:
        kind, found = NoticeKind.PLAN_CHANGE_FAILED, target.found
        facts = {
            "subscription_id": found.id,
            "plan": target.terms.plain_name,
            "kept": target.current.plain_name,
            "reason": reason,
        } | ({"payment_id": payment_id} if payment_id else {})
        once = f"{kind}:{found.id}:{target.product_id}:{payment_id or self._clock()}"
        await self._notices.record(Notice(kind, tenant.id, once, self._clock(), facts))
