"""What a tenant may see of its own money: account, usage and records."""

from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse

from billing.clock import now_ms
from billing.ledger.account import Bucket
from billing.ledger.admission import funding_for, plan_of
from billing.money import format_usd
from billing.reports import history
from billing.tenants.tenant import Tenant
from billing.usage import Draw, Unit, UsageRecord
from deployments.gateway.api.bodies import AccountBody, RecordPage, UsageBody
from deployments.gateway.api.document import refusals
from deployments.gateway.api.errors import BadRequest
from deployments.gateway.services import Caller, Parts, Services

DEFAULT_DAYS = 30
MAX_DAYS = 366
YEARS = range(2000, 2101)
MAX_RECORDS = 1_000

router = APIRouter(responses=refusals(401, 403, 503))
Json = dict[str, object]


@router.get("/v1/account", response_model=AccountBody)
async def account(parts: Parts, caller: Caller) -> JSONResponse:
    why = caller.key.throttled
    throttle = None if why is None else why.model_dump(mode="json")
    return JSONResponse(await account_json(parts, caller.tenant) | {"throttled": throttle, "quarantine": throttle})


async def account_json(parts: Services, tenant: Tenant) -> Json:
    """The account as its owner reads it, and as a hold would find it now."""
    plan = plan_of(tenant, parts.gateway.catalog_holder.current)
    funding = funding_for(tenant, plan, now_ms())
    account = await parts.ledger.account(tenant.id, funding)
    return {
        "object": "account",
        "tenant": tenant.id,
        "plan": tenant.plan,
        "plan_kind": plan.kind.value,
        "suspended": tenant.suspended,
        "balance_usd": format_usd(account.balance_nanos),
        "held_usd": format_usd(account.held_nanos),
        "held_requests": account.held_requests,
        "overage_usd": format_usd(account.overage_nanos),
        "overage_cap_usd": format_usd(funding.credit_limit),
        "allowance": None if account.allowance is None else _bucket_json(account.allowance),
        "packs": [_bucket_json(bucket) for bucket in account.buckets if not bucket.is_allowance],
        "open_holds": account.open_holds,
        "limits": plan.limits.model_dump(mode="json"),
        "subscription": None if tenant.subscription is None else tenant.subscription.model_dump(mode="json"),
    }


def _bucket_json(bucket: Bucket) -> Json:
    amounts: Json = {"remaining": bucket.remaining, "granted": bucket.granted}
    if bucket.unit is Unit.NANOS:
        amounts = {"remaining_usd": format_usd(bucket.remaining), "granted_usd": format_usd(bucket.granted)}
    return {
        "id": bucket.id,
        "unit": "requests" if bucket.unit is Unit.REQUESTS else "usd",
        **amounts,
        "expires_at_ms": bucket.expires_at_ms,
        "adapters": list(bucket.adapters),
    }


@router.get("/v1/usage", response_model=UsageBody, responses=refusals(400))
async def usage(
    parts: Parts,
    caller: Caller,
    start: date | None = None,
    end: date | None = None,
    group_by: Literal["model", "day"] = "model",
) -> JSONResponse:
    """Totals over days in UTC, ``end`` included; the last thirty days by default."""
    first, last = _span(start, end or datetime.now(UTC).date())
    totals = await history.totals(
        parts.redis, caller.tenant.id, _midnight(first), _midnight(last + timedelta(days=1)), group_by
    )
    return JSONResponse(
        {
            "object": "usage",
            "start": first.isoformat(),
            "end": last.isoformat(),
            "group_by": group_by,
            "data": [_total_json(total, group_by) for total in totals],
        }
    )


def _span(start: date | None, last: date) -> tuple[date, date]:
    """Raises BadRequest where the days are not in order, too many, or of no year in which anything is sold."""
    for name, day in (("start", start), ("end", last)):
        if day is not None and day.year not in YEARS:
            raise BadRequest(f"{name} must lie in the years {YEARS[0]} to {YEARS[-1]}", name)
    first = start or last - timedelta(days=DEFAULT_DAYS)
    if first > last:
        raise BadRequest("start must not be after end", "start")
    if (last - first).days >= MAX_DAYS:
        raise BadRequest(f"start and end may span at most {MAX_DAYS} days", "start")
    return first, last


def _midnight(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * 1000


def _total_json(total: history.Total, group_by: str) -> Json:
    return {
        group_by: total.group,
        "records": total.records,
        "requests": total.requests,
        "prompt_tokens": total.prompt_tokens,
        "cached_tokens": total.cached_tokens,
        "completion_tokens": total.completion_tokens,
        "compute_ms": total.compute_ms,
        "list_usd": format_usd(total.list_nanos),
        "charged_usd": format_usd(total.charged_nanos),
        "overage_usd": format_usd(total.overage_nanos),
    }


@router.get("/v1/usage/records", response_model=RecordPage, responses=refusals(400))
async def usage_records(
    parts: Parts, caller: Caller, cursor: str = "", limit: Annotated[int, Query(ge=1, le=MAX_RECORDS)] = 100
) -> JSONResponse:
    """The tenant's records, newest first; ``next_cursor`` is null at the end."""
    try:
        page = await history.records(parts.redis, caller.tenant.id, cursor, limit)
    except ValueError as error:
        raise BadRequest(str(error), "cursor") from error
    return JSONResponse(
        {
            "object": "list",
            "data": [record_json(record) for record in page.records],
            "next_cursor": page.next_cursor or None,
        }
    )


def record_json(record: UsageRecord) -> Json:
    return {
        "record_id": record.record_id,
        "request_id": record.request_id,
        "seq": record.seq,
        "key_id": record.key_id,
        "adapter": record.adapter,
        "plan": record.plan,
        "price_version": record.price_version,
        "modifiers": [asdict(modifier) for modifier in record.modifiers],
        "status": record.status.value,
        "occurred_at_ms": record.occurred_at_ms,
        "usage": asdict(record.usage),
        "list_usd": format_usd(record.list_nanos),
        "charged_usd": format_usd(record.charged_nanos),
        "overage_usd": format_usd(record.overage_nanos),
        "balance_usd": format_usd(record.balance_nanos),
        "draws": [draw_json(draw) for draw in record.draws],
    }


def draw_json(draw: Draw) -> Json:
    amount = format_usd(draw.amount) if draw.unit is Unit.NANOS else draw.amount
    return {"bucket": draw.bucket, "unit": "usd" if draw.unit is Unit.NANOS else "requests", "amount": amount}
