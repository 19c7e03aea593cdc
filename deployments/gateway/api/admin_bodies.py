"""The shape of every answer to the operator, as the OpenAPI document tells it."""

from typing import Literal

from pydantic import BaseModel

from billing.catalog.catalog import Catalog, RejectedEntry
from billing.catalog.publication import GatewayState
from billing.export.outbox import ExporterState, Sums
from billing.notices.notice import NoticeKind
from billing.tenants.tenant import Tenant
from deployments.gateway.api.bodies import AccountBody, Body, Listing


class TenantBody(Tenant):
    object: Literal["tenant"]


class TenantWithAccount(TenantBody):
    account: AccountBody


class GrantBody(Body):
    granted: bool
    source: str
    unit: Literal["nanos", "requests"]
    amount: int


class AdjustmentBody(Body):
    adjusted: bool
    source: str
    unit: Literal["nanos", "requests"]
    amount: int


class CatalogBody(Catalog):
    quarantined: list[RejectedEntry]
    """The same as ``rejected``, under its name before 0.2."""
    hash: str
    price_versions: dict[str, str]
    retired_plans: list[str]
    """No longer offered; who is on one stays on it."""
    gateway: str


class BillingBody(BaseModel):
    """More may be told from one version to the next."""

    object: Literal["billing"]
    pump: ExporterState
    sums: Sums
    backlog: int
    open_holds: int
    unsealed_entries: int
    outbox_events: int
    dead_events: int
    withheld_records: int
    cursors: dict[str, str]
    unsettled_on_this_gateway: int
    refused_settles: int


class EngineBody(BaseModel):
    """The replica's name beside its engine's counters (``EngineStats``)."""

    replica: str
    steps: int
    running: int
    waiting: int
    adapters_resident: list[str]


class DeadLetter(BaseModel):
    id: str
    tenant: str
    name: str
    reason: str


class NoticeBody(Body):
    """Something an owner wants to hear of; ``facts`` depend on its kind."""

    id: str
    kind: NoticeKind
    tenant: str
    once: str
    at_ms: int
    facts: dict[str, str]


GatewayList = Listing[GatewayState]
