"""Meters: which events count, and how many units the events of a period are.

Event names match exactly. An event does not count if it lacks a property that is filtered or summed, or has text where
a number is needed (usage-based-billing guide).
"""

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import Annotated, ClassVar, Literal

from fastapi import APIRouter, Query, Response
from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from cluster.dodo_sandbox.errors import bad_request, not_found
from cluster.dodo_sandbox.state import Sandbox, SandboxDep
from cluster.dodo_sandbox.wire import BUSINESS_ID, Metadata, Page, Paging, Resource, Wire, new_id

METERS_MAX = 50
"""Per account (Dodo's changelog, v1.53.2)."""
FILTER_DEPTH_MAX = 3
FILTER_CLAUSES_MAX = 10

router = APIRouter()

Name = Annotated[str, Field(min_length=1, max_length=255)]
Operator = Literal[
    "equals", "not_equals", "greater_than", "greater_than_or_equals",
    "less_than", "less_than_or_equals", "contains", "does_not_contain",
]  # fmt: skip


class Aggregation(Wire):
    type: Literal["count", "sum", "max", "last"]
    key: str | None = None

    @model_validator(mode="after")
    def _key_is_given(self) -> "Aggregation":
        if self.type != "count" and not self.key:
            raise ValueError(f"aggregation {self.type} needs a key")
        return self


class Condition(Wire):
    key: Annotated[str, Field(max_length=100)]
    operator: Operator
    value: StrictStr | StrictInt | StrictFloat | StrictBool

    def admits(self, metadata: Metadata) -> bool:
        if self.key not in metadata:
            return False
        found = metadata[self.key]
        if self.operator in ("equals", "not_equals"):
            return (found == self.value) == (self.operator == "equals")
        if self.operator in ("contains", "does_not_contain"):
            return (str(self.value) in str(found)) == (self.operator == "contains")
        if isinstance(found, str | bool) or isinstance(self.value, str | bool):
            return False
        ahead = (found > self.value) - (found < self.value)
        return {
            "greater_than": ahead > 0,
            "greater_than_or_equals": ahead >= 0,
            "less_than": ahead < 0,
            "less_than_or_equals": ahead <= 0,
        }[self.operator]


class Filter(Wire):
    conjunction: Literal["and", "or"]
    clauses: Annotated[list["Condition | Filter"], Field(min_length=1, max_length=FILTER_CLAUSES_MAX)]

    def depth(self) -> int:
        return 1 + max((clause.depth() for clause in self.clauses if isinstance(clause, Filter)), default=0)

    def admits(self, metadata: Metadata) -> bool:
        combine = all if self.conjunction == "and" else any
        return combine(clause.admits(metadata) for clause in self.clauses)


class Meter(Wire):
    id: str
    aggregation: Aggregation
    business_id: str = BUSINESS_ID
    created_at: datetime
    event_name: str
    measurement_unit: str
    name: str
    updated_at: datetime
    description: str | None = None
    filter: Filter | None = None


class MeterRecord(Meter, Resource):
    kind: ClassVar[str] = "meter"
    archived_at: datetime | None = None

    @property
    def key(self) -> str:
        return self.id


class CreateMeter(Wire):
    aggregation: Aggregation
    event_name: Name
    measurement_unit: Name
    name: Name
    description: str | None = None
    filter: Filter | None = None


class UpdateMeter(Wire):
    """Event name, aggregation and filter cannot be changed (the SDK's meter_update_params)."""

    name: Name | None = None
    measurement_unit: Name | None = None
    description: str | None = None


class MeterFilter(Paging):
    archived: bool = False


def units(meter: Meter, metadata: Sequence[Metadata]) -> Decimal:
    """The units of a period's events, whose metadata come in the order of timestamps."""
    counted = [one for one in metadata if meter.filter is None or meter.filter.admits(one)]
    if meter.aggregation.type == "count":
        return Decimal(len(counted))
    values = [number for one in counted if (number := _number(one, meter.aggregation.key or "")) is not None]
    if not values:
        return Decimal(0)
    match meter.aggregation.type:
        case "max":
            return max(values)
        case "last":
            return values[-1]
        case _:
            return sum(values, Decimal(0))


def _number(metadata: Metadata, key: str) -> Decimal | None:
    value = metadata.get(key)
    return None if value is None or isinstance(value, str | bool) else Decimal(str(value))


def meter_of(sandbox: Sandbox, meter_id: str) -> MeterRecord:
    """Raises ApiError 404 for an unknown id."""
    meter = sandbox.store.get(MeterRecord, meter_id)
    if meter is None:
        raise not_found("meter", meter_id)
    return meter


@router.post("/meters", status_code=201)
async def create_meter(request: CreateMeter, sandbox: SandboxDep) -> Meter:
    if request.filter is not None and request.filter.depth() > FILTER_DEPTH_MAX:
        raise bad_request(f"A meter's filter has at most {FILTER_DEPTH_MAX} levels")
    if len([meter for meter in sandbox.store.find(MeterRecord) if meter.archived_at is None]) >= METERS_MAX:
        raise bad_request(f"At most {METERS_MAX} meters are allowed", "METER_LIMIT_REACHED")
    now = sandbox.clock.now()
    meter = MeterRecord(id=new_id("mtr"), created_at=now, updated_at=now, **dict(request))
    sandbox.store.put(meter)
    return meter


@router.get("/meters")
async def list_meters(filters: Annotated[MeterFilter, Query()], sandbox: SandboxDep) -> Page[Meter]:
    return filters.of([m for m in sandbox.store.find(MeterRecord) if (m.archived_at is not None) == filters.archived])


@router.get("/meters/{meter_id}")
async def retrieve_meter(meter_id: str, sandbox: SandboxDep) -> Meter:
    return meter_of(sandbox, meter_id)


@router.patch("/meters/{meter_id}")
async def update_meter(meter_id: str, request: UpdateMeter, sandbox: SandboxDep) -> Meter:
    change = request.model_dump(exclude_none=True) | {"updated_at": sandbox.clock.now()}
    meter = meter_of(sandbox, meter_id).model_copy(update=change)
    sandbox.store.put(meter)
    return meter


@router.delete("/meters/{meter_id}")
async def archive_meter(meter_id: str, sandbox: SandboxDep) -> Response:
    """An archived meter counts no further events (usage-based billing guidance)."""
    sandbox.store.put(meter_of(sandbox, meter_id).model_copy(update={"archived_at": sandbox.clock.now()}))
    return Response(status_code=204)


@router.post("/meters/{meter_id}/unarchive")
async def unarchive_meter(meter_id: str, sandbox: SandboxDep) -> Response:
    sandbox.store.put(meter_of(sandbox, meter_id).model_copy(update={"archived_at": None}))
    return Response(status_code=200)
