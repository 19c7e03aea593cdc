"""Where Dodo Payments delivers webhooks: their raw bytes are verified before they are parsed."""

from fastapi import APIRouter, Request

from billing.dodo.errors import DodoUnavailable
from deployments.gateway.api.bodies import Received
from deployments.gateway.api.dependencies import GatewayDep
from deployments.gateway.api.document import refusals

router = APIRouter()
SIGNED = {"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}}
"""Dodo's envelope, by Standard Webhooks."""


@router.post("/webhooks/dodo", responses=refusals(401, 413, 503), openapi_extra=SIGNED)
async def dodo(request: Request, gateway: GatewayDep) -> Received:
    """2xx only after the write; anything else makes Dodo deliver again."""
    if gateway.parts.webhooks is None:
        raise DodoUnavailable("DODO_PAYMENTS_WEBHOOK_KEY is not set here: deliveries cannot be verified")
    await gateway.parts.webhooks.receive(await request.body(), dict(request.headers))
    return Received()
