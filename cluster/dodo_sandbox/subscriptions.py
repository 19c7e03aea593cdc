"""Subscriptions: their start, their fields, and the webhooks of their changes.

``cycle`` has billing and renewals, ``updates`` cancellation, pause and plan change, ``recovery`` failed renewals.
"""

from datetime import datetime, timedelta
from typing import Annotated, ClassVar, Literal

from fastapi import APIRouter, Query
from pydantic import Field

from cluster.dodo_sandbox import entitlements
from cluster.dodo_sandbox.customers import CustomerLimitedDetails, customer_of, limited
from cluster.dodo_sandbox.endpoints import announce
from cluster.dodo_sandbox.errors import bad_request, not_found
from cluster.dodo_sandbox.payments import BillingAddress
from cluster.dodo_sandbox.products import PeriodicPrice, Product, UsageBasedPrice, amount_of, product_of
from cluster.dodo_sandbox.state import Sandbox, SandboxDep
from cluster.dodo_sandbox.wire import (
    BRAND_ID,
    Cents,
    Interval,
    LimitedMetadata,
    Page,
    Paging,
    Resource,
    UtcTime,
    Wire,
    add_interval,
)

router = APIRouter()

Status = Literal["pending", "active", "on_hold", "paused", "cancelled", "failed", "expired", "past_due"]
ENDED: frozenset[Status] = frozenset({"cancelled", "failed", "expired"})


class SubscribedMeter(Wire):
    currency: str
    free_threshold: int
    measurement_unit: str
    meter_id: str
    name: str
    description: str | None = None
    price_per_unit: str


class ScheduledChange(Wire):
    id: str
    addons: list[str] = Field(default_factory=list)
    created_at: datetime
    effective_at: datetime
    product_id: str
    quantity: int
    product_name: str | None = None


class CancelledBy(Wire):
    actor_type: Literal["customer", "api_key"]


class Subscription(Wire):
    addons: list[str] = Field(default_factory=list)
    billing: BillingAddress = BillingAddress()
    brand_id: str = BRAND_ID
    cancel_at_next_billing_date: bool = False
    created_at: datetime
    credit_entitlement_cart: list[str] = Field(default_factory=list)
    currency: str
    customer: CustomerLimitedDetails
    discounts: list[str] = Field(default_factory=list)
    has_payment_method: bool = True
    metadata: LimitedMetadata = Field(default_factory=dict)
    meter_credit_entitlement_cart: list[str] = Field(default_factory=list)
    meters: list[SubscribedMeter] = Field(default_factory=list)
    next_billing_date: datetime
    on_demand: bool = False
    payment_frequency_count: int
    payment_frequency_interval: Interval
    previous_billing_date: datetime
    product_id: str
    product_name: str | None = None
    quantity: int
    recurring_pre_tax_amount: Cents
    status: Status
    subscription_id: str
    subscription_period_count: int
    subscription_period_interval: Interval
    tax_inclusive: bool = False
    trial_period_days: int = 0
    cancelled_at: datetime | None = None
    cancelled_by: CancelledBy | None = None
    cancellation_comment: str | None = None
    cancellation_feedback: str | None = None
    expires_at: datetime | None = None
    paused_at: datetime | None = None
    payment_method_id: str | None = None
    scheduled_change: ScheduledChange | None = None


class SubscriptionRecord(Subscription, Resource):
    kind: ClassVar[str] = "subscription"
    past_due_ends_at: datetime | None = None
    """Only webhooks have it."""
    failed_at: datetime | None = None
    """When the charge of the renewal that is still unpaid first failed."""
    retries: int = 0
    """How many retries were made."""
    usage_billed_at: datetime | None = None
    """Up to when a pause has billed the usage of this period."""

    @property
    def key(self) -> str:
        return self.subscription_id

    @property
    def owner(self) -> str:
        return self.customer.customer_id

    @property
    def unbilled_from(self) -> datetime:
        return self.usage_billed_at or self.previous_billing_date


class Start(Wire):
    """What a checkout starts."""

    subscription_id: str
    customer_id: str
    product_id: str
    quantity: int
    metadata: LimitedMetadata = Field(default_factory=dict)
    trial_period_days: int = 0
    payment_method_id: str | None = None


class SubscriptionFilter(Paging):
    created_at_gte: UtcTime | None = None
    created_at_lte: UtcTime | None = None
    customer_id: str | None = None
    product_id: str | None = None
    status: Status | None = None
    cancel_at_next_billing_date: bool | None = None

    def admits(self, one: Subscription) -> bool:
        return (
            (self.created_at_gte is None or one.created_at >= self.created_at_gte)
            and (self.created_at_lte is None or one.created_at <= self.created_at_lte)
            and self.product_id in (None, one.product_id)
            and self.status in (None, one.status)
            and self.cancel_at_next_billing_date in (None, one.cancel_at_next_billing_date)
        )


