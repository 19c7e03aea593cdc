"""What a tenant may see of its own money: account, usage and records."""

from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Query

from billing.clock import now_ms
from billing.commerce.products import Products
from billing.ledger.admission import funding_for, plan_of
from billing.reports import history
from billing.tenants.tenant import Tenant
from deployments.gateway.api.bodies import AccountBody, OwnAccountBody, RecordBody, RecordPage, UsageBody, UsageTotal
from deployments.gateway.api.dependencies import Caller, GatewayDep
from deployments.gateway.api.document import refusals
from deployments.gateway.errors import BadRequest
from deployments.gateway.gateway import Gateway

DEFAULT_DAYS = 30
MAX_DAYS = 366
YEARS = range(2000, 2101)
MAX_RECORDS = 1_000

router = APIRouter(responses=refusals(401, 403, 503))
Account = TypeVar("Account", bound=AccountBody)


@router.get("/v1/account")
async def account(gateway: GatewayDep, caller: Caller) -> OwnAccountBody:
    throttled = caller.key.throttled
    return await read_account(gateway, caller.tenant, OwnAccountBody, throttled=throttled, quarantine=throttled)


async def read_account(gateway: Gateway, tenant: Tenant, body: type[Account], **more: Any) -> Account:
    """A tenant's account as a response of the given model."""
    plan = plan_of(tenant, gateway.parts.catalog_holder.current)
    funding = funding_for(tenant, plan, now_ms())
    held = await gateway.parts.ledger.account(tenant.id, funding)
    scheduled = tenant.subscription.scheduled_product_id if tenant.subscription is not None else ""
    terms = await Products(gateway.parts.redis).terms(scheduled) if scheduled else None
    scheduled_plan = terms.plain_name if terms is not None else scheduled or None
    return body.of(tenant, plan, funding, held, scheduled_plan, **more)


@router.get("/v1/usage", responses=refusals(400), response_model_exclude_unset=True)
async def usage(
    gateway: GatewayDep,
    caller: Caller,
    start: date | None = None,
    end: date | None = None,
    group_by: Literal["model", "day"] = "model",
) -> UsageBody:
    """Totals over days in UTC, ``end`` included; the last thirty days by default."""
    first, last = _period(start, end or datetime.now(UTC).date())
    end_ms = _midnight_ms(last + timedelta(days=1))
    totals = await history.totals(gateway.parts.redis, caller.tenant.id, _midnight_ms(first), end_ms, group_by)
    return UsageBody(
        object="usage",
        start=first.isoformat(),
        end=last.isoformat(),
        group_by=group_by,
        data=[UsageTotal.of(total, group_by) for total in totals],
    )


def _period(start: date | None, last: date) -> tuple[date, date]:
    """The first and last day. Raises BadRequest where they are out of order, too many, or not in YEARS."""
    for name, day in (("start", start), ("end", last)):
        if day is not None and day.year not in YEARS:
            raise BadRequest(f"{name} must lie in the years {YEARS[0]} to {YEARS[-1]}", name)
    first = start or last - timedelta(days=DEFAULT_DAYS)
    if first > last:
        raise BadRequest("start must not be after end", "start")
    if (last - first).days >= MAX_DAYS:
        raise BadRequest(f"start and end may span at most {MAX_DAYS} days", "start")
    return first, last


def _midnight_ms(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * 1000


@router.get("/v1/usage/records", responses=refusals(400))
async def usage_records(
    gateway: GatewayDep, caller: Caller, cursor: str = "", limit: Annotated[int, Query(ge=1, le=MAX_RECORDS)] = 100
) -> RecordPage:
    """The tenant's records, newest first; ``next_cursor`` is null at the end."""
    try:
        page = await history.records(gateway.parts.redis, caller.tenant.id, cursor, limit)
    except ValueError as error:
        raise BadRequest(str(error), "cursor") from error
    return RecordPage(data=[RecordBody.of(record) for record in page.records], next_cursor=page.next_cursor or None)
