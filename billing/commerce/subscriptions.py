"""Bring a tenant's plan in line with its subscription at Dodo, which is asked for its state at every webhook.

Decides which plan a subscription carries and when it counts. One tenant has one: the first that counts stays, and
``doubles`` ends any other that is paid meanwhile.
"""

from contextlib import suppress

import stamina

from billing.catalog.catalog import Catalog
from billing.catalog.plans import Plan
from billing.catalog.terms import Terms
from billing.commerce.allowances import Periods, allowance_of, clawback_of, worth_of
from billing.commerce.context import Commerce
from billing.commerce.doubles import DOUBLED, Doubles, Given, given_back
from billing.commerce.foreign import foreign_among
from billing.commerce.inbox import PurchasedCredit
from billing.commerce.products import Products
from billing.commerce.signups import Signups
from billing.commerce.waiting import NotOurs, NotYet
from billing.dodo.wire import DodoSubscription, Payment
from billing.ledger.admission import funding_for, plan_of
from billing.ledger.errors import SourceReused
from billing.money import divide_up
from billing.tenants.tenant import ENDED, Subscription, SubscriptionStatus, Tenant

DAY_MS = 24 * 60 * 60_000
HOUR_MS = 60 * 60_000
"""A period whose end is this close was not cut short: Dodo may date a renewal a little apart."""
ATTEMPTS = 5


class _Raced(Exception):
    """The tenant's subscription changed while we asked Dodo: ask again."""


class Subscriptions:
    def __init__(self, commerce: Commerce) -> None:
        self._dodo, self._tenants = commerce.dodo, commerce.tenants
        self._catalog, self._clock = commerce.catalog, commerce.clock
        self._products, self._signups = Products(commerce.redis), Signups(commerce)
        self._ledger, self._periods = commerce.ledger, Periods(commerce.redis)
        self._doubles = Doubles(commerce)

    async def refresh(self, subscription_id: str, past_due_ends_at_ms: int | None = None) -> Tenant:
        """Ask Dodo for this subscription and store what it says now.

        Where it is a second one, it is ended at Dodo and its fee refunded. Where it ended by itself, another one that
        is active counts from now on.

        Raises:
            NotOurs: its product is not ours.
            NotYet: its customer or plan is unknown here, or another subscription's payment is late.
            DodoUnavailable, DodoRefused: Dodo could not say, or did not do.
        """
        tenant = await self._refresh(subscription_id, past_due_ends_at_ms)
        one = tenant.subscription
        if one is None or one.id != subscription_id or not one.has_lapsed(self._clock()):
            return tenant
        others = await self._dodo.running_subscriptions(tenant.dodo_customer_id)
        for other in sorted(others, key=lambda found: found.created_at_ms):
            if other.id != subscription_id and await self._products.terms(other.product_id) is not None:
                tenant = await self._refresh(other.id)
        return tenant

    async def is_given_back(self, payment: Payment, subscription_id: str) -> bool:
        """Is all of this payment refunded here, with the usage in it, because its subscription doubled another?"""
        found = await self._dodo.retrieve_subscription(subscription_id)
        kept_id = found.metadata.get(DOUBLED)
        if not kept_id:
            return False
        return given_back(payment, found, await self._dodo.retrieve_subscription(kept_id)) is Given.ALL

    async def pause_credit(self, tenant: Tenant, subscription_id: str, source: str, period_ms: int) -> None:
        """Extend no credit in the period that starts then, if this is the tenant's subscription.

        With 0, in none until the same source names one. The first one that it names stands.
        """

        def change(now: Tenant) -> Tenant:
            one = now.subscription
            if one is None or one.id != subscription_id or one.credit_paused.get(source):
                return now
            paused = {**one.credit_paused, source: period_ms}
            return now.model_copy(update={"subscription": one.model_copy(update={"credit_paused": paused})})

        await self._tenants.update(tenant.id, change)

    async def _refresh(self, subscription_id: str, past_due_ends_at_ms: int | None = None) -> Tenant:
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
        if kept_id := found.metadata.get(DOUBLED):
            await self._doubles.give_back(found, kept_id, before)
            return before
        sold, plan, catalog = await self._sold_by(found)
        other = before.subscription
        if found.is_running and other is not None and other.id != found.id and other.is_live(self._clock()):
            return await self._end_second(found, other)

        await self._periods.keep(found.id, found.period_start_ms, found.product_id)
        await self._take_what_was_overspent(before, found, sold, catalog)

        def change(tenant: Tenant) -> Tenant:
            if tenant.subscription != before.subscription:
                raise _Raced
            stored = as_stored(found, sold, plan, tenant, past_due_ends_at_ms, self._clock())
            return applied(tenant, stored, catalog.default_plan, self._clock())

        return await self._tenants.update(before.id, change)

    async def _take_what_was_overspent(
        self, before: Tenant, found: DodoSubscription, sold: Terms, catalog: Catalog
    ) -> None:
        """Where a period is cut short, take from the new allowance what was spent of the old one beyond its share.

        Dodo takes the share of the fee that was left off the new one. What the new allowance does not cover is a debt.
        """
        one, now = before.subscription, self._clock()
        if one is None or one.id != found.id or one.sold is None or one.status is SubscriptionStatus.PENDING:
            return
        left_ms, length_ms = one.period_end_ms - found.period_start_ms, one.period_end_ms - one.period_start_ms
        old = allowance_of(one.sold, one.id, one.period_start_ms, one.period_end_ms)
        is_changed = left_ms < length_ms or (left_ms == length_ms and sold.plain_name != one.plan)
        if old is None or left_ms <= HOUR_MS or not is_changed:
            return
        share = divide_up(old.amount * left_ms, length_ms)
        account = await self._ledger.account(before.id, funding_for(before, plan_of(before, catalog), now))
        over = share if account.allowance is None else max(0, share - max(0, account.allowance.remaining))
        source = f"plan_change:{one.id}:{one.period_start_ms}"
        if new := allowance_of(sold, found.id, found.period_start_ms, found.period_end_ms):
            taken = min(new.amount, worth_of(over, old, new))
            await self._take_once(f"{source}:{found.period_start_ms}:{sold.plain_name}", before, new, taken)
            over = max(0, over - worth_of(taken, new, old))
        await self._take_once(source, before, old, over)

    async def _take_once(self, source: str, tenant: Tenant, credit: PurchasedCredit, amount: int) -> None:
        if amount:
            with suppress(SourceReused):  # an earlier try took it, after which we crashed
                await self._ledger.claw_back(clawback_of(source, tenant.id, credit, amount))

    async def _end_second(self, second: DodoSubscription, first: Subscription) -> Tenant:
        """Ask Dodo whether the first is live indeed. If it ended unnoticed, the second counts."""
        tenant = await self._refresh_once(first.id, None)
        first_now = tenant.subscription
        if first_now is None or first_now.id != first.id or not first_now.is_live(self._clock()):
            raise _Raced
        if first_now.status is not SubscriptionStatus.ACTIVE:
            raise NotYet(f"the payment of subscription {first.id} is late: {second.id} waits for what becomes of it")
        await self._doubles.end(second, first.id, tenant)
        return tenant

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
    is_first_live = is_other and current is not None and current.is_live(now_ms)
    if is_other and (is_ended or is_pending or (is_first_live and not subscription.is_live(now_ms))):
        return tenant
    if is_first_live and current is not None:
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
        scheduled_product_id=found.scheduled_product_id,
        credit_paused=known.credit_paused if known is not None else {},
    )
