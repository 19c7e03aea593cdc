"""Changing a subscription by PATCH: its metadata and billing date, cancelling, pausing and going on.

A pause takes effect at once and has no end of its own. The clock stands still meanwhile: the billing date and the
expiry move by its length when it ends. Usage until then is invoiced at the pause (``Bill Usage at Pause``).
"""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import Field

from cluster.dodo_sandbox.cycle import settle
from cluster.dodo_sandbox.errors import bad_request, unprocessable
from cluster.dodo_sandbox.state import Here, Sandbox
from cluster.dodo_sandbox.subscriptions import CancelledBy, Subscription, SubscriptionRecord, change, running
from cluster.dodo_sandbox.wire import LimitedMetadata, UtcTime, Wire

router = APIRouter()


class UpdateSubscription(Wire):
    cancel_at_next_billing_date: bool | None = None
    cancellation_comment: Annotated[str, Field(max_length=3000)] | None = None
    cancellation_feedback: str | None = None
    metadata: LimitedMetadata | None = None
    next_billing_date: UtcTime | None = None
    pause: bool | None = None
    status: Literal["active", "cancelled", "paused"] | None = None


@router.patch("/subscriptions/{subscription_id}")
async def update_subscription(subscription_id: str, request: UpdateSubscription, sandbox: Here) -> Subscription:
    if request.pause is not None:
        raise unprocessable("pause was removed: send status paused or active")
    one, now = running(sandbox, subscription_id), sandbox.clock.now()
    if request.status not in ("paused", "active"):
        return edit(sandbox, one, request, now)
    if request.model_fields_set != {"status"}:
        raise unprocessable(f"status {request.status} is sent alone")
    with sandbox.store.transaction():
        return pause(sandbox, one, now) if request.status == "paused" else resume(sandbox, one, now)


def edit(sandbox: Sandbox, one: SubscriptionRecord, request: UpdateSubscription, now: datetime) -> SubscriptionRecord:
    """A cancellation at once bills nothing more; one at the next billing date bills the last usage."""
    if request.next_billing_date is not None and request.next_billing_date <= now:
        raise bad_request("next_billing_date must be in the future")
    kept = {"metadata", "next_billing_date", "cancellation_comment", "cancellation_feedback"}
    fields = {name: value for name, value in request if name in kept and value is not None}
    type_ = "subscription.updated"
    if request.cancel_at_next_billing_date is not None:
        fields["cancel_at_next_billing_date"] = request.cancel_at_next_billing_date
        fields["cancelled_by"] = CancelledBy(actor_type="api_key") if request.cancel_at_next_billing_date else None
    if request.status == "cancelled":
        type_, fields["cancelled_by"] = "subscription.cancelled", CancelledBy(actor_type="api_key")
        fields |= {"status": "cancelled", "cancelled_at": now, "cancel_at_next_billing_date": False}
    return change(sandbox, one, type_, now, **fields)


def pause(sandbox: Sandbox, one: SubscriptionRecord, now: datetime) -> SubscriptionRecord:
    if one.status != "active":
        raise bad_request(f"Subscription {one.subscription_id} is {one.status}", "SUBSCRIPTION_INACTIVE")
    rests = change(sandbox, one, "subscription.paused", now, status="paused", paused_at=now)
    return settle(sandbox, rests, now) if sandbox.settings.bill_usage_at_pause else rests


def resume(sandbox: Sandbox, one: SubscriptionRecord, now: datetime) -> SubscriptionRecord:
    """Go on where it stood; an invoice of the pause that is still unpaid is void, and its usage written off."""
    if one.paused_at is None:
        raise bad_request(f"Subscription {one.subscription_id} is not paused")
    rested, is_owed = now - one.paused_at, one.failed_at is not None
    return change(
        sandbox, one, "subscription.unpaused", now, status="active", paused_at=None,
        next_billing_date=one.next_billing_date + rested, expires_at=one.expires_at and one.expires_at + rested,
        usage_billed_at=one.paused_at if is_owed else one.usage_billed_at,
        past_due_ends_at=None, failed_at=None, retries=0,
    )  # fmt: skip
