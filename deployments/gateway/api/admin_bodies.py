"""The response models of the operator's routes."""

from dataclasses import asdict
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from billing.catalog.catalog import Catalog, RejectedEntry
from billing.catalog.publication import GatewayState
from billing.export.events import SealedEvent
from billing.export.outbox import Backlog, ExporterState, Sums
from billing.ledger.account import Adjustment, Grant
from billing.notices.notice import Notice, NoticeKind
from billing.reconcile.proof_state import ProofState
from billing.reports.unsettled import Unsettled
from billing.tenants.tenant import Tenant
from deployments.gateway.api.bodies import AccountBody, Body
from deployments.inference.request import EngineStats


class TenantBody(Tenant):
    model_config = ConfigDict(json_schema_serialization_defaults_required=True)

    object: Literal["tenant"] = "tenant"

    @classmethod
    def of(cls, tenant: Tenant, **more: Any) -> Self:
        return cls(**dict(tenant), **more)


class TenantWithAccount(TenantBody):
    account: AccountBody


class _Movement(Body):
    source: str
    unit: Literal["nanos", "requests"]
    amount: int


class GrantBody(_Movement):
    granted: bool

    @classmethod
    def of(cls, grant: Grant, is_new: bool) -> Self:
        return cls(granted=is_new, source=grant.source, unit=grant.unit.value, amount=grant.amount)


class AdjustmentBody(_Movement):
    adjusted: bool

    @classmethod
    def of(cls, adjustment: Adjustment, is_new: bool) -> Self:
        return cls(adjusted=is_new, source=adjustment.source, unit=adjustment.unit.value, amount=adjustment.amount)


class CatalogBody(Catalog):
    quarantined: list[RejectedEntry]
    """The same as ``rejected``, under its name before 0.2."""
    hash: str
    price_versions: dict[str, str]
    retired_plans: list[str]
    """No longer offered; tenants who are on one stay on it."""
    gateway: str

    @classmethod
    def of(cls, catalog: Catalog, gateway_id: str) -> Self:
        return cls.model_construct(  # its parts are validated already, and ``quarantined`` is an alias in ``Catalog``
            **dict(catalog),
            quarantined=list(catalog.rejected),
            hash=catalog.content_hash,
            price_versions={model.id: model.price.version for model in catalog.models},
            retired_plans=sorted(catalog.retired),
            gateway=gateway_id,
        )


class GatewayBody(Body):
    gateway_id: str
    hash: str
    """Content hash of the catalog that it serves."""
    rejected: list[str]
    """``kind id: reason`` of every entry that it does not serve."""
    quarantined: list[str]
    """The same as ``rejected``, under its name before 0.2."""
    at_ms: int

    @classmethod
    def of(cls, state: GatewayState) -> Self:
        return cls(
            gateway_id=state.gateway_id,
            hash=state.hash,
            rejected=list(state.rejected),
            quarantined=list(state.rejected),
            at_ms=state.at_ms,
        )


class UnsettledBody(BaseModel):
    """What is open in the ledger. Ages are of the oldest, in seconds; 0 where there is none."""

    open_holds: int
    oldest_hold_s: int
    held_nanos: int
    oldest_unsealed_s: int
    unresolved: int
    quarantined: int
    """The same as ``unresolved``, under its name before 0.2."""
    backlog_age_s: int


class BillingBody(BaseModel):
    """The state of billing. Later versions may add fields."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=True)

    object: Literal["billing"] = "billing"
    pump: ExporterState
    sums: Sums
    backlog: int
    open_holds: int
    money: UnsettledBody
    books: dict[str, ProofState]
    parked_webhooks: int
    set_aside_webhooks: int
    unsealed_entries: int
    outbox_events: int
    dead_events: int
    withheld_records: int
    cursors: dict[str, str]
    unsettled_on_this_gateway: int
    quarantined_settles: int
    refused_settles: int
    unreadable_settles: int
    """Lines of this gateway's spool that cannot be read: nothing was settled by them."""

    @classmethod
    def of(
        cls, exporter: ExporterState, sums: Sums, backlog: Backlog, open_: Unsettled, now_ms: int, **more: Any
    ) -> Self:
        age_s = max(open_.oldest_unsealed_s, exporter.waiting_s(now_ms))
        return cls(
            pump=exporter,
            sums=sums,
            backlog=backlog.unsealed_entries + backlog.outbox_events,
            money=UnsettledBody(**asdict(open_), quarantined=open_.unresolved, backlog_age_s=age_s),
            unsealed_entries=backlog.unsealed_entries,
            outbox_events=backlog.outbox_events,
            dead_events=backlog.dead_events,
            withheld_records=backlog.withheld_records,
            quarantined_settles=open_.unresolved,
            **more,
        )


class EngineBody(BaseModel):
    """A replica's name, and its engine's counters and gauges (``EngineStats``)."""

    model_config = ConfigDict(extra="allow")

    replica: str
    steps: int
    running: int
    waiting: int
    adapters_resident: list[str]

    @classmethod
    def of(cls, replica: str, stats: EngineStats) -> Self:
        return cls(replica=replica, **asdict(stats))


class DeadLetter(BaseModel):
    """A sealed event that Dodo rejected for good, and its reason."""

    model_config = ConfigDict(extra="allow")

    id: str
    tenant: str
    name: str
    reason: str

    @classmethod
    def of(cls, event: SealedEvent) -> Self:
        return cls(**asdict(event))


class NoticeBody(Body):
    """Something that the owner should hear of; ``facts`` depend on its kind."""

    id: str
    kind: NoticeKind
    tenant: str
    once: str
    at_ms: int
    facts: dict[str, str]

    @classmethod
    def of(cls, notice: Notice) -> Self:
        return cls(**{**asdict(notice), "facts": dict(notice.facts)})
