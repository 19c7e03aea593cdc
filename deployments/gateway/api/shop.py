"""Where a tenant buys: what it is offered, the page on which to pay, Dodo's portal, its invoices.

Knows who is offered what; every payment, card and invoice is Dodo's.
"""

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field

from billing.catalog.plans import Pack, Plan, Quota
from billing.clock import now_ms
from billing.commerce.dodo_ids import id_of
from billing.commerce.offers import Offers, offers_to
from billing.dodo.client import PAGE, Dodo
from billing.dodo.errors import DodoUnavailable
from billing.dodo.wire import Invoice
from billing.money import format_usd
from billing.tenants.tenant import Principal, Tenant
from billing.usage import Unit
from deployments.gateway.api.document import refusals
from deployments.gateway.api.errors import BadRequest, Conflict, NotFound
from deployments.gateway.api.shop_bodies import CheckoutBody, InvoicePage, OffersBody, PortalBody
from deployments.gateway.api.wire import Sent
from deployments.gateway.services import Caller, Parts, Services

MAX_PAGE_NUMBER = 1_000

router = APIRouter(responses=refusals(401, 403, 503))
Json = dict[str, object]


@router.get("/v1/offers", response_model=OffersBody)
async def offers(parts: Parts, caller: Caller) -> JSONResponse:
    """The packs and plans that this tenant may buy now, and how."""
    found = _offers(parts, caller)
    plan = _subscribed_to(caller.tenant)
    plans = {} if plan else found.plans
    return JSONResponse(
        {
            "object": "offers",
            "packs": [_pack_json(name, pack, parts.top_up_url) for name, pack in found.packs.items()],
            "plans": [_plan_json(name, one, parts.top_up_url) for name, one in plans.items()],
            "subscribed_to": plan or None,
        }
    )


def _offers(parts: Services, caller: Principal) -> Offers:
    return offers_to(caller.tenant.id, parts.gateway.catalog_holder.current, now_ms())


def _subscribed_to(tenant: Tenant) -> str:
    one = tenant.subscription
    return one.plan if one is not None and one.is_live(now_ms()) else ""


def _pack_json(name: str, pack: Pack, url: str) -> Json:
    return {
        "id": name,
        "price_usd": format_usd(pack.price),
        "grants": _quota_json(pack.grants),
        "expires_days": pack.expires_days,
        "licence_key": pack.licence_key,
        "buy": {"method": "POST", "url": url, "body": {"pack": name}},
    }


def _plan_json(name: str, plan: Plan, url: str) -> Json:
    return {
        "id": name,
        "kind": plan.kind.value,
        "monthly_price_usd": format_usd(plan.monthly_price),
        "grants": None if plan.allowance is None else _quota_json(plan.allowance),
        "overage_cap_usd": format_usd(plan.credit_limit),
        "limits": plan.limits.model_dump(mode="json"),
        "licence_key": plan.licence_key,
        "buy": {"method": "POST", "url": url, "body": {"plan": name}},
    }


def _quota_json(quota: Quota) -> Json:
    is_money = quota.unit is Unit.NANOS
    return {
        "unit": "usd" if is_money else "requests",
        "amount": format_usd(quota.amount) if is_money else quota.amount,
        "adapters": list(quota.adapters),
    }


class CheckoutRequest(Sent):
    """One of ``pack`` and ``plan``, by its name in ``GET /v1/offers``."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"pack": "small"}]})

    pack: str = ""
    plan: str = ""
    return_url: Annotated[str, Field(pattern="^(https?://.*)?$", max_length=2048)] = ""


@router.post("/v1/checkout", response_model=CheckoutBody, responses=refusals(400, 404, 409, 413, 502))
async def checkout(asked: CheckoutRequest, parts: Parts, caller: Caller) -> JSONResponse:
    """A page on which to pay. The credit comes with Dodo's webhook, not with the page."""
    name = _product_name(asked, parts, caller)
    dodo, tenant = await _at_dodo(parts, caller)
    product_id = await id_of(parts.redis, name)
    if not product_id:
        raise DodoUnavailable(f"{name} is not at the payments provider yet: retry in a few seconds")
    metadata = {"farebox_tenant": tenant.id, "farebox_product": name}
    url = await dodo.checkout(tenant, product_id, metadata, asked.return_url or parts.public_url)
    return JSONResponse({"object": "checkout", "checkout_url": url, "session_id": url.rstrip("/").rpartition("/")[2]})


def _product_name(asked: CheckoutRequest, parts: Services, caller: Principal) -> str:
    if bool(asked.pack) == bool(asked.plan):
        raise BadRequest("give either pack or plan", "pack")
    offered = _offers(parts, caller)
    if asked.pack:
        if asked.pack not in offered.packs:
            raise NotFound(f"pack {asked.pack!r} is not sold: {', '.join(sorted(offered.packs)) or 'none is'}")
        return f"pack:{asked.pack}"
    if asked.plan not in offered.plans:
        raise NotFound(f"plan {asked.plan!r} cannot be subscribed to: {', '.join(sorted(offered.plans)) or 'none can'}")
    if plan := _subscribed_to(caller.tenant):
        raise Conflict(f"a subscription to {plan!r} is active: cancel it first (POST /v1/portal)")
    return f"plan:{asked.plan}"


@router.post("/v1/portal", response_model=PortalBody, responses=refusals(502))
async def portal(parts: Parts, caller: Caller) -> JSONResponse:
    """A link to Dodo's page of this customer: its card, invoices and subscription. It is good for a while only."""
    dodo, tenant = await _at_dodo(parts, caller)
    return JSONResponse({"object": "portal", "url": await dodo.portal(tenant.dodo_customer_id)})


@router.get("/v1/invoices", response_model=InvoicePage, responses=refusals(400, 502))
async def invoices(
    parts: Parts,
    caller: Caller,
    page: Annotated[int, Query(ge=0, le=MAX_PAGE_NUMBER)] = 0,
    limit: Annotated[int, Query(ge=1, le=PAGE)] = 20,
) -> JSONResponse:
    """The tenant's payments, failed ones too, in Dodo's order. Keep ``limit``; ``next_page`` is null at the end."""
    dodo, tenant = await _at_dodo(parts, caller)
    found = await dodo.invoices(tenant.dodo_customer_id, page, limit)
    is_last = len(found) < limit or page == MAX_PAGE_NUMBER
    data = [_invoice_json(invoice) for invoice in found]
    return JSONResponse({"object": "list", "data": data, "next_page": None if is_last else page + 1})


def _invoice_json(invoice: Invoice) -> Json:
    told: Json = asdict(invoice)
    maybe = ("product", "subscription_id", "refund_status", "invoice_id", "invoice_url")
    return told | {name: told[name] or None for name in maybe}


async def _at_dodo(parts: Services, caller: Principal) -> tuple[Dodo, Tenant]:
    """Dodo, and the tenant as the customer that it is there. Raises DodoUnavailable while it is none."""
    if parts.dodo is None:
        raise DodoUnavailable("payments are not configured here: ask the operator")
    tenant = await parts.tenants.get(caller.tenant.id)
    if not tenant.dodo_customer_id:
        raise DodoUnavailable("your customer record is still being made: retry in a few seconds")
    return parts.dodo, tenant
