"""The public routes to activate, validate and deactivate licence keys. As at Dodo, they need no API key."""

from datetime import datetime
from typing import ClassVar

from fastapi import APIRouter, Response

from cluster.dodo_sandbox.customers import CustomerLimitedDetails, customer_of, limited
from cluster.dodo_sandbox.entitlements import GrantRecord, grant_by_key
from cluster.dodo_sandbox.errors import ApiError, not_found
from cluster.dodo_sandbox.state import Sandbox, SandboxDep
from cluster.dodo_sandbox.wire import BUSINESS_ID, Resource, Wire, new_id

router = APIRouter(prefix="/licenses")


class ActivatedProduct(Wire):
    product_id: str
    name: str | None = None


class Instance(Wire):
    id: str
    business_id: str = BUSINESS_ID
    created_at: datetime
    customer: CustomerLimitedDetails
    license_key_id: str
    name: str
    product: ActivatedProduct


class InstanceRecord(Instance, Resource):
    kind: ClassVar[str] = "licence_instance"
    grant_id: str

    @property
    def key(self) -> str:
        return self.id


class Activate(Wire):
    license_key: str
    name: str


class Named(Wire):
    license_key: str
    license_key_instance_id: str | None = None


class Deactivate(Wire):
    license_key: str
    license_key_instance_id: str


class Validity(Wire):
    valid: bool


@router.post("/activate", status_code=201)
async def activate(request: Activate, sandbox: SandboxDep) -> Instance:
    grant = _grant(sandbox, request.license_key)
    if grant.license_key.status != "active":
        raise ApiError(403, "INACTIVE_LICENSE_KEY", "The licence key is not active")
    used, limit = grant.license_key.activations_used, grant.license_key.activations_limit
    if limit is not None and used >= limit:
        raise ApiError(422, "LICENSE_KEY_LIMIT_REACHED", "The licence key has no activations left")
    made = InstanceRecord(
        id=new_id("lki"), created_at=sandbox.clock.now(), customer=limited(customer_of(sandbox, grant.customer_id)),
        license_key_id=grant.license_key.id, name=request.name, grant_id=grant.id,
        product=ActivatedProduct(product_id=grant.product_id),
    )  # fmt: skip
    with sandbox.store.transaction():
        sandbox.store.put(made)
        _count(sandbox, grant, 1)
    return made


@router.post("/validate")
async def validate(request: Named, sandbox: SandboxDep) -> Validity:
    grant = grant_by_key(sandbox, request.license_key)
    is_active = grant is not None and grant.license_key.status == "active"
    if request.license_key_instance_id is None:
        return Validity(valid=is_active)
    instance = sandbox.store.get(InstanceRecord, request.license_key_instance_id)
    return Validity(valid=is_active and instance is not None and grant is not None and instance.grant_id == grant.id)


@router.post("/deactivate")
async def deactivate(request: Deactivate, sandbox: SandboxDep) -> Response:
    grant = _grant(sandbox, request.license_key)
    instance = sandbox.store.get(InstanceRecord, request.license_key_instance_id)
    if instance is None or instance.grant_id != grant.id:
        raise not_found("license key instance", request.license_key_instance_id)
    with sandbox.store.transaction():
        sandbox.store.delete(instance)
        _count(sandbox, grant, -1)
    return Response(status_code=200)


def _grant(sandbox: Sandbox, key: str) -> GrantRecord:
    grant = grant_by_key(sandbox, key)
    if grant is None:
        raise ApiError(404, "LICENSE_KEY_NOT_FOUND", "There is no such licence key")
    return grant


def _count(sandbox: Sandbox, grant: GrantRecord, by: int) -> None:
    used = grant.license_key.activations_used + by
    sandbox.store.put(
        grant.model_copy(update={"license_key": grant.license_key.model_copy(update={"activations_used": used})})
    )
