"""The operator's routes: tenants, grants, and the state of the gateways, the engines and billing."""

import hmac
from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Security
from pydantic import ConfigDict, Field

from billing.catalog import publication
from billing.catalog.plans import Plan
from billing.clock import now_ms
from billing.commerce.inbox import Inbox
from billing.commerce.plan_changes import carries_other_plan
from billing.export.outbox import Outbox
from billing.ledger.account import Adjustment, Grant
from billing.money import NANOS_PER_USD, AmountError, parse_usd
from billing.notices.log import Notices
from billing.pricing.prices import Usd
from billing.reconcile import proof_state
from billing.reports.unsettled import unsettled
from billing.tenants.tenant import Email, Reason, Reference, ShownName, Tenant, TenantName
from billing.usage import TenantId, Unit
from deployments.gateway.api.account import read_account
from deployments.gateway.api.admin_bodies import (
    AdjustmentBody,
    BillingBody,
    CatalogBody,
    DeadLetter,
    EngineBody,
    GatewayBody,
    GrantBody,
    NoticeBody,
    TenantBody,
    TenantWithAccount,
)
from deployments.gateway.api.bodies import AccountBody, Listing
from deployments.gateway.api.dependencies import ADMIN_KEY, GatewayDep, gateway_of
from deployments.gateway.api.document import refusals
from deployments.gateway.api.plan import plan_changes
from deployments.gateway.api.wire import Sent
from deployments.gateway.errors import AdminDenied, BadRequest, NotFound
from deployments.gateway.gateway import Gateway

DAY_MS = 24 * 3_600_000


async def operator(request: Request, _: Annotated[object, Security(ADMIN_KEY)] = None) -> None:
    """Raises AdminDenied unless the admin key is sent as a bearer token."""
    wanted = gateway_of(request).config.admin_key
    if not wanted:
        raise AdminDenied("the admin API is off: set FAREBOX_ADMIN_KEY")
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), wanted.encode()):
        raise AdminDenied("the admin key is missing or wrong: send `Authorization: Bearer <FAREBOX_ADMIN_KEY>`")


router = APIRouter(prefix="/admin", dependencies=[Depends(operator)], responses=refusals(401, 503))


class _Request(Sent):
    model_config = ConfigDict(extra="forbid")


class NewTenant(_Request):
    model_config = ConfigDict(json_schema_extra={"examples": [{"id": "globex", "email": "it@globex.example"}]})

    id: TenantName
    email: Email
    name: ShownName = ""
    plan: str = ""
    """Empty takes the catalog's default plan."""


class TenantChange(_Request):
    plan: str | None = None
    name: ShownName | None = None
    email: Email | None = None
    suspended: bool | None = None


class NewGrant(_Request):
    """Either ``usd`` or ``requests``. The same ``source`` twice is one grant."""

    source: Reference
    usd: Usd | None = None
    requests: int | None = None
    adapters: tuple[str, ...] = ()
    expires_days: Annotated[int, Field(ge=1, le=3650)] | None = None

    def to_grant(self, tenant: TenantId) -> Grant:
        if (self.requests is None) == (self.usd is None) or (self.usd is not None and self.adapters):
            raise BadRequest("give either usd or requests; adapters only with requests", "usd")
        expires = None if self.expires_days is None else now_ms() + self.expires_days * DAY_MS
        unit, amount = (Unit.NANOS, int(self.usd)) if self.usd is not None else (Unit.REQUESTS, self.requests or 0)
        if not 0 < amount <= 1_000_000 * NANOS_PER_USD:
            raise BadRequest("a grant is above 0 and at most 1000000", "usd")
        return Grant(f"operator:{self.source}", tenant, unit, amount, expires, self.adapters)


class NewAdjustment(_Request):
    """A correction: either ``usd`` or ``requests``, below zero to take. The same ``source`` twice is one."""

    source: Reference
    usd: str | None = None
    requests: int | None = None
    reason: Reason

    def to_adjustment(self, tenant: TenantId) -> Adjustment:
        if (self.requests is None) == (self.usd is None):
            raise BadRequest("give either usd or requests", "usd")
        try:
            unit, amount = (
                (Unit.REQUESTS, self.requests or 0) if self.usd is None else (Unit.NANOS, int(parse_usd(self.usd)))
            )
        except AmountError as error:
            raise BadRequest(str(error), "usd") from error
        return Adjustment(f"adjustment:{self.source}", tenant, unit, amount, self.reason)


@router.post("/tenants", status_code=201, responses=refusals(400, 404, 409, 413))
async def create_tenant(asked: NewTenant, gateway: GatewayDep) -> TenantBody:
    catalog = gateway.parts.catalog_holder.current
    plan = asked.plan or catalog.default_plan
    _check_plan(catalog.plans, plan)
    tenant = Tenant(id=TenantId(asked.id), email=asked.email, plan=plan, name=asked.name, created_at_ms=now_ms())
    return TenantBody.of(await gateway.parts.tenants.create(tenant))


@router.get("/tenants")
async def list_tenants(gateway: GatewayDep) -> Listing[TenantBody]:
    return Listing(data=[TenantBody.of(tenant) for tenant in await gateway.parts.tenants.list()])


@router.get("/tenants/{tenant_id}", responses=refusals(404))
async def get_tenant(tenant_id: TenantId, gateway: GatewayDep) -> TenantWithAccount:
    tenant = await gateway.parts.tenants.get(tenant_id)
    return TenantWithAccount.of(tenant, account=await read_account(gateway, tenant, AccountBody))


