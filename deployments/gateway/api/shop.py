"""Where a tenant buys: offers, checkout, Dodo's portal, invoices. Payments and cards are Dodo's alone."""

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import ConfigDict, Field

from billing.catalog.terms import Terms
from billing.clock import now_ms
from billing.commerce.links import Receipt
from billing.commerce.offers import Offers, offers_to
from billing.commerce.products import Products
from billing.dodo.client import PAGE, Dodo
from billing.dodo.errors import DodoUnavailable
from billing.tenants.tenant import Tenant
from billing.usage import TenantId
from deployments.gateway.api.dependencies import Caller, GatewayDep
from deployments.gateway.api.document import refusals
from deployments.gateway.api.shop_bodies import (
    CheckoutBody,
    InvoiceBody,
    InvoicePage,
    OffersBody,
    PackOffer,
    PlanOffer,
    PortalBody,
)
from deployments.gateway.api.wire import Sent
from deployments.gateway.errors import BadRequest, Conflict, NotFound
from deployments.gateway.gateway import Gateway

MAX_PAGE_NUMBER = 1_000

router = APIRouter(responses=refusals(401, 403, 503))


@router.get("/v1/offers")
async def offers(gateway: GatewayDep, caller: Caller) -> OffersBody:
    """The packs and plans that this tenant may buy now, and how."""
    found, config = offers_for(gateway, caller.tenant), gateway.config
    subscribed_to = subscribed_plan(caller.tenant)
    plan_url = config.plan_url if subscribed_to else config.checkout_url
    plans = {name: plan for name, plan in found.plans.items() if name != subscribed_to}
    return OffersBody(
        packs=[PackOffer.of(name, pack, config.checkout_url) for name, pack in found.packs.items()],
        plans=[PlanOffer.of(name, plan, plan_url) for name, plan in plans.items()],
        subscribed_to=subscribed_to or None,
    )


def offers_for(gateway: Gateway, tenant: Tenant) -> Offers:
    return offers_to(tenant.id, gateway.parts.catalog_holder.current, now_ms())


def subscribed_plan(tenant: Tenant) -> str:
    one = tenant.subscription
    return one.plan if one is not None and one.is_live(now_ms()) else ""


class CheckoutRequest(Sent):
    """One of ``pack`` and ``plan``, by its name in ``GET /v1/offers``."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"pack": "small"}]})

    pack: str = ""
    plan: str = ""
    return_url: Annotated[str, Field(pattern="^(https?://.*)?$", max_length=2048)] = ""
    """Where the buyer goes after paying; without one, to a page of ours that says what was bought."""


@router.post("/v1/checkout", responses=refusals(400, 404, 409, 413, 502))
async def checkout(asked: CheckoutRequest, gateway: GatewayDep, caller: Caller) -> CheckoutBody:
    """A page on which to pay. Dodo's webhook brings the credit, not the page."""
    terms = wanted(gateway, caller.tenant, asked.pack, asked.plan)
    return await open_checkout(gateway, caller.tenant.id, terms, asked.return_url)


async def open_checkout(gateway: Gateway, tenant_id: TenantId, terms: Terms, return_url: str = "") -> CheckoutBody:
    """Open a checkout of what ``wanted`` allowed. Without a ``return_url`` it leads back to a receipt."""
    dodo, tenant = await _at_dodo(gateway, tenant_id)
    if terms.kind == "plan" and (current := subscribed_plan(tenant)):
        raise Conflict(f"a subscription to {current!r} is active: change its plan with POST /v1/plan")
    product_id = await Products(gateway.parts.redis).id_for(terms)
    if not product_id:
        raise DodoUnavailable(f"{terms.name} is not at the payments provider: the operator makes it there")
    metadata = {"farebox_tenant": tenant.id, "farebox_product": terms.name}
    if not return_url:
        receipt = Receipt(tenant.id, terms.name, product_id)
        return_url = gateway.config.receipt_url(await gateway.parts.links.write(receipt))
    url = await dodo.checkout(tenant, product_id, metadata, return_url)
    return CheckoutBody(checkout_url=url, session_id=url.rstrip("/").rpartition("/")[2])


def wanted(gateway: Gateway, tenant: Tenant, pack: str, plan: str) -> Terms:
    """What this tenant would buy. Raises BadRequest, NotFound where it may not."""
    if bool(pack) == bool(plan):
        raise BadRequest("give either pack or plan", "pack")
    offered = offers_for(gateway, tenant)
    if pack:
        if pack not in offered.packs:
            raise NotFound(f"pack {pack!r} is not sold: {', '.join(sorted(offered.packs)) or 'none is'}")
        return Terms.of_pack(pack, offered.packs[pack])
    if plan not in offered.plans:
        raise NotFound(f"plan {plan!r} cannot be subscribed to: {', '.join(sorted(offered.plans)) or 'none can'}")
    return Terms.of_plan(plan, offered.plans[plan])


@router.post("/v1/portal", responses=refusals(502))
async def portal(gateway: GatewayDep, caller: Caller) -> PortalBody:
    """A link to Dodo's page of this customer: its card, invoices and subscription. It is good for a while only."""
    dodo, tenant = await _at_dodo(gateway, caller.tenant.id)
    return PortalBody(url=await dodo.portal(tenant.dodo_customer_id))


@router.get("/v1/invoices", responses=refusals(400, 502))
async def invoices(
    gateway: GatewayDep,
    caller: Caller,
    page: Annotated[int, Query(ge=0, le=MAX_PAGE_NUMBER)] = 0,
    limit: Annotated[int, Query(ge=1, le=PAGE)] = 20,
) -> InvoicePage:
    """The tenant's payments, failed ones too, in Dodo's order. Keep ``limit``; ``next_page`` is null at the end."""
    dodo, tenant = await _at_dodo(gateway, caller.tenant.id)
    found = await dodo.invoices(tenant.dodo_customer_id, page, limit)
    is_last = len(found) < limit or page == MAX_PAGE_NUMBER
    return InvoicePage(data=[InvoiceBody.of(invoice) for invoice in found], next_page=None if is_last else page + 1)


async def _at_dodo(gateway: Gateway, tenant_id: TenantId) -> tuple[Dodo, Tenant]:
    """Dodo, and the tenant as the customer that it is there. Raises DodoUnavailable while it is none."""
    if gateway.parts.dodo is None:
        raise DodoUnavailable("payments are not configured here: ask the operator")
    tenant = await gateway.parts.tenants.get(tenant_id)
    if not tenant.dodo_customer_id:
        raise DodoUnavailable("your customer record is still being made: retry in a few seconds")
    return gateway.parts.dodo, tenant
