"""Changes that a merchant makes to a subscription: its metadata, cancellation, pause and plan.

A pause is in force at once and lasts until the subscription is resumed. Then the billing date and the expiry move by
its length. Usage up to the pause is invoiced at once (``Bill Usage at Pause``).

A plan change is in force now or at the next billing date. A change now also bills the usage since the last billing
date. ``full_immediately``, ``difference_immediately`` and ``prorated_immediately`` start a new period now;
``do_not_bill`` and ``prorated_immediately_keep_cycle`` keep the billing date. Proration is by the time that is left,
rounded half up to the cent. If a downgrade leaves more than the new plan costs, the customer's balance gets the rest.
"""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Response
from pydantic import Field

from cluster.dodo_sandbox.customers import add_to_balance
from cluster.dodo_sandbox.cycle import bill_pause, close_usage, usage, usage_lines
from cluster.dodo_sandbox.errors import ApiError, bad_request, unprocessable
from cluster.dodo_sandbox.payments import Charge, ServicePeriod, charge, line
from cluster.dodo_sandbox.products import UsageBasedPrice, product_of
from cluster.dodo_sandbox.state import Sandbox, SandboxDep
from cluster.dodo_sandbox.subscriptions import (
    CancelledBy,
    ScheduledChange,
    Subscription,
    SubscriptionRecord,
    change,
    next_billing,
    running,
    terms,
)
from cluster.dodo_sandbox.wire import LimitedMetadata, UtcTime, Wire, new_id, to_ms

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
async def update_subscription(subscription_id: str, request: UpdateSubscription, sandbox: SandboxDep) -> Subscription:
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
    """Change fields or cancel. An immediate cancellation bills nothing more, one at the billing date bills usage."""
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
    paused = change(sandbox, one, "subscription.paused", now, status="paused", paused_at=now)
    return bill_pause(sandbox, paused, now) if sandbox.settings.bill_usage_at_pause else paused


def resume(sandbox: Sandbox, one: SubscriptionRecord, now: datetime) -> SubscriptionRecord:
    """End a pause. An invoice of the pause that is still unpaid becomes void, and its usage is written off."""
    if one.paused_at is None:
        raise bad_request(f"Subscription {one.subscription_id} is not paused")
    length, is_unpaid = now - one.paused_at, one.failed_at is not None
    return change(
        sandbox, one, "subscription.unpaused", now, status="active", paused_at=None,
        next_billing_date=one.next_billing_date + length, expires_at=one.expires_at and one.expires_at + length,
        usage_billed_at=one.paused_at if is_unpaid else one.usage_billed_at,
        past_due_ends_at=None, failed_at=None, retries=0,
    )  # fmt: skip


Mode = Literal[
    "prorated_immediately", "full_immediately", "difference_immediately", "do_not_bill",
    "prorated_immediately_keep_cycle",
]  # fmt: skip
_KEEPS_CYCLE: frozenset[Mode] = frozenset({"do_not_bill", "prorated_immediately_keep_cycle"})


class ChangePlan(Wire):
    product_id: str
    quantity: int
    proration_billing_mode: Mode
    effective_at: Literal["immediately", "next_billing_date"] = "immediately"
    metadata: LimitedMetadata | None = None
    on_payment_failure: Literal["prevent_change", "apply_change"] | None = None


class PlanChanged(Wire):
    payment_id: str | None = None


