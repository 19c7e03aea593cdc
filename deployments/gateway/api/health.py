"""Is this process alive, and can it serve a paid request?"""

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from billing.store.connection import guarded
from billing.store.errors import StoreUnavailable
from deployments.gateway.api.bodies import Alive, Ready
from deployments.gateway.services import Parts, Services

router = APIRouter()


@router.get("/healthz", response_model=Alive)
async def healthz() -> JSONResponse:
    return JSONResponse({"status": "ok"})


@router.get("/readyz", response_model=Ready, responses={503: {"model": Ready, "description": "Not ready"}})
async def readyz(parts: Parts) -> JSONResponse:
    """Ready when the store answers, a catalog is in force and a replica answers."""
    checks = {
        "store": await _store_answers(parts),
        "catalogue": parts.gateway.catalog_holder.is_stocked,
        "replica": await parts.gateway.link.is_ready(),
    }
    is_ready = all(checks.values())
    body = {"status": "ready" if is_ready else "not ready", "checks": checks}
    return JSONResponse(body, 200 if is_ready else 503, {} if is_ready else {"retry-after": "1"})


async def _store_answers(parts: Services) -> bool:
    try:
        async with guarded():
            return bool(await parts.redis.ping())
    except StoreUnavailable:
        return False
