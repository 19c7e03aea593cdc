"""Auto-refill: a tenant's consent to have its saved card charged for a pack when its balance is low."""

from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from billing.catalog.terms import Terms
from billing.clock import now_ms
from billing.commerce.auto_refill.refill import Refill, refusal_of
from billing.commerce.auto_refill.store import Refills
from billing.commerce.offers import offers_to
from billing.money import NANOS_PER_CENT
from billing.pricing.prices import Usd
from billing.tenants.tenant import Principal
from billing.usage import Name
from deployments.gateway.api.dependencies import Caller, GatewayDep
from deployments.gateway.api.document import refusals
from deployments.gateway.api.shop_bodies import RefillBody
from deployments.gateway.errors import BadRequest, NotFound

router = APIRouter(prefix="/v1/account/auto-refill", responses=refusals(401, 403, 503))


class RefillRequest(BaseModel):
    """``threshold_usd``: buy when the balance is this low. ``monthly_cap_usd``: never more than this in a month."""

    model_config = ConfigDict(extra="forbid")

    pack: Name
    threshold_usd: Usd
    monthly_cap_usd: Annotated[Usd, Field(gt=0)]


@router.put("", responses=refusals(400, 413))
async def put_refill(asked: RefillRequest, gateway: GatewayDep, caller: Caller) -> RefillBody:
    """Switch it on, or on again after a failure. The first pack is bought by hand: that saves the card.

    The pack as it is sold now is agreed to: when its price or what it brings changes, auto-refill stops.
    """
    wanted = Refill(
        pack=asked.pack,
        threshold_nanos=asked.threshold_usd,
        monthly_cap_cents=asked.monthly_cap_usd // NANOS_PER_CENT,
    )
    offers = offers_to(caller.tenant.id, gateway.parts.catalog_holder.current, now_ms())
    if refusal := refusal_of(wanted, offers.packs):
        raise BadRequest(refusal, "pack")
    agreed = wanted.model_copy(update={"terms": Terms.of_pack(wanted.pack, offers.packs[wanted.pack]).key})
    return RefillBody.of(await Refills(gateway.parts.redis).put(caller.tenant.id, agreed))


@router.get("", responses=refusals(404))
async def get_refill(gateway: GatewayDep, caller: Caller) -> RefillBody:
    """How it is set up, whether it is on, and its latest attempts."""
    return RefillBody.of(await _existing(Refills(gateway.parts.redis), caller))


@router.delete("", responses=refusals(404))
async def stop_refill(gateway: GatewayDep, caller: Caller) -> RefillBody:
    """Begin no more attempts. An attempt in flight is not stopped."""
    refills = Refills(gateway.parts.redis)
    await _existing(refills, caller)
    off = {"is_on": False, "stopped_because": "switched off by the tenant"}
    return RefillBody.of(await refills.change(caller.tenant.id, lambda refill: refill.model_copy(update=off)))


async def _existing(refills: Refills, caller: Principal) -> Refill:
    refill = await refills.get(caller.tenant.id)
    if refill is None:
        raise NotFound("auto-refill is not set up: PUT /v1/account/auto-refill")
    return refill
