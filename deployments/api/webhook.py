"""Where Dodo Payments delivers: the raw bytes, verified before anything reads them."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from billing.errors import DodoUnavailable
from deployments.services import Parts

router = APIRouter()


@router.post("/webhooks/dodo")
async def dodo(request: Request, parts: Parts) -> JSONResponse:
    """2xx only after the write; anything else makes Dodo deliver again."""
    if parts.webhooks is None:
        raise DodoUnavailable("DODO_PAYMENTS_WEBHOOK_KEY is not set here: deliveries cannot be verified")
    await parts.webhooks.receive(await request.body(), dict(request.headers))
    return JSONResponse({"received": True})