def price_of_change(one: SubscriptionRecord, new_amount: int, mode: Mode, now: datetime) -> int:
    """Cents due now for the new plan's fixed price; below 0 they are credited to the customer."""
    length = to_ms(one.next_billing_date) - to_ms(one.previous_billing_date)
    left = max(0, to_ms(one.next_billing_date) - to_ms(now))
    unused = (2 * one.recurring_pre_tax_amount * left + length) // (2 * length) if length else 0
    match mode:
        case "do_not_bill":
            return 0
        case "full_immediately":
            return new_amount
        case "difference_immediately":
            return new_amount - one.recurring_pre_tax_amount
        case "prorated_immediately":
            return new_amount - unused
        case "prorated_immediately_keep_cycle":
            return ((2 * new_amount * left + length) // (2 * length) if length else 0) - unused


def change_now(sandbox: Sandbox, one: SubscriptionRecord, request: ChangePlan) -> str | None:
    """Bill the change, make it, and return the payment's id. A failed payment leaves the plan unchanged."""
    now, fields = sandbox.clock.now(), terms(product_of(sandbox, request.product_id), request.quantity)
    changed = one.model_copy(update=fields)
    end = one.next_billing_date
    if request.proration_billing_mode not in _KEEPS_CYCLE:
        end = next_billing(changed, now)
    metered = usage(sandbox, one, one.unbilled_from, now)
    due = price_of_change(one, changed.recurring_pre_tax_amount, request.proration_billing_mode, now)
    billed = usage_lines(metered)
    payment = charge(
        sandbox,
        Charge(
            customer_id=one.customer.customer_id,
            currency=one.currency,
            metadata=request.metadata or one.metadata,
            lines=[line(f"Change to {changed.product_name}", max(0, due)), *billed],
            charge_type="plan_change",
            includes_usage=bool(billed),
            subscription_ids=[one.subscription_id],
            payment_method_id=one.payment_method_id,
            service_periods=[ServicePeriod(subscription_id=one.subscription_id, starts_at=now, ends_at=end)],
        ),
        now,
    )
    if payment.status != "succeeded" and request.on_payment_failure != "apply_change":
        return payment.payment_id
    if due < 0:
        add_to_balance(sandbox, one.customer.customer_id, -due)
    close_usage(sandbox, one, now, metered)
    fields |= {"previous_billing_date": now, "next_billing_date": end, "scheduled_change": None}
    fields |= {"usage_billed_at": None}
    change(sandbox, one, "subscription.plan_changed", now, **fields, payment_id=payment.payment_id)
    return payment.payment_id


@router.post("/subscriptions/{subscription_id}/change-plan")
async def change_plan(subscription_id: str, request: ChangePlan, sandbox: SandboxDep) -> PlanChanged:
    one, product = running(sandbox, subscription_id), product_of(sandbox, request.product_id)
    if one.status != "active":
        code = "INACTIVE_SUBSCRIPTION_PLAN_CHANGE_NOT_SUPPORTED"
        raise bad_request(f"Subscription {subscription_id} is {one.status}", code)
    if not product.is_recurring:
        raise bad_request("A subscription changes to a recurring product only")
    if isinstance(product.price, UsageBasedPrice) and request.quantity != 1:
        raise bad_request("Quantity must be 1 for usage based products", "INVALID_QUANTITY")
    if product.product_id == one.product_id and request.quantity == one.quantity:
        raise bad_request("The subscription has this plan already")
    if request.effective_at == "immediately":
        with sandbox.store.transaction():
            return PlanChanged(payment_id=change_now(sandbox, one, request))
    if one.scheduled_change is not None:
        raise ApiError(409, "PLAN_CHANGE_SCHEDULED", "A plan change is scheduled already")
    now = sandbox.clock.now()
    scheduled = ScheduledChange(
        id=new_id("spc"), created_at=now, effective_at=one.next_billing_date, product_id=product.product_id,
        quantity=request.quantity, product_name=product.name,
    )  # fmt: skip
    change(sandbox, one, "subscription.updated", now, scheduled_change=scheduled)
    return PlanChanged()


@router.delete("/subscriptions/{subscription_id}/change-plan/scheduled")
async def cancel_change_plan(subscription_id: str, sandbox: SandboxDep) -> Response:
    one = running(sandbox, subscription_id)
    change(sandbox, one, "subscription.updated", sandbox.clock.now(), scheduled_change=None)
    return Response(status_code=200)
