"""Dodo licence keys as API keys: taken over when they are delivered, ended when they are revoked, opened again when
their subscription goes on after a hold or a pause.

Knows grants and keys. The request path never asks Dodo: a key is looked up here like any other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from billing.clock import Clock, now_ms
from billing.commerce.inbox import Inbox
from billing.commerce.signups import Signups
from billing.commerce.subscriptions import ATTEMPTS
from billing.commerce.waiting import NotYet
from billing.dodo.client import Dodo
from billing.dodo.wire import LicenceGrant
from billing.tenants.directory import Tenants
from billing.tenants.errors import UnknownKey
from billing.tenants.tenant import SHOWN_DIGITS, ApiKey, Tenant, hash_key

ENTITLEMENT = "entitlement:api-key"
"""Our name for the one entitlement at Dodo whose licence keys are API keys."""
ROTATION_GRACE_MS = 24 * 3_600_000
"""How long a key that a plan change replaced still works."""


@dataclass(frozen=True, slots=True)
class Licences:
    dodo: Dodo
    tenants: Tenants
    inbox: Inbox
    signups: Signups
    clock: Clock = now_ms

    async def refresh(self, entitlement_id: str, customer_id: str) -> bool:
        """Bring a customer's keys in line with its grants as Dodo has them now. False: not an entitlement of ours.

        What changed a key asks Dodo once more: of two answers that overtake each other, the newer one stands.

        Raises:
            NotYet: the customer cannot be a tenant yet, or its keys keep changing.
            DodoUnavailable, DodoRefused: Dodo could not say.
        """
        if (await self.inbox.names()).get(entitlement_id) != ENTITLEMENT:
            return False
        tenant = await self.signups.tenant_of(customer_id)
        for _ in range(ATTEMPTS):
            before = await self.tenants.keys(tenant.id)
            await self._align(tenant, await self.dodo.licence_grants(entitlement_id, customer_id))
            if await self.tenants.keys(tenant.id) == before:
                return True
        raise NotYet(f"the keys of {tenant.id} keep changing")

    async def _align(self, tenant: Tenant, grants: Sequence[LicenceGrant]) -> None:
        live = {grant.subscription_id for grant in grants if grant.status == "Delivered" and grant.subscription_id}
        for grant in grants:
            if grant.key and grant.status == "Delivered":
                await self._take_over(tenant, grant)
            elif grant.key and grant.status == "Revoked":
                await self._end(tenant, grant, is_replaced=grant.subscription_id in live)

    async def _take_over(self, tenant: Tenant, grant: LicenceGrant) -> None:
        """A key that Dodo had taken opens again; one that was revoked here does not."""
        known = next((one for one in await self.tenants.keys(tenant.id) if one.id == _key_id(grant)), None)
        if known is not None:
            unended = {"expires_at_ms": None}
            await self.tenants.change_key(tenant.id, known.id, lambda key: key.model_copy(update=unended))
            return
        key = ApiKey(
            id=_key_id(grant),
            tenant=tenant.id,
            hash=hash_key(grant.key),
            shown=grant.key[:SHOWN_DIGITS],
            name="licence key",
            created_at_ms=self.clock(),
        )
        await self.tenants.add_key(key)

    async def _end(self, tenant: Tenant, grant: LicenceGrant, is_replaced: bool) -> None:
        """At once, or after the grace where a plan change replaced it."""
        try:
            ends = self.clock() + (ROTATION_GRACE_MS if is_replaced else 0)
            await self.tenants.expire_key(tenant.id, _key_id(grant), ends)
        except UnknownKey:
            return  # it was revoked before it was ever ours


def _key_id(grant: LicenceGrant) -> str:
    return f"key_{grant.id}"
