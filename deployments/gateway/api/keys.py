"""API keys: made, rotated and revoked by the operator, or by a tenant with a key that has the scope ``keys:write``.

Only the reply that makes a key has its secret.
"""

from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import ConfigDict, Field

from billing.catalog.plans import Limits
from billing.clock import now_ms
from billing.pricing.prices import Usd
from billing.tenants.tenant import NEW_KEY_SCOPES, ApiKey, Scope, ShownName, made_by, new_key
from billing.usage import TenantId
from deployments.gateway.api.admin import DAY_MS, operator
from deployments.gateway.api.bodies import KeyBody, Listing, NewKeyBody
from deployments.gateway.api.dependencies import Caller, GatewayDep
from deployments.gateway.api.document import refusals
from deployments.gateway.api.wire import Sent
from deployments.gateway.gateway import Gateway

HOUR_MS = 3_600_000
MAX_GRACE_HOURS = 30 * 24


Scopes = Annotated[tuple[Scope, ...], Field(min_length=1)]


class NewKey(Sent):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"name": "ci", "daily_cap": "5.00", "expires_days": 30}]}
    )

    name: Annotated[ShownName, Field(max_length=200)] = ""
    models: list[str] | None = None
    """Models it may use; all that its tenant may where it is left out."""
    limits: Limits = Limits()
    """Each applies where it is lower than the plan's."""
    daily_cap: Usd | None = None
    """The most that it may spend in a day (UTC), including what its running requests hold."""
    monthly_cap: Usd | None = None
    expires_days: Annotated[int, Field(ge=1, le=3650)] | None = None
    scopes: Scopes = NEW_KEY_SCOPES
    """What it may be used for. A key with a spend cap takes no ``billing``; one with any bound no ``keys:write``."""
    manages_keys: bool = False
    """Adds ``keys:write``, under its name before 0.2."""

    def make(self, tenant: TenantId) -> tuple[str, ApiKey]:
        """The secret and the key as it is stored."""
        scopes = (*self.scopes, Scope.KEYS_WRITE) if self.manages_keys else self.scopes
        models = None if self.models is None else tuple(self.models)
        secret, key = new_key(tenant, now_ms(), self.name, models, scopes)
        expires = None if self.expires_days is None else key.created_at_ms + self.expires_days * DAY_MS
        names = ("limits", "daily_cap", "monthly_cap")
        return secret, key.model_copy(update={name: getattr(self, name) for name in names} | {"expires_at_ms": expires})


class KeyChange(Sent):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"scopes": ["inference", "usage:read", "billing:read"]}]}
    )

    scopes: Scopes
    """All that it may be used for from now on."""


class Rotation(Sent):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"grace_hours": 24}]})

    grace_hours: Annotated[int, Field(ge=0, le=MAX_GRACE_HOURS)] = 24
    """How long the old secret still works, in hours."""


router = APIRouter(prefix="/v1/keys", responses=refusals(401, 403, 503))
operators = APIRouter(
    prefix="/admin/tenants/{tenant_id}/keys", dependencies=[Depends(operator)], responses=refusals(401, 404, 503)
)


@router.post("", status_code=201, responses=refusals(400, 413))
async def create_own_key(asked: NewKey, gateway: GatewayDep, caller: Caller) -> NewKeyBody:
    """Only this reply has the secret. The new key has no scope that the key that makes it lacks, and no later end."""
    secret, key = asked.make(caller.tenant.id)
    return await _added(gateway, secret, made_by(caller.key, key))


@router.get("")
async def list_own_keys(gateway: GatewayDep, caller: Caller) -> Listing[KeyBody]:
    return await _listed(gateway, caller.tenant.id)


@router.delete("/{key_id}", responses=refusals(404))
async def revoke_own_key(key_id: str, gateway: GatewayDep, caller: Caller) -> KeyBody:
    """Every gateway refuses it a second later."""
    return KeyBody.of(await gateway.parts.tenants.revoke_key(caller.tenant.id, key_id))


@router.post("/{key_id}/rotate", status_code=201, responses=refusals(400, 404, 409, 413))
async def rotate_own_key(key_id: str, asked: Rotation, gateway: GatewayDep, caller: Caller) -> NewKeyBody:
    """Only a key that may do no more than the key that rotates it; the new secret expires no later than that one."""
    return await _rotated(gateway, caller.tenant.id, key_id, asked, caller.key)


@operators.post("", status_code=201, responses=refusals(400, 413))
async def create_key(tenant_id: TenantId, asked: NewKey, gateway: GatewayDep) -> NewKeyBody:
    """Only this reply has the secret."""
    await gateway.parts.tenants.get(tenant_id)
    return await _added(gateway, *asked.make(tenant_id))


@operators.get("")
async def list_keys(tenant_id: TenantId, gateway: GatewayDep) -> Listing[KeyBody]:
    await gateway.parts.tenants.get(tenant_id)
    return await _listed(gateway, tenant_id)


@operators.delete("/{key_id}")
async def revoke_key(tenant_id: TenantId, key_id: str, gateway: GatewayDep) -> KeyBody:
    return KeyBody.of(await gateway.parts.tenants.revoke_key(tenant_id, key_id))


@operators.patch("/{key_id}", responses=refusals(400, 413))
async def change_key(tenant_id: TenantId, key_id: str, asked: KeyChange, gateway: GatewayDep) -> KeyBody:
    """Every gateway goes by the new scopes a second later."""
    return KeyBody.of(await gateway.parts.tenants.set_scopes(tenant_id, key_id, asked.scopes))


@operators.post("/{key_id}/rotate", status_code=201, responses=refusals(400, 409, 413))
async def rotate_key(tenant_id: TenantId, key_id: str, asked: Rotation, gateway: GatewayDep) -> NewKeyBody:
    """A new secret with the same rights, limits and caps; the old one expires after ``grace_hours``."""
    return await _rotated(gateway, tenant_id, key_id, asked)


@operators.post("/{key_id}/lift")
async def lift_key(tenant_id: TenantId, key_id: str, gateway: GatewayDep) -> KeyBody:
    """Lift the key's throttle; it is not throttled again for a day."""
    return KeyBody.of(await gateway.parts.tenants.lift_key(tenant_id, key_id))


async def _added(gateway: Gateway, secret: str, key: ApiKey) -> NewKeyBody:
    await gateway.parts.tenants.add_key(key)
    return NewKeyBody(api_key=secret, key=KeyBody.of(key))


async def _listed(gateway: Gateway, tenant: TenantId) -> Listing[KeyBody]:
    return Listing(data=[KeyBody.of(key) for key in await gateway.parts.tenants.keys(tenant)])


async def _rotated(
    gateway: Gateway, tenant: TenantId, key_id: str, asked: Rotation, maker: ApiKey | None = None
) -> NewKeyBody:
    secret, key = await gateway.parts.tenants.rotate_key(tenant, key_id, asked.grace_hours * HOUR_MS, maker)
    return NewKeyBody(api_key=secret, key=KeyBody.of(key))
