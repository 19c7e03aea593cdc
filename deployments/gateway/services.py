"""What the routers work with, built once per gateway process and handed to each by ``Depends``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request, Security
from fastapi.security import HTTPBearer
from redis.asyncio import Redis

from billing.commerce.webhooks import Webhooks
from billing.dodo.client import Dodo
from billing.ledger.answers import Answers
from billing.ledger.ledger import Ledger
from billing.tenants.directory import Tenants
from billing.tenants.tenant import Principal
from billing.usage import RequestId
from deployments.gateway.gateway import Gateway

API_KEY = HTTPBearer(scheme_name="ApiKey", description="A tenant's API key, `fbx_...`.", auto_error=False)
ADMIN_KEY = HTTPBearer(scheme_name="AdminKey", description="The operator's `FAREBOX_ADMIN_KEY`.", auto_error=False)
"""For the document: who a key belongs to is found out by us."""


@dataclass(frozen=True, slots=True)
class Services:
    """One gateway's parts. Addresses and secrets come from its environment."""

    gateway: Gateway
    redis: Redis
    ledger: Ledger
    tenants: Tenants
    answers: Answers
    dodo: Dodo | None
    """``None`` where no payments key is configured: nothing can be bought, everything else works."""
    webhooks: Webhooks | None
    gateway_id: str
    base_model: str
    admin_key: str
    """Empty switches the admin API off."""
    public_url: str
    trusted_proxies: int
    max_body_bytes: int

    @property
    def top_up_url(self) -> str:
        return f"{self.public_url}/v1/checkout"


def services_of(request: Request) -> Services:
    return cast(Services, request.app.state.services)


# FastAPI runs a dependency that is a plain function on a thread, which costs more than a hold: these are async.


async def parts_of(request: Request) -> Services:
    return services_of(request)


async def request_id_of(request: Request) -> RequestId:
    """Our own id of this request, made at the app's edge."""
    return RequestId(request.scope["farebox.request_id"])


async def authenticated(request: Request, _: Annotated[object, Security(API_KEY)] = None) -> Principal:
    """Raises InvalidKey, TenantSuspended, StoreUnavailable."""
    services = services_of(request)
    principal = await services.gateway.authenticate(request.headers.get("authorization", ""))
    if address := client_address(request.headers.getlist("x-forwarded-for"), services.trusted_proxies):
        services.gateway.address_sketches.note(principal.tenant.id, principal.key.id, address)
    return principal


def client_address(forwarded_for: Sequence[str], trusted_proxies: int) -> str:
    """What the outermost of our proxies saw; empty where none is trusted, or fewer wrote than there are.

    Each proxy appends whom it was called by, so what a client forges stands further left.
    """
    hops = [hop.strip() for line in forwarded_for for hop in line.split(",")]
    return hops[-trusted_proxies] if 0 < trusted_proxies <= len(hops) else ""


Parts = Annotated[Services, Depends(parts_of)]
Caller = Annotated[Principal, Depends(authenticated)]
OurId = Annotated[RequestId, Depends(request_id_of)]
