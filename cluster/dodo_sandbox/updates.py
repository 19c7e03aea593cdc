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

from cluster.dodo_sandbox.customers import add_to_balance, customer_of
from cluster.dodo_sandbox.cycle import MeterUsage, bill_pause, close_usage, usage, usage_lines
from cluster.dodo_sandbox.errors import ApiError, bad_request, unprocessable
from cluster.dodo_sandbox.payments import Charge, ServicePeriod, charge, line, quote, taxed
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
from cluster.dodo_sandbox.wire import Cents, LimitedMetadata, UtcTime, Wire, new_id, to_ms

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


def edit(
    sandbox: Sandbox,
    one: SubscriptionRecord,
    request: UpdateSubscription,
    now: datetime,
    by: Literal["customer", "api_key"] = "api_key",
) -> SubscriptionRecord:
    """Change fields or cancel. An immediate cancellation bills nothing more, one at the billing date bills usage."""
    if request.next_billing_date is not None and request.next_billing_date <= now:
        raise bad_request("next_billing_date must be in the future")
    kept = {"metadata", "next_billing_date", "cancellation_comment", "cancellation_feedback"}
    fields = {name: value for name, value in request if name in kept and value is not None}
    type_ = "subscription.updated"
    if request.cancel_at_next_billing_date is not None:
        fields["cancel_at_next_billing_date"] = request.cancel_at_next_billing_date
        fields["cancelled_by"] = CancelledBy(actor_type=by) if request.cancel_at_next_billing_date else None
    if request.status == "cancelled":
        type_, fields["cancelled_by"] = "subscription.cancelled", CancelledBy(actor_type=by)
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

    cancel_scheduled_change_plan: bool = False
    collect_via_payment_link: bool = False
    return_url: str | None = None


class PlanChanged(Wire):
    payment_id: str | None = None


class LineItem(Wire):
    """What a line of a preview has of each kind; ``plan_line`` and ``meter_line`` make the two that occur."""

    id: str
    type: Literal["subscription", "meter"]
    currency: str
    name: str
    tax_inclusive: bool = False
    tax: int
    tax_rate: float


class PlanLine(LineItem):
    product_id: str
    proration_factor: float
    quantity: int
    unit_price: int


class MeterLine(LineItem):
    chargeable_units: str
    free_threshold: int
    price_per_unit: str
    subtotal: int
    units_consumed: str


class ChargeSummary(Wire):
    currency: str
    customer_credits: int
    """Cents that move into the customer's balance; below 0 they pay a part of the charge."""
    customer_credits_currency: str
    settlement_amount: Cents
    settlement_currency: str
    settlement_tax: Cents | None
    tax: Cents | None
    total_amount: Cents


class ImmediateCharge(Wire):
    effective_at: datetime
    line_items: list[PlanLine | MeterLine]
    summary: ChargeSummary


class PlanPreview(Wire):
    immediate_charge: ImmediateCharge
    new_plan: Subscription


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


class Change(Wire):
    """A plan change of now, worked out but not made."""

    changed: SubscriptionRecord
    due: int
    """Cents for the plan, without usage and tax; below 0 they are credited to the customer."""
    metered: list[MeterUsage]
    charge: Charge


def worked_out(sandbox: Sandbox, one: SubscriptionRecord, request: ChangePlan, now: datetime) -> Change:
    fields = terms(product_of(sandbox, request.product_id), request.quantity)
    changed = one.model_copy(update=fields)
    end = one.next_billing_date
    if request.proration_billing_mode not in _KEEPS_CYCLE:
        end = next_billing(changed, now)
    metered = usage(sandbox, one, one.unbilled_from, now)
    due = price_of_change(one, changed.recurring_pre_tax_amount, request.proration_billing_mode, now)
    billed = usage_lines(metered)
    asked = Charge(
        customer_id=one.customer.customer_id,
        currency=one.currency,
        metadata=request.metadata or one.metadata,
        lines=[line(f"Change to {changed.product_name}", max(0, due)), *billed],
        charge_type="plan_change",
        includes_usage=bool(billed),
        subscription_ids=[one.subscription_id],
        payment_method_id=one.payment_method_id,
        service_periods=[ServicePeriod(subscription_id=one.subscription_id, starts_at=now, ends_at=end)],
    )
    moved = {"previous_billing_date": now, "next_billing_date": end, "scheduled_change": None, "usage_billed_at": None}
    return Change(changed=changed.model_copy(update=moved), due=due, metered=metered, charge=asked)


