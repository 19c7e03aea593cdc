"""Licence-key entitlements of products, and the keys issued for them.

Keys are issued at once. Other kinds of entitlements are refused.
"""

import secrets
from datetime import datetime
from typing import Annotated, ClassVar, Literal

from fastapi import APIRouter, Query
from pydantic import Field

from cluster.dodo_sandbox.endpoints import announce
from cluster.dodo_sandbox.errors import not_found, unprocessable
from cluster.dodo_sandbox.state import Sandbox, SandboxDep
from cluster.dodo_sandbox.wire import BRAND_ID, BUSINESS_ID, LimitedMetadata, Page, Paging, Resource, Wire, new_id

router = APIRouter()

Count = Annotated[int, Field(ge=1)]
SUSPENDING_EVENTS = ("subscription.on_hold", "subscription.paused")
"""They disable a subscription's keys until it is active again."""


class LicenceKeyConfig(Wire):
    activation_message: Annotated[str, Field(max_length=2500)] | None = None
    activations_limit: Count | None = None
    duration_count: Count | None = None
    duration_interval: Literal["Day", "Week", "Month", "Year"] | None = None
    fulfillment_mode: Literal["auto", "manual"] | None = "auto"


class EntitlementSummary(Wire):
    """The fields of an entitlement in its product."""

    id: str
    name: str
    integration_type: Literal["license_key"] = "license_key"
    integration_config: LicenceKeyConfig = LicenceKeyConfig()
    description: str | None = None


class Entitlement(EntitlementSummary):
    business_id: str = BUSINESS_ID
    created_at: datetime
    updated_at: datetime
    is_active: bool = True
    metadata: LimitedMetadata = Field(default_factory=dict)


class EntitlementRecord(Entitlement, Resource):
    kind: ClassVar[str] = "entitlement"

    @property
    def key(self) -> str:
        return self.id


class CreateEntitlement(Wire):
    name: Annotated[str, Field(min_length=1, max_length=255)]
    integration_type: str
    integration_config: LicenceKeyConfig
    description: str | None = None
    metadata: LimitedMetadata = Field(default_factory=dict)


class Attached(Wire):
    entitlement_id: str


class LicenceKey(Wire):
    id: str
    key: str
    status: Literal["active", "expired", "disabled"] = "active"
    activations_used: int = 0
    activations_limit: int | None = None
    expires_at: datetime | None = None


class Grant(Wire):
    id: str
    brand_id: str = BRAND_ID
    business_id: str = BUSINESS_ID
    created_at: datetime
    updated_at: datetime
    customer_id: str
    entitlement_id: str
    integration_type: Literal["license_key"] = "license_key"
    metadata: LimitedMetadata = Field(default_factory=dict)
    status: Literal["Pending", "Delivered", "Failed", "Revoked"] = "Delivered"
    delivered_at: datetime | None = None
    license_key: LicenceKey
    payment_id: str | None = None
    subscription_id: str | None = None
    revocation_reason: str | None = None
    revoked_at: datetime | None = None


class GrantRecord(Grant, Resource):
    kind: ClassVar[str] = "grant"
    product_id: str

    @property
    def key(self) -> str:
        return self.id

    @property
    def owner(self) -> str:
        return self.customer_id


class GrantFilter(Paging):
    customer_id: str | None = None
    status: str | None = None


def entitlement_of(sandbox: Sandbox, entitlement_id: str) -> EntitlementRecord:
    """Raises ApiError 404 for an unknown id."""
    found = sandbox.store.get(EntitlementRecord, entitlement_id)
    if found is None:
        raise not_found("entitlement", entitlement_id)
    return found


def summary(entitlement: Entitlement) -> EntitlementSummary:
    return EntitlementSummary(**{name: getattr(entitlement, name) for name in EntitlementSummary.model_fields})


def issue(
    sandbox: Sandbox,
    product_id: str,
    entitlements: list[EntitlementSummary],
    customer_id: str,
    at: datetime,
    count: int = 1,
    payment_id: str | None = None,
    subscription_id: str | None = None,
) -> None:
    """Issue and deliver ``count`` new keys for each entitlement."""
    for entitlement in entitlements:
        for _ in range(count):
            key = LicenceKey(
                id=new_id("lic"),
                key="-".join(secrets.token_hex(2).upper() for _ in range(8)),
                activations_limit=entitlement.integration_config.activations_limit,
            )
            made = GrantRecord(
                id=new_id("entg"), created_at=at, updated_at=at, delivered_at=at, customer_id=customer_id,
                entitlement_id=entitlement.id, license_key=key, product_id=product_id,
                payment_id=payment_id, subscription_id=subscription_id,
            )  # fmt: skip
            sandbox.store.put(made)
            for step in ("created", "delivered"):
                announce(sandbox, f"entitlement_grant.{step}", "grant", made, at)