@router.patch("/tenants/{tenant_id}", responses=refusals(400, 402, 404, 409, 413, 502))
async def change_tenant(tenant_id: TenantId, asked: TenantChange, gateway: GatewayDep) -> TenantBody:
    """A ``plan`` for a tenant with an active subscription changes that at Dodo Payments, as `POST /v1/plan` does."""
    changes = asked.model_dump(exclude_none=True)
    if asked.plan is not None:
        _check_plan(gateway.parts.catalog_holder.current.plans, asked.plan)
        tenant = await gateway.parts.tenants.get(tenant_id)
        if carries_other_plan(tenant, asked.plan, now_ms()):
            await plan_changes(gateway).change(tenant, asked.plan)
            del changes["plan"]
    return await _update(gateway, tenant_id, changes)


@router.post("/tenants/{tenant_id}/suspend", responses=refusals(404))
async def suspend_tenant(tenant_id: TenantId, gateway: GatewayDep) -> TenantBody:
    """New requests are refused within a second; running ones go on to their end."""
    return await _update(gateway, tenant_id, {"suspended": True})


@router.post("/tenants/{tenant_id}/resume", responses=refusals(404))
async def resume_tenant(tenant_id: TenantId, gateway: GatewayDep) -> TenantBody:
    return await _update(gateway, tenant_id, {"suspended": False})


@router.post("/tenants/{tenant_id}/grants", responses=refusals(400, 404, 409, 413))
async def grant(tenant_id: TenantId, asked: NewGrant, gateway: GatewayDep) -> GrantBody:
    """``granted`` is false where this source was granted before."""
    tenant = await gateway.parts.tenants.get(tenant_id)
    made = asked.to_grant(tenant.id)
    return GrantBody.of(made, await gateway.parts.ledger.grant(made))


@router.post("/tenants/{tenant_id}/adjustments", responses=refusals(400, 404, 409, 413))
async def adjust(tenant_id: TenantId, asked: NewAdjustment, gateway: GatewayDep) -> AdjustmentBody:
    """``adjusted`` is false where this source was counted before. Dodo Payments is not informed of adjustments."""
    tenant = await gateway.parts.tenants.get(tenant_id)
    made = asked.to_adjustment(tenant.id)
    return AdjustmentBody.of(made, await gateway.parts.ledger.adjust(made))


@router.get("/catalogue", operation_id="catalogue_admin_catalogue_get")
async def catalog(gateway: GatewayDep) -> CatalogBody:
    """What this gateway sells, and the rejected entries with their reasons."""
    return CatalogBody.of(gateway.parts.catalog_holder.current, gateway.config.gateway_id)


@router.get("/gateways")
async def gateways(gateway: GatewayDep) -> Listing[GatewayBody]:
    """Every gateway, the hash of the catalog that it serves, and when it last reported it."""
    return Listing(data=[GatewayBody.of(state) for state in await publication.gateways(gateway.parts.redis)])


@router.get("/billing")
async def billing(gateway: GatewayDep) -> BillingBody:
    """The exporter's state as it last reported it, its cursors and sums, and what is not exported or settled yet."""
    redis, ledger, settler = gateway.parts.redis, gateway.parts.ledger, gateway.parts.settler
    outbox = Outbox(redis)
    state, sums, backlog = await outbox.shown(), await outbox.sums(), await outbox.backlog()
    return BillingBody.of(
        state,
        sums,
        backlog,
        await unsettled(redis),
        now_ms(),
        open_holds=await ledger.open_holds(),
        books=await proof_state.shown(redis),
        parked_webhooks=await Inbox(redis).parked_count(),
        set_aside_webhooks=await Inbox(redis).set_aside_count(),
        cursors={str(shard): cursor for shard, cursor in (await outbox.cursors()).items()},
        unsettled_on_this_gateway=settler.spooled,
        refused_settles=await settler.refused(),
        unreadable_settles=await settler.unreadable(),
    )


@router.get("/engines")
async def engines(gateway: GatewayDep) -> Listing[EngineBody]:
    """Every replica's engine, with its counters and gauges."""
    return Listing(data=[EngineBody.of(*one) for one in (await gateway.parts.link.stats()).items()])


@router.get("/notices", responses=refusals(400))
async def list_notices(gateway: GatewayDep, limit: Annotated[int, Query(ge=1, le=1_000)] = 100) -> Listing[NoticeBody]:
    """What the owner should hear of, newest first."""
    return Listing(data=[NoticeBody.of(notice) for notice in await Notices(gateway.parts.redis).newest(limit)])


@router.get("/dead-letters")
async def dead_letters(gateway: GatewayDep) -> Listing[DeadLetter]:
    """Events that Dodo Payments rejected for good, with its reason."""
    return Listing(data=[DeadLetter.of(event) for event in await Outbox(gateway.parts.redis).dead()])


def _check_plan(plans: Mapping[str, Plan], plan: str) -> None:
    if plan not in plans:
        raise NotFound(f"plan {plan!r} is not one of {', '.join(sorted(plans))}")


async def _update(gateway: Gateway, tenant_id: TenantId, changes: Mapping[str, object]) -> TenantBody:
    tenants = gateway.parts.tenants
    return TenantBody.of(await tenants.update(tenant_id, lambda tenant: tenant.model_copy(update=changes)))
