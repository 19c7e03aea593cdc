"""The operator's routes: tenants, keys, grants, and what the gateways and the billing actor say of themselves."""

import hmac
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Security
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field

from billing.catalog import publication
from billing.catalog.plans import Plan
from billing.catalog.publication import GatewayState
from billing.clock import now_ms
from billing.commerce.inbox import Inbox
from billing.export.outbox import Outbox
from billing.ledger.account import Adjustment, Grant
from billing.money import NANOS_PER_USD, AmountError, parse_usd
from billing.notices.log import Notices
from billing.pricing.prices import Usd
from billing.reconcile import proof_state
from billing.reports.unsettled import Unsettled, unsettled
from billing.tenants.tenant import Email, Tenant, TenantName
from billing.usage import TenantId, Unit
from deployments.gateway.api.account import account_json
from deployments.gateway.api.admin_bodies import (
    AdjustmentBody,
    BillingBody,
    CatalogBody,
    DeadLetter,
    EngineBody,
    GatewayList,
    GrantBody,
    NoticeBody,
    TenantBody,
    TenantWithAccount,
)
from deployments.gateway.api.bodies import Listing
from deployments.gateway.api.document import refusals
from deployments.gateway.api.errors import AdminDenied, BadRequest, NotFound
from deployments.gateway.api.wire import Sent
from deployments.gateway.catalog_holder import as_json
from deployments.gateway.services import ADMIN_KEY, Parts, services_of

DAY_MS = 24 * 3_600_000
Json = dict[str, object]


async def operator(request: Request, _: Annotated[object, Security(ADMIN_KEY)] = None) -> None:
    """Raises AdminDenied unless the admin key is sent as a bearer token."""
    wanted = services_of(request).admin_key
    if not wanted:
        raise AdminDenied("the admin API is off: set FAREBOX_ADMIN_KEY")
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), wanted.encode()):
        raise AdminDenied("the admin key is missing or wrong: send `Authorization: Bearer <FAREBOX_ADMIN_KEY>`")


router = APIRouter(prefix="/admin", dependencies=[Depends(operator)], responses=refusals(401, 503))


class _Asked(Sent):
    model_config = ConfigDict(extra="forbid")


class NewTenant(_Asked):
    model_config = ConfigDict(json_schema_extra={"examples": [{"id": "globex", "email": "it@globex.example"}]})

    id: TenantName
    email: Email
    name: str = ""
    plan: str = ""
    """Empty takes the catalog's default plan."""


class TenantChange(_Asked):
    plan: str | None = None
    name: str | None = None
    email: Email | None = None
    suspended: bool | None = None


class NewGrant(_Asked):
    """Either ``usd`` or ``requests``. The same ``source`` twice is one grant."""

    source: Annotated[str, Field(min_length=1, max_length=128)]
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


class NewAdjustment(_Asked):
    """A correction: either ``usd`` or ``requests``, below zero to take. The same ``source`` twice is one."""

    source: Annotated[str, Field(min_length=1, max_length=128)]
    usd: str | None = None
    requests: int | None = None
    reason: Annotated[str, Field(min_length=1, max_length=500)]

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


@router.post("/tenants", status_code=201, response_model=TenantBody, responses=refusals(400, 404, 409, 413))
async def create_tenant(asked: NewTenant, parts: Parts) -> JSONResponse:
    plan = asked.plan or parts.gateway.catalog_holder.current.default_plan
    _check_plan(parts.gateway.catalog_holder.current.plans, plan)
    tenant = Tenant(id=TenantId(asked.id), email=asked.email, plan=plan, name=asked.name, created_at_ms=now_ms())
    return JSONResponse(_tenant(await parts.tenants.create(tenant)), 201)


@router.get("/tenants", response_model=Listing[TenantBody])
async def list_tenants(parts: Parts) -> JSONResponse:
    return JSONResponse({"object": "list", "data": [_tenant(tenant) for tenant in await parts.tenants.list()]})


@router.get("/tenants/{tenant_id}", response_model=TenantWithAccount, responses=refusals(404))
async def get_tenant(tenant_id: TenantId, parts: Parts) -> JSONResponse:
    tenant = await parts.tenants.get(tenant_id)
    return JSONResponse(_tenant(tenant) | {"account": await account_json(parts, tenant)})


@router.patch("/tenants/{tenant_id}", response_model=TenantBody, responses=refusals(400, 404, 409, 413))
async def change_tenant(tenant_id: TenantId, asked: TenantChange, parts: Parts) -> JSONResponse:
    changes = asked.model_dump(exclude_none=True)
    if asked.plan is not None:
        _check_plan(parts.gateway.catalog_holder.current.plans, asked.plan)
    changed = await parts.tenants.update(tenant_id, lambda tenant: tenant.model_copy(update=changes))
    return JSONResponse(_tenant(changed))


@router.post("/tenants/{tenant_id}/suspend", response_model=TenantBody, responses=refusals(404))
async def suspend_tenant(tenant_id: TenantId, parts: Parts) -> JSONResponse:
    """New requests are refused within a second; running ones end as they would."""
    changed = await parts.tenants.update(tenant_id, lambda tenant: tenant.model_copy(update={"suspended": True}))
    return JSONResponse(_tenant(changed))