def preview(sandbox: Sandbox, one: SubscriptionRecord, request: ChangePlan) -> PlanPreview:
    """What the change would charge now, and the subscription after it. Nothing is stored."""
    now = sandbox.clock.now()
    if request.effective_at == "next_billing_date":
        fields = terms(product_of(sandbox, request.product_id), request.quantity)
        nothing = _summary(one.currency, 0, 0, 0)
        later = ImmediateCharge(effective_at=one.next_billing_date, line_items=[], summary=nothing)
        return PlanPreview(immediate_charge=later, new_plan=one.model_copy(update=fields))
    change_ = worked_out(sandbox, one, request, now)
    quoted = quote(sandbox, customer_of(sandbox, one.customer.customer_id), change_.charge)
    new, bps = change_.changed, sandbox.settings.tax_bps
    plan = PlanLine(
        id=one.subscription_id, type="subscription", currency=one.currency, name=new.product_name or new.product_id,
        product_id=new.product_id, quantity=new.quantity, unit_price=new.recurring_pre_tax_amount // new.quantity,
        proration_factor=change_.due / new.recurring_pre_tax_amount if new.recurring_pre_tax_amount else 0.0,
        tax=taxed(change_.charge.lines[0], bps, refundable=False).tax, tax_rate=bps / 10_000,
    )  # fmt: skip
    meters = [
        MeterLine(
            id=meter.id, type="meter", currency=meter.currency, name=meter.name, subtotal=meter.total_price,
            chargeable_units=meter.chargeable_units, units_consumed=meter.consumed_units,
            free_threshold=meter.free_threshold, price_per_unit=meter.price_per_unit,
            tax=taxed(line(meter.name, meter.total_price), bps, refundable=False).tax, tax_rate=bps / 10_000,
        )
        for meter in change_.metered
    ]  # fmt: skip
    summary = _summary(one.currency, quoted.total, quoted.tax, max(0, -change_.due) - quoted.from_balance)
    return PlanPreview(
        immediate_charge=ImmediateCharge(effective_at=now, line_items=[plan, *meters], summary=summary),
        new_plan=new,
    )


def _summary(currency: str, total: int, tax: int, credits_: int) -> ChargeSummary:
    return ChargeSummary(
        currency=currency, customer_credits=credits_, customer_credits_currency=currency, total_amount=total, tax=tax,
        settlement_amount=total, settlement_currency=currency, settlement_tax=tax,
    )  # fmt: skip


def change_now(sandbox: Sandbox, one: SubscriptionRecord, request: ChangePlan) -> str | None:
    """Bill the change, make it, and return the payment's id. A failed payment leaves the plan unchanged."""
    now = sandbox.clock.now()
    change_ = worked_out(sandbox, one, request, now)
    payment = charge(sandbox, change_.charge, now)
    if payment.status != "succeeded" and request.on_payment_failure != "apply_change":
        return payment.payment_id
    if change_.due < 0:
        add_to_balance(sandbox, one.customer.customer_id, -change_.due)
    close_usage(sandbox, one, now, change_.metered)
    change(sandbox, change_.changed, "subscription.plan_changed", now, payment_id=payment.payment_id)
    return payment.payment_id


def changeable(sandbox: Sandbox, subscription_id: str, request: ChangePlan) -> SubscriptionRecord:
    """The subscription. Raises ApiError for a change that Dodo refuses."""
    one, product = running(sandbox, subscription_id), product_of(sandbox, request.product_id)
    if request.collect_via_payment_link:
        raise unprocessable("The sandbox does not model plan changes that are paid by a link")
    if request.return_url is not None:
        raise unprocessable("return_url needs collect_via_payment_link")
    if one.status != "active":
        code = "INACTIVE_SUBSCRIPTION_PLAN_CHANGE_NOT_SUPPORTED"
        raise bad_request(f"Subscription {subscription_id} is {one.status}", code)
    if not product.is_recurring:
        raise bad_request("A subscription changes to a recurring product only")
    if isinstance(product.price, UsageBasedPrice) and request.quantity != 1:
        raise bad_request("Quantity must be 1 for usage based products", "INVALID_QUANTITY")
    if product.product_id == one.product_id and request.quantity == one.quantity:
        raise bad_request("The subscription has this plan already")
    if one.scheduled_change is not None and not request.cancel_scheduled_change_plan:
        raise ApiError(409, "PLAN_CHANGE_SCHEDULED", "A plan change is scheduled already")
    return one


@router.post("/subscriptions/{subscription_id}/change-plan")
async def change_plan(subscription_id: str, request: ChangePlan, sandbox: SandboxDep) -> PlanChanged:
    one = changeable(sandbox, subscription_id, request)
    with sandbox.store.transaction():
        return PlanChanged(payment_id=make_change(sandbox, one, request))


@router.post("/subscriptions/{subscription_id}/change-plan/preview")
async def preview_change_plan(subscription_id: str, request: ChangePlan, sandbox: SandboxDep) -> PlanPreview:
    return preview(sandbox, changeable(sandbox, subscription_id, request), request)


def make_change(sandbox: Sandbox, one: SubscriptionRecord, request: ChangePlan) -> str | None:
    """Change the plan now or schedule it; the id of the payment, if there is one."""
    if request.effective_at == "immediately":
        return change_now(sandbox, one, request)
    now, product = sandbox.clock.now(), product_of(sandbox, request.product_id)
    scheduled = ScheduledChange(
        id=new_id("spc"), created_at=now, effective_at=one.next_billing_date, product_id=product.product_id,
        quantity=request.quantity, product_name=product.name,
    )  # fmt: skip
    change(sandbox, one, "subscription.updated", now, scheduled_change=scheduled)
    return None


@router.delete("/subscriptions/{subscription_id}/change-plan/scheduled")
async def cancel_change_plan(subscription_id: str, sandbox: SandboxDep) -> Response:
    withdraw_change(sandbox, running(sandbox, subscription_id))
    return Response(status_code=200)


def withdraw_change(sandbox: Sandbox, one: SubscriptionRecord) -> None:
    """Drop a scheduled plan change."""
    change(sandbox, one, "subscription.updated", sandbox.clock.now(), scheduled_change=None)
