"""The pages for buyers who come from a link: what to buy, and what became of it.

They work without JavaScript, load nothing and set no cookie. A client that does not ask for HTML gets the same as JSON.
No page is opened by an API key: a link carries a right of its own (``billing.commerce.links``).
"""

import base64
import hashlib
from collections.abc import Callable, Coroutine
from functools import cache
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlencode

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, ValidationError

from billing.catalog.plans import Pack, Plan, Quota
from billing.clock import now_ms
from billing.commerce.links import LinkInvalid, Receipt, TopUp
from billing.commerce.offers import by_need
from billing.commerce.products import Products
from billing.commerce.receipts import Outcome, Returned, State, outcome_of
from billing.dodo.errors import DodoUnavailable
from billing.errors import BillingError
from billing.ledger.account import Account
from billing.ledger.admission import funding_for, plan_of
from billing.money import format_usd
from billing.tenants.errors import TenantSuspended, UnknownTenant
from billing.tenants.tenant import Tenant
from billing.usage import TenantId, Unit
from deployments.gateway.api.dependencies import GatewayDep, gateway_of
from deployments.gateway.api.document import refusals
from deployments.gateway.api.errors import answer_for, headers_of, problem_of
from deployments.gateway.api.shop import offers_for, open_checkout, subscribed_plan, wanted
from deployments.gateway.api.shop_bodies import (
    CheckoutBody,
    GrantedBody,
    PackOffer,
    PlanOffer,
    ReceiptBody,
    TopUpBody,
)
from deployments.gateway.errors import BadRequest, NotFound
from deployments.gateway.gateway import Gateway

TEMPLATES = Path(__file__).parent / "templates"
CHECKOUT_HOSTS = "https: http://127.0.0.1:* http://localhost:*"
"""Where a form may lead in the end: a checkout of Dodo, or of the sandbox on this machine."""
REFRESHES = 12
"""How often a page that waits for Dodo's webhook reloads itself: after 2, 4, 8, 16 seconds, then each half minute."""
LONGEST_WAIT_S = 30
FORM = "application/x-www-form-urlencoded"


def wants_html(request: Request) -> bool:
    return "text/html" in request.headers.get("accept", "")


class PageRoute(APIRoute):
    """A route whose refusals are pages too, where a page was asked for."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except (BillingError, RequestValidationError) as error:
                if not wants_html(request):
                    raise
                refusal = error if isinstance(error, BillingError) else BadRequest("the address is not well-formed")
                return _refusal(request, refusal)

        return answer


async def _private(response: Response) -> None:
    response.headers["cache-control"] = "no-store"
    response.headers["referrer-policy"] = "no-referrer"


router = APIRouter(route_class=PageRoute, dependencies=[Depends(_private)], responses=refusals(400, 403, 404, 503))
HTML: dict[int | str, dict[str, Any]] = {200: {"content": {"text/html": {"schema": {"type": "string"}}}}}
REDIRECT: dict[int | str, dict[str, Any]] = {303: {"description": "For a browser: to the checkout"}}


@router.get("/top-up/{link}", response_model=TopUpBody, responses=HTML)
async def top_up(link: str, request: Request, gateway: GatewayDep) -> TopUpBody | Response:
    """What the link's tenant may buy, what helps it most first. Opens no checkout: mail scanners follow links."""
    asked, _, packs, plans = await _offered(gateway, link)
    if wants_html(request):
        if gateway.parts.dodo is None:
            raise DodoUnavailable("payments are not configured here: ask the operator")
        return _page("top_up.html", packs=packs, plans=plans, is_retry=bool(asked.product))
    url = gateway.config.top_up_url(link)
    return TopUpBody(
        packs=[PackOffer.of(name, pack, url) for name, pack in packs.items()],
        plans=[PlanOffer.of(name, plan, url) for name, plan in plans.items()],
    )


