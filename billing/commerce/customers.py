"""Create a Dodo customer for every tenant that has none. Until then its usage is counted and waits to be exported."""

from billing.dodo.call_budget import Budget
from billing.dodo.client import Dodo
from billing.sweep import EndOfRun, Sweep
from billing.tenants.directory import Tenants
from billing.tenants.errors import UnknownTenant
from billing.usage import TenantId


async def create_missing_customers(dodo: Dodo, tenants: Tenants, budget: Budget, sweep: Sweep) -> int:
    """Create them as far as the budget of calls goes. How many tenants got one."""

    async def create(tenant_id: TenantId) -> bool:
        try:
            tenant = await tenants.get(tenant_id)
        except UnknownTenant:
            return False  # its creation was cut off; a repeat lists it again
        if not tenant.dodo_customer_id and not await budget.take():
            raise EndOfRun
        customer_id = tenant.dodo_customer_id or await dodo.create_customer(tenant)
        await tenants.set_customer(tenant_id, customer_id)
        return True

    return sum(await sweep.run(await tenants.customers_wanted(), create))
