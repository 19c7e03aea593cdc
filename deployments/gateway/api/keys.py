"""API keys: made, rotated and revoked by the operator, or by a tenant with a key that may manage keys.

A secret stands in the reply that makes it and nowhere else.
"""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field, model_validator

from billing.catalog.plans import Limits
from billing.clock import now_ms
from billing.pricing.prices import Usd
from billing.tenants.errors import KeysNotManaged
from billing.tenants.tenant import ApiKey, Principal, Throttle, new_key
from billing.usage import TenantId
from deployments.gateway.api.admin import DAY_MS, operator
from deployments.gateway.api.bodies import Body, Dollars, Listing
from deployments.gateway.api.document import refusals
from deployments.gateway.api.wire import Sent
from deployments.gateway.services import Caller, Parts, Services

HOUR_MS = 3_600_000
MAX_GRACE_HOURS = 30 * 24
Json = dict[str, object]


class KeyBody(Body):
    object: Literal["api_key"]
    id: str
    tenant: str
    shown: str
    name: str
    models: list[str] | None
    limits: Limits
    daily_cap: Dollars | None
    monthly_cap: Dollars | None
    manages_keys: bool
    throttled: Throttle | None
    quarantine: Throttle | None
    """The same, under its name before 0.2."""
    lifted_at_ms: int
    counts_as: str
    created_at_ms: int
    expires_at_ms: int | None
    revoked_at_ms: int | None


class NewKeyBody(Body):
    """The secret stands here and nowhere else."""

    api_key: str
    key: KeyBody


class NewKey(Sent):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"name": "ci", "daily_cap": "5.00", "expires_days": 30}]}
    )

    name: Annotated[str, Field(max_length=200)] = ""
    models: list[str] | None = None
    """Models it may use; all that its tenant may where it is left out."""
    limits: Limits = Limits()
    """Each counts where it is lower than the plan's."""
    daily_cap: Usd | None = None
    """The most that it may spend in a day (UTC), what its running requests hold included."""
    monthly_cap: Usd | None = None
    expires_days: Annotated[int, Field(ge=1, le=3650)] | None = None
    manages_keys: bool = False

    @model_validator(mode="after")
    def _is_whole(self) -> "NewKey":
        bounds = (self.models, self.daily_cap, self.monthly_cap)
        if self.manages_keys and (self.limits != Limits() or any(bound is not None for bound in bounds)):
            raise ValueError(
                "a key with `manages_keys` could make one without bounds: leave models, limits and caps out"
            )
        return self

    def make(self, tenant: TenantId) -> tuple[str, ApiKey]:
        secret, key = new_key(tenant, now_ms(), self.name, None if self.models is None else tuple(self.models))
        expires = None if self.expires_days is None else key.created_at_ms + self.expires_days * DAY_MS
        names = ("limits", "daily_cap", "monthly_cap", "manages_keys")
        return secret, key.model_copy(update={name: getattr(self, name) for name in names} | {"expires_at_ms": expires})


class Rotation(Sent):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"grace_hours": 24}]})

    grace_hours: Annotated[int, Field(ge=0, le=MAX_GRACE_HOURS)] = 24
    """How long the old secret still works."""


async def managing(caller: Caller) -> Principal:
    """Raises KeysNotManaged."""
    if not caller.key.manages_keys or caller.key.throttled:
        raise KeysNotManaged
    return caller


Manager = Annotated[Principal, Depends(managing)]

router = APIRouter(prefix="/v1/keys", responses=refusals(401, 403, 503))
operators = APIRouter(
    prefix="/admin/tenants/{tenant_id}/keys", dependencies=[Depends(operator)], responses=refusals(401, 404, 503)
)


@router.post("", status_code=201, response_model=NewKeyBody, responses=refusals(400, 413))
async def create_own_key(asked: NewKey, parts: Parts, manager: Manager) -> JSONResponse:
    """The secret stands in this reply and nowhere else. The new key lives no longer than the one that makes it."""
    secret, key = asked.make(manager.tenant.id)
    ends = [at for at in (key.expires_at_ms, manager.key.expires_at_ms) if at is not None]
    return await _added(parts, secret, key.model_copy(update={"expires_at_ms": min(ends, default=None)}))


@router.get("", response_model=Listing[KeyBody])
async def list_own_keys(parts: Parts, manager: Manager) -> JSONResponse:
    return await _listed(parts, manager.tenant.id)


@router.delete("/{key_id}", response_model=KeyBody, responses=refusals(404))
async def revoke_own_key(key_id: str, parts: Parts, manager: Manager) -> JSONResponse:
    """It works nowhere a second later."""
    return JSONResponse(key_json(await parts.tenants.revoke_key(manager.tenant.id, key_id)))


@router.post("/{key_id}/rotate", status_code=201, response_model=NewKeyBody, responses=refusals(400, 404, 409, 413))
async def rotate_own_key(key_id: str, asked: Rotation, parts: Parts, manager: Manager) -> JSONResponse:
    return await _rotated(parts, manager.tenant.id, key_id, asked)


@operators.post("", status_code=201, response_model=NewKeyBody, responses=refusals(400, 413))
async def create_key(tenant_id: TenantId, asked: NewKey, parts: Parts) -> JSONResponse:
    """The secret stands in this reply and nowhere else."""
    await parts.tenants.get(tenant_id)
    return await _added(parts, *asked.make(tenant_id))


@operators.get("", response_model=Listing[KeyBody])
async def list_keys(tenant_id: TenantId, parts: Parts) -> JSONResponse:
    await parts.tenants.get(tenant_id)
    return await _listed(parts, tenant_id)


@operators.delete("/{key_id}", response_model=KeyBody)
async def revoke_key(tenant_id: TenantId, key_id: str, parts: Parts) -> JSONResponse:
    return JSONResponse(key_json(await parts.tenants.revoke_key(tenant_id, key_id)))


@operators.post("/{key_id}/rotate", status_code=201, response_model=NewKeyBody, responses=refusals(400, 409, 413))
async def rotate_key(tenant_id: TenantId, key_id: str, asked: Rotation, parts: Parts) -> JSONResponse:
    """A new secret with the same rights, limits and caps; the old one ends after the grace."""
    return await _rotated(parts, tenant_id, key_id, asked)


@operators.post("/{key_id}/lift", response_model=KeyBody)
async def lift_key(tenant_id: TenantId, key_id: str, parts: Parts) -> JSONResponse:
    """Lift its throttle; it is not throttled again for a day."""
    return JSONResponse(key_json(await parts.tenants.lift_key(tenant_id, key_id)))


async def _added(parts: Services, secret: str, key: ApiKey) -> JSONResponse:
    await parts.tenants.add_key(key)
    return JSONResponse({"api_key": secret, "key": key_json(key)}, 201)


async def _listed(parts: Services, tenant: TenantId) -> JSONResponse:
    return JSONResponse({"object": "list", "data": [key_json(key) for key in await parts.tenants.keys(tenant)]})


async def _rotated(parts: Services, tenant: TenantId, key_id: str, asked: Rotation) -> JSONResponse:
    secret, key = await parts.tenants.rotate_key(tenant, key_id, asked.grace_hours * HOUR_MS)
    return JSONResponse({"api_key": secret, "key": key_json(key)}, 201)


def key_json(key: ApiKey) -> Json:
    shown = key.model_dump(mode="json", exclude={"hash"})
    return {"object": "api_key", **shown, "quarantine": shown["throttled"]}