def revoke(sandbox: Sandbox, one: GrantRecord, reason: str, at: datetime) -> GrantRecord:
    """Revoke a key, unless it is revoked already."""
    if one.status == "Revoked":
        return one
    disabled = one.license_key.model_copy(update={"status": "disabled"})
    change = {"status": "Revoked", "revoked_at": at, "updated_at": at, "revocation_reason": reason}
    ended = one.model_copy(update=change | {"license_key": disabled})
    sandbox.store.put(ended)
    announce(sandbox, "entitlement_grant.revoked", "grant", ended, at)
    return ended


def revoke_all(
    sandbox: Sandbox, reason: str, at: datetime, payment_id: str | None = None, subscription_id: str | None = None
) -> None:
    """Revoke every key of a payment or of a subscription."""
    for one in sandbox.store.find(GrantRecord):
        of_payment = payment_id is not None and one.payment_id == payment_id
        of_subscription = subscription_id is not None and one.subscription_id == subscription_id
        if of_payment or of_subscription:
            revoke(sandbox, one, reason, at)


def restore(sandbox: Sandbox, subscription_id: str, at: datetime) -> None:
    """Enable the keys again that a hold or a pause has disabled."""
    for one in sandbox.store.find(GrantRecord):
        if one.subscription_id == subscription_id and one.revocation_reason in SUSPENDING_EVENTS:
            active = one.license_key.model_copy(update={"status": "active"})
            change = {"status": "Delivered", "revoked_at": None, "updated_at": at, "revocation_reason": None}
            reopened = one.model_copy(update=change | {"license_key": active})
            sandbox.store.put(reopened)
            announce(sandbox, "entitlement_grant.delivered", "grant", reopened, at)


def grant_by_key(sandbox: Sandbox, key: str) -> GrantRecord | None:
    return next((one for one in sandbox.store.find(GrantRecord) if one.license_key.key == key), None)


@router.post("/entitlements")
async def create_entitlement(request: CreateEntitlement, sandbox: SandboxDep) -> Entitlement:
    if request.integration_type != "license_key":
        raise unprocessable("The sandbox models license_key entitlements only")
    if (request.integration_config.duration_count is None) != (request.integration_config.duration_interval is None):
        raise unprocessable("duration_count and duration_interval go together")
    if request.integration_config.fulfillment_mode == "manual":
        raise unprocessable("The sandbox models automatic fulfilment only")
    now = sandbox.clock.now()
    made = EntitlementRecord(
        id=new_id("ent"), created_at=now, updated_at=now, name=request.name, description=request.description,
        integration_config=request.integration_config, metadata=request.metadata,
    )  # fmt: skip
    sandbox.store.put(made)
    return made


@router.get("/entitlements")
async def list_entitlements(paging: Annotated[Paging, Query()], sandbox: SandboxDep) -> Page[Entitlement]:
    return paging.of(sandbox.store.find(EntitlementRecord))


@router.get("/entitlements/{entitlement_id}")
async def retrieve_entitlement(entitlement_id: str, sandbox: SandboxDep) -> Entitlement:
    return entitlement_of(sandbox, entitlement_id)


@router.get("/entitlements/{entitlement_id}/grants")
async def list_grants(
    entitlement_id: str, filters: Annotated[GrantFilter, Query()], sandbox: SandboxDep
) -> Page[Grant]:
    entitlement_of(sandbox, entitlement_id)
    found = sandbox.store.find(GrantRecord, filters.customer_id)
    return filters.of(
        [one for one in found if one.entitlement_id == entitlement_id and filters.status in (None, one.status)]
    )


@router.delete("/entitlements/{entitlement_id}/grants/{grant_id}")
async def revoke_grant(entitlement_id: str, grant_id: str, sandbox: SandboxDep) -> Grant:
    one = sandbox.store.get(GrantRecord, grant_id)
    if one is None or one.entitlement_id != entitlement_id:
        raise not_found("grant", grant_id)
    with sandbox.store.transaction():
        return revoke(sandbox, one, "revoked by the merchant", sandbox.clock.now())
