"""May this request run, and what does it hold?

Plan, price and clock become a hold here; the store decides in one step whether there is credit for it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from billing.catalog.abuse import Abuse
from billing.catalog.catalog import Catalog, Model
from billing.catalog.plans import Limits, Plan, PlanKind, Quota
from billing.clock import Clock, month_of, month_start_ms, now_ms, unix_ms
from billing.errors import Refusal
from billing.ledger.account import Bucket, Funding, Hold, HoldRequest
from billing.ledger.codec import max_cost
from billing.ledger.errors import InsufficientCredits
from billing.ledger.ledger import Ledger
from billing.money import Nanos
from billing.pricing.modifiers import Circumstances, EffectivePrice, Pricing, effective
from billing.tenants.spend_caps import caps_of
from billing.tenants.tenant import ApiKey, Principal, Subscription, Tenant
from billing.usage import BucketId, Modifier, RequestId

LEASE_MS = 30_000
STEP_TOKENS = 256
"""Completion tokens that a hold begins with and grows by."""
STEP_COMPUTE_MS = 5_000
"""The same in compute, for a price that counts it."""
MAX_COMPUTE_MS = 600_000
"""The most compute that one request may use where its price counts it: no answer takes longer."""
_NO_REQUEST = RequestId("")


@dataclass(frozen=True, slots=True)
class Quote:
    """What a request would cost at most, and what would become of it now. Nothing is set aside."""

    cost_nanos: Nanos
    """At the price it would be held at, with every token asked for."""
    max_tokens: int
    """Completion tokens that would be paid for; 0 where it is refused for another reason than credit."""
    covered_by_requests: bool = False
    refusal: Refusal | None = None
    modifiers: tuple[Modifier, ...] = ()
    """Why its price is not the listed one."""
    price_version: str = ""

    @property
    def is_admitted(self) -> bool:
        return self.refusal is None


class Admission:
    """The gate before the model: no hold, no run."""

    def __init__(
        self,
        ledger: Ledger,
        clock: Clock = now_ms,
        lease_ms: int = LEASE_MS,
        step_tokens: int = STEP_TOKENS,
        step_compute_ms: int = STEP_COMPUTE_MS,
        max_compute_ms: int = MAX_COMPUTE_MS,
        load: Callable[[], int] = lambda: 0,
    ) -> None:
        """``load``: ten-thousandths of the replicas' capacity in use, for a price that depends on it."""
        self._ledger, self._clock, self._lease_ms = ledger, clock, lease_ms
        self._load = load
        self._step_tokens, self._step_compute_ms, self._max_compute_ms = step_tokens, step_compute_ms, max_compute_ms

    async def admit(
        self,
        principal: Principal,
        model: Model,
        catalog: Catalog,
        request_id: RequestId,
        prompt_tokens: int,
        max_tokens: int,
    ) -> Hold:
        """Hold the first step of a request, and say how long an answer the credit affords.

        Raises:
            RateLimited, InsufficientCredits, CreditOnHold, SpendCapReached, DuplicateRequest: it may not run.
            StoreUnavailable: it may not run.
        """
        request = await self._request(principal, model, catalog, request_id, prompt_tokens, max_tokens)
        try:
            return await self._ledger.hold(request)
        except InsufficientCredits as refusal:
            raise self._explained(refusal, principal.tenant, catalog, request.funding) from None

    async def quote(
        self, principal: Principal, model: Model, catalog: Catalog, prompt_tokens: int, max_tokens: int
    ) -> Quote:
        """What ``admit`` would do now; changes nothing. Raises StoreUnavailable."""
        request = await self._request(principal, model, catalog, _NO_REQUEST, prompt_tokens, max_tokens)
        cost, why_so_much = max_cost(request), (request.modifiers, request.price.version)
        try:
            hold = await self._ledger.preview(request)
        except InsufficientCredits as refusal:
            why = self._explained(refusal, principal.tenant, catalog, request.funding)
            return Quote(cost, refusal.max_affordable_tokens, False, why, *why_so_much)
        except Refusal as refusal:
            return Quote(cost, 0, False, refusal, *why_so_much)
        return Quote(cost, hold.max_tokens, hold.covered_by_requests, None, *why_so_much)

    def _explained(
        self, refusal: InsufficientCredits, tenant: Tenant, catalog: Catalog, funding: Funding
    ) -> InsufficientCredits:
        """Say so where credit would be extended, were there a subscription that carries it and whose fee is paid."""
        plan, one, now = plan_of(tenant, catalog), tenant.subscription, self._clock()
        is_without_credit = plan.is_postpaid and plan.credit_limit and not funding.credit_limit
        if not is_without_credit or refusal.limit_source == "debt":
            return refusal
        why_paused = one.why_paused if one is not None and is_carried_by(tenant, one, now) else ""
        return replace(
            refusal, limit_source="subscription_fee" if why_paused else "subscription", why_paused=why_paused
        )

    async def _price(self, tenant: Tenant, model: Model, pricing: Pricing, now: int) -> EffectivePrice:
        """What this request costs now. Only a price that depends on the month's spend asks the store."""
        spent = await self._ledger.spent(tenant.id, month_start_ms(now)) if pricing.volume_tiers else Nanos(0)
        at = Circumstances(tenant.id, now, spent, self._load() if pricing.load else 0)
        return effective(model.price, model.id, pricing, at)

    async def _request(
        self,
        principal: Principal,
        model: Model,
        catalog: Catalog,
        request_id: RequestId,
        prompt_tokens: int,
        max_tokens: int,
    ) -> HoldRequest:
        tenant, key = principal.tenant, principal.key
        plan, now = plan_of(tenant, catalog), self._clock()
        priced = await self._price(tenant, model, catalog.pricing, now)
        return HoldRequest(
            request_id=request_id,
            tenant=tenant.id,
            key_id=key.id,
            model=model.id,
            adapter=model.identity,
            adapter_class=model.adapter_class,
            plan=tenant.plan,
            price=priced.price,
            modifiers=priced.modifiers,
            month_start_ms=month_start_ms(now) if catalog.pricing.volume_tiers else 0,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            funding=funding_for(tenant, plan, now),
            limits=_limits_of(key, plan, catalog.abuse),
            caps=caps_of(key, catalog.abuse.hourly_cap, now),
            counts_as=key.counts_as,
            lease_ms=self._lease_ms,
            step_tokens=self._step_tokens,
            step_compute_ms=self._step_compute_ms,
            max_compute_ms=self._max_compute_ms if priced.price.per_compute_second else 0,
        )


