"""What a tenant may buy now: everything public, and hidden packs and plans that its experiment arm offers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from billing.catalog.catalog import Catalog
from billing.catalog.plans import Pack, Plan
from billing.pricing import modifiers
from billing.tenants.tenant import Tenant
from billing.usage import TenantId


@dataclass(frozen=True, slots=True)
class Offers:
    packs: Mapping[str, Pack]
    plans: Mapping[str, Plan]
    """Those that can be subscribed to, whether or not the tenant has a subscription already."""


def offers_to(tenant: TenantId, catalog: Catalog, now_ms: int) -> Offers:
    arms = modifiers.offers(catalog.pricing, tenant, now_ms)
    packs = {name for arm in arms for name in arm.packs}
    plans = {name for arm in arms for name in arm.plans}
    return Offers(
        packs={name: pack for name, pack in catalog.packs.items() if not pack.is_hidden or name in packs},
        plans={
            name: plan
            for name, plan in catalog.plans.items()
            if plan.is_postpaid and (not plan.is_hidden or name in plans)
        },
    )


def left_behind(tenants: Iterable[Tenant], old: Catalog, new: Catalog) -> Mapping[str, list[TenantId]]:
    """By each plan that ``new`` drops or renames: the tenants who are on it, or whose subscription still carries it."""
    dropped = sorted(old.plans.keys() - new.plans.keys())
    on: dict[str, list[TenantId]] = {name: [] for name in dropped}
    for tenant in tenants:
        for name in tenant.plans_held & on.keys():
            on[name].append(tenant.id)
    return {name: sorted(found) for name, found in on.items() if found}
