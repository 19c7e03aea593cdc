"""Notices for a tenant that has used 80 or 100 % of an allowance or a credit limit, or has little money left.

Pure: from an account and a plan to notices, whether or not they were recorded before.
"""

import hashlib
from collections.abc import Iterator

from billing.catalog.plans import Plan, PlanKind
from billing.ledger.account import Account
from billing.money import format_usd
from billing.notices.notice import Notice, NoticeKind
from billing.tenants.tenant import Tenant
from billing.usage import Unit

MARKS = (80, 100)
PERCENT = 100


def notices_for(tenant: Tenant, plan: Plan, account: Account, now_ms: int) -> Iterator[Notice]:
    """All that apply to this tenant now."""
    yield from _of_allowance(tenant, account, now_ms)
    yield from _of_overage(tenant, plan, account, now_ms)
    yield from _of_balance(tenant, plan, account, now_ms)


def _of_allowance(tenant: Tenant, account: Account, now_ms: int) -> Iterator[Notice]:
    for bucket in account.buckets:
        if bucket.is_allowance and bucket.granted and (bucket.expires_at_ms or 0) > now_ms:
            used = (bucket.granted - bucket.remaining) * PERCENT
            for mark in MARKS:
                if used >= mark * bucket.granted:
                    facts = {"percent": str(mark), "unit": bucket.unit.value, "bucket": bucket.id}
                    yield Notice(NoticeKind.ALLOWANCE, tenant.id, f"allowance:{bucket.id}:{mark}", now_ms, facts)


def _of_overage(tenant: Tenant, plan: Plan, account: Account, now_ms: int) -> Iterator[Notice]:
    subscription = tenant.subscription
    if subscription is None or not plan.credit_limit:
        return
    for mark in MARKS:
        if account.overage_nanos * PERCENT >= mark * plan.credit_limit:
            once = f"overage:{subscription.id}:{subscription.period_start_ms}:{mark}"
            facts = {"percent": str(mark), "cap_usd": format_usd(plan.credit_limit, 2)}
            yield Notice(NoticeKind.OVERAGE, tenant.id, once, now_ms, facts)


def _of_balance(tenant: Tenant, plan: Plan, account: Account, now_ms: int) -> Iterator[Notice]:
    """Its subject is the set of packs, so it is recorded again after another was bought."""
    if plan.kind is not PlanKind.PREPAID:
        return
    packs = sorted(bucket.id for bucket in account.buckets if bucket.unit is Unit.NANOS and not bucket.is_allowance)
    if packs and account.balance_nanos <= plan.low_balance:
        once = f"balance:{tenant.id}:{hashlib.sha256(','.join(packs).encode()).hexdigest()[:16]}"
        facts = {"balance_usd": format_usd(account.balance_nanos)}
        yield Notice(NoticeKind.BALANCE_LOW, tenant.id, once, now_ms, facts)
