"""Changing a subscription's plan, now or at the next billing date.

Now: the usage since the last billing date is billed with the change. ``full_immediately``,
``difference_immediately`` and ``prorated_immediately`` start a new period now; ``do_not_bill`` and
``prorated_immediately_keep_cycle`` keep the billing date. Proration is by time left, rounded half up; where a
downgrade leaves more than the new plan costs, the rest is the customer's balance.
"""

from datetime import datetime
from typing import Literal

from fastapi import APIRouter, Response

from cluster.dodo_sandbox.customers import add_to_balance
from cluster.dodo_sandbox.cycle import remember, usage, usage_lines
from cluster.dodo_sandbox.errors import ApiError, bad_request
from cluster.dodo_sandbox.payments import Charge, ServicePeriod, charge, line
from cluster.dodo_sandbox.products import UsageBasedPrice, product_of
from cluster.dodo_sandbox.state import Here, Sandbox
from cluster.dodo_sandbox.subscriptions import ScheduledChange, SubscriptionRecord, change, next_billing, running, terms
from cluster.dodo_sandbox.wire import LimitedMetadata, Wire, new_id, to_ms

router = APIRouter()

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
    """Cents due now for the new plan's fixed price; below zero they are given back."""
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
    """Bill and switch; the payment's id. A failed payment leaves the plan as it was."""
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
    remember(sandbox, one, now, metered)
    fields |= {"previous_billing_date": now, "next_billing_date": end, "scheduled_change": None}
    fields |= {"usage_billed_at": None}
    change(sandbox, one, "subscription.plan_changed", now, **fields, payment_id=payment.payment_id)
    return payment.payment_id


@router.post("/subscriptions/{subscription_id}/change-plan")
async def change_plan(subscription_id: str, request: ChangePlan, sandbox: Here) -> PlanChanged:
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
async def cancel_change_plan(subscription_id: str, sandbox: Here) -> Response:
    one = running(sandbox, subscription_id)
    change(sandbox, one, "subscription.updated", sandbox.clock.now(), scheduled_change=None)
    return Response(status_code=200)