def _limits_of(key: ApiKey, plan: Plan, abuse: Abuse) -> Limits:
    limits = plan.limits.lowered_to(key.limits)
    return limits.lowered_to(abuse.limits) if key.throttled else limits


def plan_of(tenant: Tenant, catalog: Catalog) -> Plan:
    """The tenant's plan, though it be retired; the default one where there never was such a plan."""
    return catalog.plan_named(tenant.plan) or catalog.plans[catalog.default_plan]


def funding_for(tenant: Tenant, plan: Plan, now_ms: int) -> Funding:
    """What a tenant may draw on besides packs: this period's allowance, and credit while it is extended."""
    if plan.kind is PlanKind.FREE:
        assert plan.allowance is not None, "a free plan has an allowance"
        start, end = month_of(now_ms)
        return _funding(tenant, plan.allowance, f"allowance:free:{start:%Y-%m}", unix_ms(end))
    subscription = tenant.subscription
    if not plan.is_postpaid or subscription is None or not is_carried_by(tenant, subscription, now_ms):
        return Funding()
    credit_limit = plan.credit_limit if subscription.extends_credit(now_ms) else Nanos(0)
    quota = plan.allowance if subscription.sold is None else subscription.sold.grants
    if quota is None or now_ms >= subscription.period_end_ms:
        return Funding(credit_limit=credit_limit)
    period = allowance_period(subscription.id, subscription.period_start_ms)
    price = Nanos(plan.monthly_price if subscription.sold is None else subscription.sold.price)
    return _funding(tenant, quota, period, subscription.period_end_ms, credit_limit, price)


def is_carried_by(tenant: Tenant, subscription: Subscription, now_ms: int) -> bool:
    """Does this subscription carry the plan that the tenant is on?"""
    return subscription.plan == tenant.plan and subscription.is_live(now_ms)


def allowance_period(subscription_id: str, start_ms: int) -> str:
    """The id of a subscription's allowances in one period, without the plan's name behind it."""
    return f"allowance:{subscription_id}:{start_ms}"


def _funding(
    tenant: Tenant, quota: Quota, period: str, ends_at_ms: int, credit_limit: Nanos = Nanos(0), price: Nanos = Nanos(0)
) -> Funding:
    """An allowance of one period and one plan: who changes the plan within a period gets the new plan's."""
    allowance = Bucket(
        id=BucketId(f"{period}:{tenant.plan}"),
        unit=quota.unit,
        remaining=quota.amount,
        granted=quota.amount,
        expires_at_ms=ends_at_ms,
        adapters=quota.adapters,
        is_allowance=True,
        price=price,
    )
    return Funding(allowance, credit_limit, former_allowance_id=BucketId(period))
