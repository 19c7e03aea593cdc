"""Where Dodo Payments delivers: the raw bytes, verified before anything reads them."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from billing.dodo.errors import DodoUnavailable
from deployments.gateway.api.bodies import Received
from deployments.gateway.api.document import refusals
from deployments.gateway.services import Parts

router = APIRouter()
SIGNED = {"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}}
"""Dodo's envelope, by Standard Webhooks: verified as raw bytes before it is parsed."""


@router.post("/webhooks/dodo", response_model=Received, responses=refusals(401, 413, 503), openapi_extra=SIGNED)
async def dodo(request: Request, parts: Parts) -> JSONResponse:
    """2xx only after the write; anything else makes Dodo deliver again."""
    if parts.webhooks is None:
        raise DodoUnavailable("DODO_PAYMENTS_WEBHOOK_KEY is not set here: deliveries cannot be verified")
    await parts.webhooks.receive(await request.body(), dict(request.headers))
    return JSONResponse({"received": True})
