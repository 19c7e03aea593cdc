"""Gives every tenant a customer at Dodo. Until it has one its usage waits, counted."""

import logging

from billing.dodo.budget import Budget
from billing.dodo.client import Dodo
from billing.dodo.errors import DodoRefused
from billing.tenants.directory import Tenants
from billing.tenants.errors import CustomerTaken, UnknownTenant
from billing.usage import TenantId

log = logging.getLogger("farebox.billing.dodo.customers")


async def create_wanted(dodo: Dodo, tenants: Tenants, budget: Budget) -> int:
    """Create the customers that are wanted, as far as the budget goes. How many tenants got one.

    Raises:
        DodoUnavailable: nobody gets one now.
    """
    created = 0
    for tenant_id in await tenants.customers_wanted():
        if not await budget.take():
            break
        created += await _create(dodo, tenants, tenant_id)
    return created


async def _create(dodo: Dodo, tenants: Tenants, tenant_id: TenantId) -> bool:
    """One tenant that Dodo refuses, an unusable email say, keeps nobody else waiting."""
    try:
        tenant = await tenants.get(tenant_id)
        customer_id = tenant.dodo_customer_id or await dodo.create_customer(tenant)
        await tenants.set_customer(tenant_id, customer_id)
    except UnknownTenant:
        return False
    except (DodoRefused, CustomerTaken) as refused:
        log.error("tenant %s gets no Dodo customer and its usage waits: %s", tenant_id, refused)
        return False
    return True
