"""Bring a tenant's plan in line with its subscription at Dodo, which is asked for its state at every webhook.

Decides which plan a subscription carries and when it counts; moves no money.
"""

import stamina

from billing.catalog.catalog import Catalog
from billing.catalog.plans import Plan
from billing.catalog.terms import Terms
from billing.commerce.context import Commerce
from billing.commerce.foreign import foreign_among
from billing.commerce.products import Products
from billing.commerce.signups import Signups
from billing.commerce.waiting import NotOurs, NotYet
from billing.dodo.wire import DodoSubscription
from billing.tenants.tenant import ENDED, Subscription, SubscriptionStatus, Tenant

DAY_MS = 24 * 60 * 60_000
ATTEMPTS = 5


class _Raced(Exception):
    """The tenant's subscription changed while we asked Dodo: ask again."""


class Subscriptions:
    def __init__(self, commerce: Commerce) -> None:
        self._dodo, self._tenants = commerce.dodo, commerce.tenants
        self._catalog, self._clock = commerce.catalog, commerce.clock
        self._products, self._signups = Products(commerce.redis), Signups(commerce)

    async def refresh(self, subscription_id: str, past_due_ends_at_ms: int | None = None) -> Tenant:
        """Ask Dodo for this subscription and store what it says now.

        Raises:
            NotOurs: its product is not ours.
            NotYet: its customer or plan is unknown here, or another subscription is still live.
            DodoUnavailable, DodoRefused: Dodo could not say.
        """
        try:
            return await self._refresh_once(subscription_id, past_due_ends_at_ms)
        except _Raced:
            raise NotYet(f"subscription {subscription_id} keeps changing") from None

    @stamina.retry(on=_Raced, attempts=ATTEMPTS, timeout=None, wait_initial=0.01, wait_max=0.1, wait_jitter=0.01)
    async def _refresh_once(self, subscription_id: str, past_due_ends_at_ms: int | None) -> Tenant:
        """Write Dodo's answer only if what was stored before the question is still stored.

        So an older answer never replaces a newer one.
        """
        first = await self._dodo.retrieve_subscription(subscription_id)
        await self._sold_by(first)
        before = await self._signups.tenant_of(first.customer_id)
        found = await self._dodo.retrieve_subscription(subscription_id)
        sold, plan, catalog = await self._sold_by(found)

        def change(tenant: Tenant) -> Tenant:
            if tenant.subscription != before.subscription:
                raise _Raced
            stored = as_stored(found, sold, plan, tenant, past_due_ends_at_ms, self._clock())
            return applied(tenant, stored, catalog.default_plan, self._clock())

        return await self._tenants.update(before.id, change)

    async def _sold_by(self, found: DodoSubscription) -> tuple[Terms, Plan, Catalog]:
        """The terms of the product that a subscription pays, their plan, and the catalog in force."""
        sold, catalog = await self._products.terms(found.product_id), await self._catalog()
        if sold is None and (foreign := await foreign_among(self._dodo, self._products, [found.product_id])):
            raise NotOurs(f"subscription {found.id}", foreign)
        if sold is None or sold.kind != "plan":
            raise NotYet(f"product {found.product_id} is no plan of ours")
        plan = catalog.plan_named(sold.plain_name) if catalog is not None else None
        if catalog is None or plan is None:
            raise NotYet(f"no catalog with the plan {sold.plain_name} is in force yet")
        return sold, plan, catalog


def applied(tenant: Tenant, subscription: Subscription, default_plan: str, now_ms: int) -> Tenant:
    """The tenant once this state of a subscription is known.

    Raises:
        NotYet: another subscription of the tenant is still live: only one may be.
    """
    current = tenant.subscription
    is_other = current is not None and current.id != subscription.id
    is_ended, is_pending = subscription.status in ENDED, subscription.status is SubscriptionStatus.PENDING
    if is_other and (is_ended or is_pending):
        return tenant
    if is_other and current is not None and current.is_live(now_ms):
        raise NotYet(f"subscription {current.id} of {tenant.id} is live: end it before {subscription.id} counts")
    if is_pending:
        plan = tenant.plan
    elif is_ended:
        carried = {subscription.plan} if is_other or current is None else {subscription.plan, current.plan}
        plan = default_plan if tenant.plan in carried else tenant.plan
    else:
        plan = subscription.plan
    return tenant.model_copy(update={"subscription": subscription, "plan": plan})


def as_stored(
    found: DodoSubscription, sold: Terms, plan: Plan, tenant: Tenant, past_due_ends_at_ms: int | None, now_ms: int
) -> Subscription:
    known = tenant.subscription if tenant.subscription and tenant.subscription.id == found.id else None
    grace_ends = None
    if found.status is SubscriptionStatus.PAST_DUE:
        is_known = known is not None and known.status is SubscriptionStatus.PAST_DUE
        ours = known.past_due_ends_at_ms if is_known and known is not None else now_ms + plan.grace_days * DAY_MS
        ends = [end for end in (ours, past_due_ends_at_ms, found.past_due_ends_at_ms) if end is not None]
        grace_ends = min(ends, default=None)
    return Subscription(
        id=found.id,
        plan=sold.plain_name,
        status=found.status,
        period_start_ms=found.period_start_ms,
        period_end_ms=found.period_end_ms,
        past_due_ends_at_ms=grace_ends,
        cancel_at_period_end=found.cancel_at_period_end,
        paused_at_ms=known.paused_at_ms if found.paused_at_ms is None and known is not None else found.paused_at_ms,
        product_id=found.product_id,
        sold=sold,
    )
