"""Makes a tenant of somebody who bought at Dodo without having been one.

Knows how a customer becomes a tenant; what it bought is for others to say first: only a buyer of
something of ours becomes one.
"""

import hashlib
import re
from dataclasses import dataclass

from billing.clock import Clock, now_ms
from billing.commerce.waiting import CatalogSource, NotYet
from billing.dodo.client import Dodo
from billing.tenants.directory import Tenants
from billing.tenants.tenant import Tenant
from billing.usage import TenantId

ID_LENGTH_MAX = 40


@dataclass(frozen=True, slots=True)
class Signups:
    dodo: Dodo
    tenants: Tenants
    catalog: CatalogSource
    clock: Clock = now_ms

    async def tenant_of(self, customer_id: str) -> Tenant:
        """The tenant that is this customer, made now where there is none; the same call twice makes one.

        Raises:
            NotYet: nobody has said yet which plan a new tenant gets.
            DodoUnavailable, DodoRefused: who the customer is could not be asked.
        """
        known = await self.tenants.by_customer(customer_id)
        if known is not None:
            return known
        catalog = await self.catalog()
        if catalog is None:
            raise NotYet(f"customer {customer_id} bought before a catalog was in force")
        customer = await self.dodo.retrieve_customer(customer_id)
        made = Tenant(
            id=tenant_id_for(customer.email, customer.id),
            email=customer.email,
            plan=catalog.default_plan,
            name=customer.name,
            dodo_customer_id=customer.id,
            created_at_ms=0,
        )
        return await self.tenants.create(made)


def tenant_id_for(email: str, customer_id: str) -> TenantId:
    """A readable id that the same customer always gets: the name before the @, and six digits of a hash."""
    name = re.sub(r"[^a-z0-9_-]+", "-", email.partition("@")[0].lower()).strip("-_")[:ID_LENGTH_MAX]
    return TenantId(f"{name or 'buyer'}-{hashlib.sha256(customer_id.encode()).hexdigest()[:6]}")
