"""Where a tenant with a subscription changes its plan, and sees before what that costs."""

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import ConfigDict

from billing.catalog.catalog import Catalog
from billing.commerce.context import Commerce
from billing.commerce.plan_changes import PlanChanges
from billing.dodo.errors import DodoUnavailable
from billing.tenants.tenant import Tenant
from billing.usage import Name
from deployments.gateway.api.dependencies import Caller, GatewayDep
from deployments.gateway.api.document import refusals
from deployments.gateway.api.shop import offers_for, subscribed_plan
from deployments.gateway.api.shop_bodies import PlanChangeBody, PlanPreviewBody
from deployments.gateway.api.wire import Sent
from deployments.gateway.errors import NotFound
from deployments.gateway.gateway import Gateway

router = APIRouter(responses=refusals(401, 403, 503))


class PlanRequest(Sent):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"plan": "team"}]})

    plan: Name


@router.post("/v1/plan", responses=refusals(400, 402, 404, 409, 413, 502))
async def change_plan(asked: PlanRequest, gateway: GatewayDep, caller: Caller) -> PlanChangeBody:
    """Change the subscription to another plan, or to the terms that its plan has now.

    A dearer plan counts at once: what is left of the period is taken off its first fee, and usage so far is billed with
    it. A cheaper one counts from the next period on. The same request again changes nothing more.
    """
    tenant = await _allowed(asked.plan, gateway, caller.tenant)
    return PlanChangeBody.of(asked.plan, await plan_changes(gateway).change(tenant, asked.plan))


@router.get("/v1/plan/preview", responses=refusals(400, 404, 409, 502))
async def preview_plan(
    plan: Annotated[str, Query(max_length=128)], gateway: GatewayDep, caller: Caller
) -> PlanPreviewBody:
    """What `POST /v1/plan` would charge now, and when the plan would count. Nothing is changed."""
    tenant = await _allowed(plan, gateway, caller.tenant)
    return PlanPreviewBody.of(plan, await plan_changes(gateway).quote(tenant, plan))


async def _allowed(plan: str, gateway: Gateway, caller: Tenant) -> Tenant:
    """The tenant as it is stored now. Raises NotFound for a plan that is not sold to it."""
    tenant = await gateway.parts.tenants.get(caller.id)
    sold = {*offers_for(gateway, tenant).plans, subscribed_plan(tenant)} - {""}
    if plan not in sold:
        raise NotFound(f"plan {plan!r} cannot be subscribed to: {', '.join(sorted(sold)) or 'none can'}")
    return tenant


def plan_changes(gateway: Gateway) -> PlanChanges:
    """Raises DodoUnavailable where payments are not configured."""
    parts = gateway.parts
    if parts.dodo is None:
        raise DodoUnavailable("payments are not configured here: ask the operator")

    async def in_force() -> Catalog | None:
        return parts.catalog_holder.current

    return PlanChanges(Commerce(parts.redis, parts.dodo, parts.ledger, parts.tenants, in_force))
