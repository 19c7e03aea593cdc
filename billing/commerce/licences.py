"""Keep Dodo's licence keys as API keys: added when delivered, expired when revoked, valid again when their subscription
goes on after a hold or a pause.

Requests never ask Dodo: a licence key is looked up in the directory like any other.
"""

from collections.abc import Sequence

from billing.commerce.context import Commerce
from billing.commerce.dodo_ids import id_of
from billing.commerce.signups import Signups
from billing.commerce.waiting import NotYet
from billing.dodo.wire import LicenceGrant
from billing.tenants.errors import UnknownKey
from billing.tenants.tenant import BUYER_SCOPES, MADE_BY_DODO, SHOWN_DIGITS, ApiKey, Tenant, hash_key

ENTITLEMENT = "entitlement:api-key"
"""Our name for the one entitlement at Dodo whose licence keys are API keys."""
ROTATION_GRACE_MS = 24 * 3_600_000
"""How long a key that a plan change replaced still works."""
ATTEMPTS = 5


class Licences:
    def __init__(self, commerce: Commerce) -> None:
        self._dodo, self._tenants, self._clock = commerce.dodo, commerce.tenants, commerce.clock
        self._redis, self._signups = commerce.redis, Signups(commerce)

    async def refresh(self, entitlement_id: str, customer_id: str) -> bool:
        """Bring a customer's keys in line with its grants as Dodo has them now.

        Dodo is asked again until nothing changes: where two calls of this overlap, the newer answer stands.

        Returns:
            False where the entitlement is not ours.

        Raises:
            NotYet: the entitlement is not known to be ours yet, the customer cannot be a tenant yet, or its keys keep
                changing.
            DodoUnavailable, DodoRefused: Dodo could not say.
        """
        if entitlement_id != await id_of(self._redis, ENTITLEMENT):
            if (await self._dodo.licence_entitlements()).get(ENTITLEMENT) == entitlement_id:
                raise NotYet(f"{ENTITLEMENT} is not kept here yet: run `farebox dodo sync`")
            return False
        tenant = await self._signups.tenant_of(customer_id)
        for _ in range(ATTEMPTS):
            before = await self._tenants.keys(tenant.id)
            await self._align(tenant, await self._dodo.licence_grants(entitlement_id, customer_id))
            if await self._tenants.keys(tenant.id) == before:
                return True
        raise NotYet(f"the keys of {tenant.id} keep changing")

    async def _align(self, tenant: Tenant, grants: Sequence[LicenceGrant]) -> None:
        live = {grant.subscription_id for grant in grants if grant.status == "Delivered" and grant.subscription_id}
        for grant in grants:
            if grant.key and grant.status == "Delivered":
                await self._add(tenant, grant)
            elif grant.key and grant.status == "Revoked":
                await self._expire(tenant, grant, is_replaced=grant.subscription_id in live)

    async def _add(self, tenant: Tenant, grant: LicenceGrant) -> None:
        """A key that Dodo had revoked is valid again; one that was revoked here is not."""
        known = next((one for one in await self._tenants.keys(tenant.id) if one.id == _key_id(grant)), None)
        if known is not None:
            without_end = {"expires_at_ms": None}
            await self._tenants.change_key(tenant.id, known.id, lambda key: key.model_copy(update=without_end))
            return
        key = ApiKey(
            id=_key_id(grant),
            tenant=tenant.id,
            hash=hash_key(grant.key),
            shown=grant.key[:SHOWN_DIGITS],
            name="licence key",
            created_at_ms=self._clock(),
            scopes=BUYER_SCOPES,
            made_by=MADE_BY_DODO,
        )
        await self._tenants.add_key(key)

    async def _expire(self, tenant: Tenant, grant: LicenceGrant, is_replaced: bool) -> None:
        """At once, or after the grace where a plan change replaced it."""
        try:
            ends = self._clock() + (ROTATION_GRACE_MS if is_replaced else 0)
            await self._tenants.expire_key(tenant.id, _key_id(grant), ends)
        except UnknownKey:
            return  # it was revoked before it was delivered here


def _key_id(grant: LicenceGrant) -> str:
    return f"key_{grant.id}"
