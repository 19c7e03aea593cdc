"""Liveness and readiness."""

from fastapi import APIRouter, Response
from redis.asyncio import Redis

from billing.store.connection import guarded
from billing.store.errors import StoreUnavailable
from deployments.gateway.api.bodies import Alive, Checks, Ready
from deployments.gateway.api.dependencies import GatewayDep

router = APIRouter()


@router.get("/healthz")
async def healthz() -> Alive:
    return Alive()


@router.get("/readyz", responses={503: {"model": Ready, "description": "Not ready"}})
async def readyz(gateway: GatewayDep, response: Response) -> Ready:
    """Ready when the store answers, a catalog is in force and a replica answers."""
    checks = Checks(
        store=await _answers(gateway.parts.redis),
        catalogue=gateway.parts.catalog_holder.has_catalog,
        replica=await gateway.parts.link.is_ready(),
    )
    if checks.store and checks.catalogue and checks.replica:
        return Ready(status="ready", checks=checks)
    response.status_code = 503
    response.headers["retry-after"] = "1"
    return Ready(status="not ready", checks=checks)


async def _answers(redis: Redis) -> bool:
    try:
        async with guarded():
            return bool(await redis.ping())
    except StoreUnavailable:
        return False
