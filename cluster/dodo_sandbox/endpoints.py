"""Webhook endpoints: their URLs, event types and secrets. ``announce`` sends an event to those that want it."""

import base64
import secrets
from datetime import datetime
from typing import Annotated, ClassVar

from fastapi import APIRouter, Query, Response
from pydantic import Field
from standardwebhooks.webhooks import EmptyWebhookSecretError, Webhook

from cluster.dodo_sandbox.errors import not_found
from cluster.dodo_sandbox.outbox import PayloadKind
from cluster.dodo_sandbox.state import Sandbox, SandboxDep
from cluster.dodo_sandbox.wire import Resource, Wire, new_id, to_ms

SECRET_SETTING = "webhook_secret"
FILTER_PREFIXES = (
    "payment.", "refund.", "dispute.", "subscription.", "license_key.", "payout.", "credit.",
    "abandoned_checkout.", "dunning.", "entitlement_grant.",
)  # fmt: skip

router = APIRouter()

EventType = Annotated[str, Field(pattern="^(" + "|".join(p[:-1] for p in FILTER_PREFIXES) + r")\.[a-z_]+$")]
HeaderText = Annotated[str, Field(pattern=r"^[\x21-\x7e][\x20-\x7e]*$")]
Url = Annotated[str, Field(pattern=r"^https?://[^\s/]+")]


class Endpoint(Wire):
    id: str
    created_at: str
    description: str = ""
    metadata: dict[str, str] = Field(default_factory=dict)
    updated_at: str
    url: str
    disabled: bool | None = None
    filter_types: list[str] | None = None
    rate_limit: int | None = None


class EndpointRecord(Endpoint, Resource):
    kind: ClassVar[str] = "endpoint"
    secret: str = Field(repr=False)
    headers: dict[str, str] = Field(default_factory=dict)
    idempotency_key: str | None = None

    @property
    def key(self) -> str:
        return self.id

    def wants(self, type_: str) -> bool:
        return not self.disabled and (not self.filter_types or type_ in self.filter_types)


class CreateEndpoint(Wire):
    url: Url
    description: str | None = None
    disabled: bool | None = None
    filter_types: list[EventType] | None = None
    headers: dict[HeaderText, HeaderText] | None = None
    idempotency_key: str | None = None
    metadata: dict[str, str] | None = None
    rate_limit: Annotated[int, Field(ge=0)] | None = None


class UpdateEndpoint(Wire):
    url: Url | None = None
    description: str | None = None
    disabled: bool | None = None
    filter_types: list[EventType] | None = None
    metadata: dict[str, str] | None = None
    rate_limit: Annotated[int, Field(ge=0)] | None = None


class EndpointPaging(Wire):
    iterator: str | None = None
    limit: Annotated[int, Field(ge=1, le=250)] = 50


class EndpointPage(Wire):
    data: list[Endpoint]
    iterator: str | None
    done: bool


class EndpointSecret(Wire):
    secret: str


class EndpointHeaders(Wire):
    headers: dict[str, str]
    sensitive: list[str] = Field(default_factory=list)


def generated_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(24)).decode()


def well_formed(secret: str) -> bool:
    """Whether the ``standardwebhooks`` library can check a signature made with this secret."""
    try:
        Webhook(secret)
    except (ValueError, EmptyWebhookSecretError):
        return False
    return secret.startswith("whsec_")


def adopt_secret(sandbox: Sandbox, given: str | None) -> None:
    """Use ``given`` for every endpoint, old and new; without it each endpoint has its own secret."""
    sandbox.store.set_setting(SECRET_SETTING, given or "")
    if given is not None:
        for endpoint in sandbox.store.find(EndpointRecord):
            sandbox.store.put(endpoint.model_copy(update={"secret": given}))


def endpoint_of(sandbox: Sandbox, endpoint_id: str) -> EndpointRecord:
    """Raises ApiError 404 for an unknown id."""
    endpoint = sandbox.store.get(EndpointRecord, endpoint_id)
    if endpoint is None:
        raise not_found("webhook", endpoint_id)
    return endpoint


def announce(
    sandbox: Sandbox, type_: str, kind: PayloadKind, resource: Resource, at: datetime, payment_id: str | None = None
) -> None:
    """Send an event about ``resource`` to every endpoint that wants its type."""
    wanting = [endpoint.id for endpoint in reversed(sandbox.store.find(EndpointRecord)) if endpoint.wants(type_)]
    sandbox.outbox.emit(type_, kind, resource, wanting, to_ms(at), payment_id)


@router.post("/webhooks")
async def create_endpoint(request: CreateEndpoint, sandbox: SandboxDep) -> Endpoint:
    """A second request with the same ``idempotency_key`` creates no second endpoint."""
    for known in sandbox.store.find(EndpointRecord):
        if request.idempotency_key is not None and known.idempotency_key == request.idempotency_key:
            return known
    now = sandbox.clock.now().isoformat()
    fields = request.model_dump(exclude_none=True)
    secret = sandbox.store.setting(SECRET_SETTING) or generated_secret()
    endpoint = EndpointRecord(id=new_id("ep"), created_at=now, updated_at=now, secret=secret, **fields)
    sandbox.store.put(endpoint)
    return endpoint


@router.get("/webhooks")
async def list_endpoints(paging: Annotated[EndpointPaging, Query()], sandbox: SandboxDep) -> EndpointPage:
    """One page; ``iterator`` is the number of endpoints before it."""
    start = int(paging.iterator) if paging.iterator and paging.iterator.isdigit() else 0
    endpoints = sandbox.store.find(EndpointRecord)[::-1]
    end = start + paging.limit
    return EndpointPage(data=list(endpoints[start:end]), iterator=str(end), done=end >= len(endpoints))


@router.get("/webhooks/{endpoint_id}")
async def retrieve_endpoint(endpoint_id: str, sandbox: SandboxDep) -> Endpoint:
    return endpoint_of(sandbox, endpoint_id)


@router.patch("/webhooks/{endpoint_id}")
async def update_endpoint(endpoint_id: str, request: UpdateEndpoint, sandbox: SandboxDep) -> Endpoint:
    change = request.model_dump(exclude_none=True) | {"updated_at": sandbox.clock.now().isoformat()}
    endpoint = endpoint_of(sandbox, endpoint_id).model_copy(update=change)
    sandbox.store.put(endpoint)
    return endpoint


@router.delete("/webhooks/{endpoint_id}")
async def delete_endpoint(endpoint_id: str, sandbox: SandboxDep) -> Response:
    sandbox.store.delete(endpoint_of(sandbox, endpoint_id))
    sandbox.outbox.cancel_deliveries(endpoint_id)
    return Response(status_code=200)


@router.get("/webhooks/{endpoint_id}/secret")
async def retrieve_secret(endpoint_id: str, sandbox: SandboxDep) -> EndpointSecret:
    return EndpointSecret(secret=endpoint_of(sandbox, endpoint_id).secret)


@router.get("/webhooks/{endpoint_id}/headers")
async def retrieve_headers(endpoint_id: str, sandbox: SandboxDep) -> EndpointHeaders:
    return EndpointHeaders(headers=endpoint_of(sandbox, endpoint_id).headers)
