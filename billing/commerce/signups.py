"""Make a tenant of a customer who bought something of ours at Dodo without having been a tenant."""

import hashlib
import re

from billing.commerce.context import Commerce
from billing.commerce.waiting import NotYet
from billing.tenants.errors import TenantExists
from billing.tenants.tenant import Tenant, clean_name
from billing.usage import TenantId

ID_LENGTH_MAX = 40


class Signups:
    """What the customer bought is checked before: not every customer of the merchant becomes a tenant."""

    def __init__(self, commerce: Commerce) -> None:
        self._commerce = commerce

    async def tenant_of(self, customer_id: str) -> Tenant:
        """The tenant that is this customer, made now where there is none; any number of calls at once make one.

        Raises:
            NotYet: no catalog is in force, so there is no plan for a new tenant.
            DodoUnavailable, DodoRefused: Dodo did not give the customer's data.
        """
        known = await self._commerce.tenants.by_customer(customer_id)
        if known is not None:
            return known
        catalog = await self._commerce.catalog()
        if catalog is None:
            raise NotYet(f"customer {customer_id} bought before a catalog was in force")
        customer = await self._commerce.dodo.retrieve_customer(customer_id)
        made = Tenant(
            id=tenant_id_for(customer.email, customer_id),
            email=customer.email,
            plan=catalog.default_plan,
            name=clean_name(customer.name),
            dodo_customer_id=customer_id,
            created_at_ms=0,
        )
        try:
            return await self._commerce.tenants.create_for_customer(made)
        except TenantExists:
            longer = tenant_id_for(customer.email, customer_id, digits=16)
            return await self._commerce.tenants.create_for_customer(made.model_copy(update={"id": longer}))


def tenant_id_for(email: str, customer_id: str, digits: int = 6) -> TenantId:
    """A readable id that the same customer always gets: the name before the @, and digits of a hash."""
    name = re.sub(r"[^a-z0-9_-]+", "-", email.partition("@")[0].lower()).strip("-_")[:ID_LENGTH_MAX]
    return TenantId(f"{name or 'buyer'}-{hashlib.sha256(customer_id.encode()).hexdigest()[:digits]}")