def terms(product: Product, quantity: int) -> dict[str, object]:
    """The fields of a subscription that come from its product, as the product is now."""
    price = product.price
    assert isinstance(price, PeriodicPrice)
    priced = (price.meters or []) if isinstance(price, UsageBasedPrice) else []
    return {
        "product_id": product.product_id,
        "product_name": product.name,
        "quantity": quantity,
        "currency": price.currency,
        "recurring_pre_tax_amount": amount_of(price) * quantity,
        "payment_frequency_count": price.payment_frequency_count,
        "payment_frequency_interval": price.payment_frequency_interval,
        "subscription_period_count": price.subscription_period_count,
        "subscription_period_interval": price.subscription_period_interval,
        "meters": [
            SubscribedMeter(
                currency=price.currency, free_threshold=meter.free_threshold or 0, meter_id=meter.meter_id,
                measurement_unit=meter.measurement_unit or "", name=meter.name or "", description=meter.description,
                price_per_unit=meter.price_per_unit or "0",
            )
            for meter in priced
        ],
    }  # fmt: skip


def next_billing(terms_of: Subscription | PeriodicPrice, start: datetime) -> datetime:
    return add_interval(start, terms_of.payment_frequency_count, terms_of.payment_frequency_interval)


def new_subscription(sandbox: Sandbox, start: Start, at: datetime) -> SubscriptionRecord:
    """The subscription of a checkout that is not paid yet; it is not stored."""
    product = product_of(sandbox, start.product_id)
    price = product.price
    assert isinstance(price, PeriodicPrice)
    trial_ends = at + timedelta(days=start.trial_period_days)
    return SubscriptionRecord.model_validate(
        terms(product, start.quantity)
        | {
            "subscription_id": start.subscription_id,
            "customer": limited(customer_of(sandbox, start.customer_id)),
            "created_at": at,
            "previous_billing_date": at,
            "next_billing_date": trial_ends if start.trial_period_days else next_billing(price, at),
            "expires_at": add_interval(at, price.subscription_period_count, price.subscription_period_interval),
            "metadata": start.metadata,
            "trial_period_days": start.trial_period_days,
            "payment_method_id": start.payment_method_id,
            "status": "pending",
        }
    )


def change(sandbox: Sandbox, one: SubscriptionRecord, type_: str, at: datetime, **fields: object) -> SubscriptionRecord:
    """Store a change, and send its event and ``subscription.updated``."""
    payment_id = fields.pop("payment_id", None)
    changed = one.model_copy(update=fields)
    with sandbox.store.transaction():
        sandbox.store.put(changed)
        announce(sandbox, type_, "subscription", changed, at, payment_id if isinstance(payment_id, str) else None)
        if type_ != "subscription.updated":
            announce(sandbox, "subscription.updated", "subscription", changed, at)
        _update_licence_keys(sandbox, changed, type_, at, is_new=one.status == "pending")
    return changed


def _update_licence_keys(sandbox: Sandbox, one: SubscriptionRecord, type_: str, at: datetime, is_new: bool) -> None:
    """Issue, disable, enable or revoke the subscription's keys; a plan change replaces them."""
    if type_ in (
        *entitlements.SUSPENDING_EVENTS,
        "subscription.cancelled",
        "subscription.expired",
        "subscription.plan_changed",
    ):
        entitlements.revoke_all(sandbox, type_, at, subscription_id=one.subscription_id)
    if type_ == "subscription.unpaused" or (type_ == "subscription.active" and not is_new):
        entitlements.restore(sandbox, one.subscription_id, at)
    if type_ == "subscription.plan_changed" or (type_ == "subscription.active" and is_new):
        given = product_of(sandbox, one.product_id).entitlements
        entitlements.issue(
            sandbox, one.product_id, given, one.customer.customer_id, at, subscription_id=one.subscription_id
        )


def subscription_of(sandbox: Sandbox, subscription_id: str) -> SubscriptionRecord:
    """Raises ApiError 404 for an unknown id."""
    subscription = sandbox.store.get(SubscriptionRecord, subscription_id)
    if subscription is None:
        raise not_found("subscription", subscription_id)
    return subscription


def running(sandbox: Sandbox, subscription_id: str) -> SubscriptionRecord:
    """Raises ApiError 400 for a subscription that has ended."""
    subscription = subscription_of(sandbox, subscription_id)
    if subscription.status in ENDED:
        raise bad_request(f"Subscription {subscription_id} is {subscription.status}", "SUBSCRIPTION_INACTIVE")
    return subscription


@router.get("/subscriptions")
async def list_subscriptions(
    filters: Annotated[SubscriptionFilter, Query()], sandbox: SandboxDep
) -> Page[Subscription]:
    found = sandbox.store.find(SubscriptionRecord, filters.customer_id)
    return filters.of([one for one in found if filters.admits(one)])


@router.get("/subscriptions/{subscription_id}")
async def retrieve_subscription(subscription_id: str, sandbox: SandboxDep) -> Subscription:
    return subscription_of(sandbox, subscription_id)