@router.post("/tenants/{tenant_id}/resume", response_model=TenantBody, responses=refusals(404))
async def resume_tenant(tenant_id: TenantId, parts: Parts) -> JSONResponse:
    changed = await parts.tenants.update(tenant_id, lambda tenant: tenant.model_copy(update={"suspended": False}))
    return JSONResponse(_tenant(changed))


@router.post("/tenants/{tenant_id}/grants", response_model=GrantBody, responses=refusals(400, 404, 409, 413))
async def grant(tenant_id: TenantId, asked: NewGrant, parts: Parts) -> JSONResponse:
    """``granted`` is false where this source was granted before."""
    tenant = await parts.tenants.get(tenant_id)
    made = asked.to_grant(tenant.id)
    is_new = await parts.ledger.grant(made)
    return JSONResponse({"granted": is_new, "source": made.source, "unit": made.unit.value, "amount": made.amount})


@router.post("/tenants/{tenant_id}/adjustments", response_model=AdjustmentBody, responses=refusals(400, 404, 409, 413))
async def adjust(tenant_id: TenantId, asked: NewAdjustment, parts: Parts) -> JSONResponse:
    """``adjusted`` is false where this source was counted before. Nothing of it is told to Dodo."""
    tenant = await parts.tenants.get(tenant_id)
    made = asked.to_adjustment(tenant.id)
    is_new = await parts.ledger.adjust(made)
    return JSONResponse({"adjusted": is_new, "source": made.source, "unit": made.unit.value, "amount": made.amount})


@router.get("/catalogue", response_model=CatalogBody)
async def catalog(parts: Parts) -> JSONResponse:
    """What this gateway sells, and the entries it set aside with their reasons."""
    return JSONResponse(as_json(parts.gateway.catalog_holder.current) | {"gateway": parts.gateway_id})


@router.get("/gateways", response_model=GatewayList)
async def gateways(parts: Parts) -> JSONResponse:
    """Every gateway's own word: the hash of the catalog it serves, and when it last said so."""
    return JSONResponse(
        {"object": "list", "data": [_gateway_json(state) for state in await publication.gateways(parts.redis)]}
    )


@router.get("/billing", response_model=BillingBody)
async def billing(parts: Parts) -> JSONResponse:
    """The billing actor's state as it last wrote it, its cursors and sums, and what is not told or settled yet."""
    outbox = Outbox(parts.redis)
    state, sums, backlog = await outbox.shown(), await outbox.sums(), await outbox.backlog()
    open_ = await unsettled(parts.redis)
    return JSONResponse(
        {
            "object": "billing",
            "pump": asdict(state),
            "sums": asdict(sums),
            "backlog": backlog.unsealed_entries + backlog.outbox_events,
            "open_holds": await parts.ledger.open_holds(),
            "money": _money_json(open_, max(open_.oldest_unsealed_s, state.waiting_s(now_ms()))),
            "books": {kind: asdict(proof) for kind, proof in (await proof_state.shown(parts.redis)).items()},
            "parked_webhooks": await Inbox(parts.redis).parked_count(),
            "unsealed_entries": backlog.unsealed_entries,
            "outbox_events": backlog.outbox_events,
            "dead_events": backlog.dead_events,
            "withheld_records": backlog.withheld_records,
            "cursors": {str(shard): cursor for shard, cursor in (await outbox.cursors()).items()},
            "unsettled_on_this_gateway": parts.gateway.settler.spooled,
            "quarantined_settles": len(await parts.ledger.recovery.kept()),
            "refused_settles": await parts.gateway.settler.refused(),
        }
    )


@router.get("/engines", response_model=Listing[EngineBody])
async def engines(parts: Parts) -> JSONResponse:
    """Every replica's engine, as it counts itself."""
    stats = await parts.gateway.link.stats()
    return JSONResponse({"object": "list", "data": [{"replica": name, **asdict(s)} for name, s in stats.items()]})


@router.get("/notices", response_model=Listing[NoticeBody], responses=refusals(400))
async def list_notices(parts: Parts, limit: Annotated[int, Query(ge=1, le=1_000)] = 100) -> JSONResponse:
    """What the owner should hear of, newest first."""
    found = await Notices(parts.redis).newest(limit)
    return JSONResponse({"object": "list", "data": [json.loads(notice.to_json()) for notice in found]})


@router.get("/dead-letters", response_model=Listing[DeadLetter])
async def dead_letters(parts: Parts) -> JSONResponse:
    """Events that Dodo refused for good, with its reason."""
    dead = await Outbox(parts.redis).dead()
    return JSONResponse({"object": "list", "data": [json.loads(event.to_json()) for event in dead]})


def _check_plan(plans: Mapping[str, Plan], plan: str) -> None:
    if plan not in plans:
        raise NotFound(f"plan {plan!r} is not one of {', '.join(sorted(plans))}")


def _tenant(tenant: Tenant) -> Json:
    return {"object": "tenant", **tenant.model_dump(mode="json")}


def _gateway_json(state: GatewayState) -> Json:
    return {**asdict(state), "quarantined": state.rejected}


def _money_json(open_: Unsettled, backlog_age_s: int) -> Json:
    return {**asdict(open_), "quarantined": open_.unresolved, "backlog_age_s": backlog_age_s}
