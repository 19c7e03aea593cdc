"""Dodo licence keys as API keys: taken over when they are delivered, ended when they are revoked.

Knows grants and keys. The request path never asks Dodo: a key is looked up here like any other.
"""

from dataclasses import dataclass

from billing.clock import Clock, now_ms
from billing.dodo.client import Dodo
from billing.dodo.newcomers import Newcomers
from billing.dodo.wire import LicenceGrant
from billing.errors import UnknownKey
from billing.store.inbox import Inbox
from billing.store.tenants import Tenants
from billing.tenants import SHOWN_DIGITS, ApiKey, Tenant, hash_key

ENTITLEMENT = "entitlement:api-key"
"""Our name for the one entitlement at Dodo whose licence keys are API keys."""
ROTATION_GRACE_MS = 24 * 3_600_000
"""How long a key that a plan change replaced still works."""


@dataclass(frozen=True, slots=True)
class Licences:
    dodo: Dodo
    tenants: Tenants
    inbox: Inbox
    newcomers: Newcomers
    clock: Clock = now_ms

    async def refresh(self, entitlement_id: str, customer_id: str) -> bool:
        """Bring a customer's keys in line with its grants as Dodo has them now. False: not an entitlement of ours.

        Raises:
            NotYet: the customer cannot be a tenant yet.
            DodoUnavailable, DodoRefused: Dodo could not say.
        """
        if (await self.inbox.names()).get(entitlement_id) != ENTITLEMENT:
            return False
        tenant = await self.newcomers.tenant_of(customer_id)
        grants = await self.dodo.licence_grants(entitlement_id, customer_id)
        live = {grant.subscription_id for grant in grants if grant.status == "Delivered" and grant.subscription_id}
        for grant in grants:
            if grant.key and grant.status == "Delivered":
                await self._take_over(tenant, grant)
            elif grant.key and grant.status == "Revoked":
                await self._end(tenant, grant, is_replaced=grant.subscription_id in live)
        return True

    async def _take_over(self, tenant: Tenant, grant: LicenceGrant) -> None:
        key = ApiKey(
            id=_key_id(grant),
            tenant=tenant.id,
            hash=hash_key(grant.key),
            shown=grant.key[:SHOWN_DIGITS],
            name="licence key",
            created_at_ms=self.clock(),
        )
        if key.id not in {one.id for one in await self.tenants.keys(tenant.id)}:
            await self.tenants.add_key(key)

    async def _end(self, tenant: Tenant, grant: LicenceGrant, is_replaced: bool) -> None:
        """At once after a refund, a cancellation or a revocation; after the grace where a plan change replaced it."""
        try:
            if is_replaced:
                await self.tenants.expire_key(tenant.id, _key_id(grant), self.clock() + ROTATION_GRACE_MS)
            else:
                await self.tenants.revoke_key(tenant.id, _key_id(grant))
        except UnknownKey:
            return  # it was revoked before it was ever ours


def _key_id(grant: LicenceGrant) -> str:
    return f"key_{grant.id}"