class Choice(BaseModel):
    """One of ``pack`` and ``plan``; without either, what the link offers first."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"pack": "small"}]})

    pack: str = ""
    plan: str = ""


CHOICE = {
    "requestBody": {"content": {type_: {"schema": Choice.model_json_schema()} for type_ in (FORM, "application/json")}}
}


@router.post(
    "/top-up/{link}",
    response_model=CheckoutBody,
    responses=REDIRECT | refusals(409, 413, 429, 502),
    openapi_extra=CHOICE,
)
async def open_top_up(link: str, request: Request, gateway: GatewayDep) -> CheckoutBody | Response:
    """A checkout for the link's tenant. A browser is sent there."""
    choice = _choice(await request.body(), request.headers.get("content-type", ""))
    _, tenant, packs, plans = await _offered(gateway, link)
    if not choice.pack and not choice.plan:
        choice = Choice(pack=next(iter(packs), ""), plan="" if packs else next(iter(plans), ""))
    if not choice.pack and not choice.plan:
        raise NotFound("nothing is sold here at the moment: ask the operator")
    terms = wanted(gateway, tenant, choice.pack, choice.plan)
    await gateway.parts.links.count_checkout(tenant.id)
    opened = await open_checkout(gateway, tenant.id, terms)
    return RedirectResponse(opened.checkout_url, 303, HEADERS) if wants_html(request) else opened


def _choice(body: bytes, content_type: str) -> Choice:
    try:
        if content_type.partition(";")[0].strip().lower() == "application/json":
            return Choice.model_validate_json(body or b"{}")
        return Choice.model_validate(dict(parse_qsl(body.decode())))
    except (ValidationError, ValueError) as error:
        raise BadRequest(
            "send `pack` or `plan` with a name that this link offers, as a form or as JSON", "pack"
        ) from error


async def _offered(gateway: Gateway, token: str) -> tuple[TopUp, Tenant, dict[str, Pack], dict[str, Plan]]:
    """The link, its tenant, and what it may buy: packs, or plans where no pack is sold."""
    link = await gateway.parts.links.read(TopUp, token)
    tenant = await _tenant(gateway, link.tenant)
    offered = offers_for(gateway, tenant)
    kind, _, name = link.product.partition(":")
    packs = {one: offered.packs[one] for one in by_need(offered.packs, link.needed, name if kind == "pack" else "")}
    wants_plan = kind == "plan" and name in offered.plans
    plans = {name: offered.plans[name]} if wants_plan else dict(offered.plans) if not packs else {}
    return link, tenant, packs, {} if subscribed_plan(tenant) else plans


async def _tenant(gateway: Gateway, tenant_id: TenantId) -> Tenant:
    """Raises LinkInvalid, and TenantSuspended without the tenant's name: a link shows no name."""
    try:
        tenant = await gateway.parts.tenants.get(tenant_id)
    except UnknownTenant:
        raise LinkInvalid from None
    if tenant.suspended:
        raise TenantSuspended("of this link")
    return tenant


Hint = Annotated[str, Query(max_length=128)]


