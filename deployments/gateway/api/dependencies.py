"""What FastAPI passes to routes: the gateway, the caller, and the request's id."""

from collections.abc import Sequence
from typing import Annotated, cast

from fastapi import Depends, Request, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from billing.tenants.tenant import Principal
from billing.usage import RequestId
from deployments.gateway.api.scopes import SCOPES
from deployments.gateway.gateway import Gateway

API_KEY = HTTPBearer(scheme_name="ApiKey", description="A tenant's API key, `fbx_...`.", auto_error=False)
ADMIN_KEY = HTTPBearer(scheme_name="AdminKey", description="The operator's `FAREBOX_ADMIN_KEY`.", auto_error=False)
"""Only documented: ``caller`` and ``admin.operator`` check the keys."""


def gateway_of(request: Request) -> Gateway:
    return cast(Gateway, request.app.state.gateway)


# FastAPI runs a dependency that is a plain function in a thread, which costs more than a hold: these are async.


async def the_gateway(request: Request) -> Gateway:
    return gateway_of(request)


async def request_id(request: Request) -> RequestId:
    """The id that ``edge.Front`` gave to this request."""
    return RequestId(request.scope["farebox.request_id"])


async def caller(request: Request, _: Annotated[object, Security(API_KEY)] = None) -> Principal:
    """Who sends the request. Raises InvalidKey, TenantSuspended, ScopeMissing, StoreUnavailable."""
    gateway = gateway_of(request)
    principal = await gateway.authenticate(request.headers.get("authorization", ""))
    request.scope["farebox.tenant"] = principal.tenant.id
    route: APIRoute = request.scope["route"]
    principal.key.require(SCOPES[request.method, route.path_format])
    if address := client_address(request.headers.getlist("x-forwarded-for"), gateway.config.trusted_proxies):
        gateway.parts.address_sketches.note(principal.tenant.id, principal.key.id, address)
    return principal


def client_address(forwarded_for: Sequence[str], trusted_proxies: int) -> str:
    """The client's address as the outermost trusted proxy saw it; empty where it cannot be trusted.

    Each proxy appends the address that it was called from, so what a client forges is further to the left.
    """
    hops = [hop.strip() for line in forwarded_for for hop in line.split(",")]
    return hops[-trusted_proxies] if 0 < trusted_proxies <= len(hops) else ""


GatewayDep = Annotated[Gateway, Depends(the_gateway)]
Caller = Annotated[Principal, Depends(caller)]
OurRequestId = Annotated[RequestId, Depends(request_id)]
