"""Auto-refill: a tenant's consent to have its saved card charged for a pack when its balance is low."""

from typing import Annotated, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from billing.clock import now_ms
from billing.commerce.auto_refill.refill import Attempt, AttemptState, Refill, refusal_of
from billing.commerce.auto_refill.store import Refills
from billing.commerce.offers import offers_to
from billing.money import NANOS_PER_CENT, format_usd
from billing.pricing.prices import Usd
from billing.usage import Name
from deployments.gateway.api.bodies import Body, Dollars
from deployments.gateway.api.document import refusals
from deployments.gateway.api.errors import BadRequest, NotFound
from deployments.gateway.services import Caller, Parts

router = APIRouter(prefix="/v1/account/auto-refill", responses=refusals(401, 403, 503))
Json = dict[str, object]


class RefillAttempt(Body):
    id: str
    state: AttemptState
    amount_usd: Dollars
    payment_id: str | None
    reason: str | None
    started_at_ms: int
    ended_at_ms: int | None


class RefillBody(Body):
    object: Literal["auto_refill"]
    pack: str
    threshold_usd: Dollars
    monthly_cap_usd: Dollars
    on: bool
    stopped_because: str
    attempts: list[RefillAttempt]


class RefillRequest(BaseModel):
    """``threshold_usd``: buy when the balance is this low. ``monthly_cap_usd``: never more than this in a month."""

    model_config = ConfigDict(extra="forbid")

    pack: Name
    threshold_usd: Usd
    monthly_cap_usd: Annotated[Usd, Field(gt=0)]


@router.put("", response_model=RefillBody, responses=refusals(400, 413))
async def put_refill(asked: RefillRequest, parts: Parts, caller: Caller) -> JSONResponse:
    """Switch it on, or on again after a failure. The first pack is bought by hand: that saves the card."""
    wanted = Refill(
        pack=asked.pack,
        threshold_nanos=asked.threshold_usd,
        monthly_cap_cents=asked.monthly_cap_usd // NANOS_PER_CENT,
    )
    if refusal := refusal_of(wanted, offers_to(caller.tenant.id, parts.gateway.catalog_holder.current, now_ms()).packs):
        raise BadRequest(refusal, "pack")
    return JSONResponse(_refill_json(await Refills(parts.redis).put(caller.tenant.id, wanted)))


@router.get("", response_model=RefillBody, responses=refusals(404))
async def get_refill(parts: Parts, caller: Caller) -> JSONResponse:
    """How it is set up, whether it is on, and every attempt that is remembered."""
    return JSONResponse(_refill_json(await _known(parts, caller)))


@router.delete("", response_model=RefillBody, responses=refusals(404))
async def stop_refill(parts: Parts, caller: Caller) -> JSONResponse:
    """Begin no more attempts. One that is in flight ends as it would."""
    await _known(parts, caller)
    off = {"is_on": False, "stopped_because": "switched off by the tenant"}
    stopped = await Refills(parts.redis).change(caller.tenant.id, lambda refill: refill.model_copy(update=off))
    return JSONResponse(_refill_json(stopped))


async def _known(parts: Parts, caller: Caller) -> Refill:
    refill = await Refills(parts.redis).get(caller.tenant.id)
    if refill is None:
        raise NotFound("auto-refill is not set up: PUT /v1/account/auto-refill")
    return refill


def _refill_json(refill: Refill) -> Json:
    return {
        "object": "auto_refill",
        "pack": refill.pack,
        "threshold_usd": format_usd(refill.threshold_nanos),
        "monthly_cap_usd": format_usd(refill.monthly_cap_cents * NANOS_PER_CENT),
        "on": refill.is_on,
        "stopped_because": refill.stopped_because,
        "attempts": [_attempt_json(attempt) for attempt in reversed(refill.attempts)],
    }


def _attempt_json(attempt: Attempt) -> Json:
    return {
        "id": attempt.id,
        "state": attempt.state.value,
        "amount_usd": format_usd(attempt.cents * NANOS_PER_CENT),
        "payment_id": attempt.payment_id or None,
        "reason": attempt.reason or None,
        "started_at_ms": attempt.started_at_ms,
        "ended_at_ms": attempt.ended_at_ms or None,
    }