@router.get(
    "/paid/{link}",
    response_model=ReceiptBody,
    responses=HTML | {303: {"description": "For a browser: the same without a licence key in its address"}},
)
async def paid(
    link: str,
    request: Request,
    gateway: GatewayDep,
    payment_id: Hint = "",
    subscription_id: Hint = "",
    status: Hint = "",
    seen: Annotated[int, Query(ge=0, le=REFRESHES)] = 0,
) -> ReceiptBody | Response:
    """What was bought by the checkout that led here, and what is left. Dodo adds the query to the address."""
    receipt = await gateway.parts.links.read(Receipt, link)
    tenant = await _tenant(gateway, receipt.tenant)
    returned = Returned(payment_id, subscription_id, status)
    query = {"payment_id": payment_id, "subscription_id": subscription_id, "status": status}
    if wants_html(request) and request.query_params.keys() - query.keys() - {"seen"}:
        # A licence key or an email leaves the address bar and the browser's history.
        return RedirectResponse(f"?{urlencode(query)}", 303, HEADERS)
    parts = gateway.parts
    outcome = await outcome_of(parts.redis, parts.ledger, tenant, receipt, returned)
    retry_url = None
    if outcome.state is State.DECLINED:
        again = TopUp(tenant.id, product=receipt.product)
        retry_url = gateway.config.top_up_url(await parts.links.write_from(link, again))
    account = await _account(gateway, tenant) if outcome.state is State.PAID else None
    if not wants_html(request):
        return _receipt_body(receipt, outcome, account, retry_url)
    terms = await Products(parts.redis).terms(receipt.product_id)
    wait_s = min(2 ** (seen + 1), LONGEST_WAIT_S) if outcome.state is State.CONFIRMING and seen < REFRESHES else 0
    return _page(
        "paid.html",
        outcome=outcome,
        product=receipt.product,
        account=account,
        retry_url=retry_url,
        has_licence_key=terms is not None and terms.licence_key,
        refresh=f"{wait_s}; url=?{urlencode(query | {'seen': seen + 1})}" if wait_s else "",
    )


def _receipt_body(receipt: Receipt, outcome: Outcome, account: Account | None, retry_url: str | None) -> ReceiptBody:
    credit = outcome.credit
    return ReceiptBody(
        state=outcome.state,
        product=receipt.product,
        granted=None if credit is None else GrantedBody.of(credit),
        balance_usd=None if account is None else format_usd(account.balance_nanos),
        try_again_url=retry_url,
    )


async def _account(gateway: Gateway, tenant: Tenant) -> Account:
    funding = funding_for(tenant, plan_of(tenant, gateway.parts.catalog_holder.current), now_ms())
    return await gateway.parts.ledger.account(tenant.id, funding)


# How pages are made.


def _refusal(request: Request, error: BillingError) -> Response:
    answer, problem = answer_for(error), problem_of(error)
    gateway_of(request).parts.metrics.refused(answer.code)
    title, text = TITLES.get(answer.status, problem.title), problem.detail
    if isinstance(error, LinkInvalid):  # its message speaks to a program
        title, text = "This link does not work", INVALID
    page = _page("message.html", answer.status, title=title, text=text)
    page.headers.update(headers_of(error))
    return page


TITLES = {404: "This is not sold here", 429: "Too many checkouts", 503: "Not available at the moment"}
INVALID = "It has expired or was altered: a link works for a week. Ask whoever sent it to you for a new one."


def _page(template: str, status: int = 200, **values: object) -> HTMLResponse:
    return HTMLResponse(_templates().get_template(template).render(**values), status, HEADERS | {CSP: _policy()})


HEADERS = {
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-robots-tag": "noindex",
}
CSP = "content-security-policy"


@cache
def _style() -> Markup:
    return Markup((TEMPLATES / "style.css").read_text())


@cache
def _policy() -> str:
    """Nothing but our own style, as its digest, and forms that lead to a checkout."""
    digest = base64.b64encode(hashlib.sha256(_style().encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{digest}'; form-action 'self' {CHECKOUT_HOSTS}; "
        "base-uri 'none'; frame-ancestors 'none'"
    )


@cache
def _templates() -> Environment:
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals["style"] = _style()
    environment.filters |= {"usd": _usd, "quota": _quota, "credit": _credit}
    return environment


def _usd(nanos: int) -> str:
    amount = format_usd(nanos, 2)
    return f"-${amount[1:]}" if amount.startswith("-") else f"${amount}"


def _quota(quota: Quota) -> str:
    return _credit(quota.unit, quota.amount, quota.adapters)


def _credit(unit: Unit, amount: int, adapters: tuple[str, ...] = ()) -> str:
    if unit is Unit.NANOS:
        return f"{_usd(amount)} of credit"
    where = f" on {', '.join(adapters)}" if adapters else ""
    return f"{amount:,} request{'' if amount == 1 else 's'}{where}"
