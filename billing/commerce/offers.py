"""What a tenant may buy now: everything public, and hidden packs and plans that its experiment arm offers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from billing.catalog.catalog import Catalog
from billing.catalog.plans import Pack, Plan
from billing.pricing import modifiers
from billing.tenants.tenant import Tenant
from billing.usage import TenantId, Unit


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


def by_need(packs: Mapping[str, Pack], needed: int, first: str = "") -> list[str]:
    """Names of packs by price, but ``first`` before all, or else the cheapest that grants the ``needed`` nanos.

    Where none grants as much, the one that grants most is first.
    """
    by_price = sorted(packs, key=lambda name: (packs[name].price, name))
    in_money = [name for name in by_price if packs[name].grants.unit is Unit.NANOS]
    if first not in packs:
        enough = [name for name in in_money if packs[name].grants.amount >= needed]
        first = enough[0] if enough else max(in_money, key=lambda name: packs[name].grants.amount, default="")
    return sorted(by_price, key=lambda name: name != first)


def left_behind(tenants: Iterable[Tenant], old: Catalog, new: Catalog) -> Mapping[str, list[TenantId]]:
    """By each plan that ``new`` drops or renames: the tenants who are on it, or whose subscription still carries it."""
    dropped = sorted(old.plans.keys() - new.plans.keys())
    on: dict[str, list[TenantId]] = {name: [] for name in dropped}
    for tenant in tenants:
        for name in tenant.plans_held & on.keys():
            on[name].append(tenant.id)
    return {name: sorted(found) for name, found in on.items() if found}
