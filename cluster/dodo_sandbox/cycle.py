"""The billing cycle: the price of a period's usage, and what happens when a period ends.

Usage costs ``(units - free_threshold) x price_per_unit`` cents per meter (usage-based-billing guide). Not documented,
and chosen here: the price of each meter is rounded half up to the cent; an event counts in the period of its timestamp,
and is never billed if it arrives after that period was billed.
"""

from collections.abc import Sequence
from datetime import datetime
from decimal import ROUND_HALF_UP, Decimal, localcontext
from typing import Annotated, ClassVar

from fastapi import APIRouter, Query
from pydantic import Field

from cluster.dodo_sandbox import recovery
from cluster.dodo_sandbox.events import counted_metadata
from cluster.dodo_sandbox.meters import meter_of, units
from cluster.dodo_sandbox.payments import Charge, Line, PaymentRecord, ServicePeriod, charge, line
from cluster.dodo_sandbox.products import product_of
from cluster.dodo_sandbox.state import Sandbox, SandboxDep, Settings
from cluster.dodo_sandbox.subscriptions import (
    SubscribedMeter,
    SubscriptionRecord,
    change,
    next_billing,
    subscription_of,
    terms,
)
from cluster.dodo_sandbox.wire import Page, Paging, Resource, UtcTime, Wire, to_ms

router = APIRouter()

_EXACT_DIGITS = 80


class MeterUsage(Wire):
    id: str
    chargeable_units: str
    consumed_units: str
    currency: str
    free_threshold: int
    name: str
    price_per_unit: str
    total_price: int


class UsagePeriod(Wire):
    start_date: datetime
    end_date: datetime
    meters: list[MeterUsage]


class UsagePeriodRecord(UsagePeriod, Resource):
    """A closed period as it was billed."""

    kind: ClassVar[str] = "usage_period"
    subscription_id: str

    @property
    def key(self) -> str:
        return f"{self.subscription_id}:{to_ms(self.start_date)}"

    @property
    def owner(self) -> str:
        return self.subscription_id


class UsageFilter(Paging):
    start_date: UtcTime | None = None
    end_date: UtcTime | None = None
    meter_id: Annotated[str, Field(min_length=1)] | None = None

    def cut(self, period: UsagePeriod) -> UsagePeriod | None:
        """The part of a period that passes the filter, or ``None``."""
        if self.start_date is not None and period.end_date <= self.start_date:
            return None
        if self.end_date is not None and period.start_date >= self.end_date:
            return None
        kept = [meter for meter in period.meters if self.meter_id in (None, meter.id)]
        return UsagePeriod(start_date=period.start_date, end_date=period.end_date, meters=kept)


def usage(sandbox: Sandbox, one: SubscriptionRecord, start: datetime, end: datetime) -> list[MeterUsage]:
    """The price of the events from ``start`` until before ``end``, for each of the subscription's meters."""
    result = []
    for priced in one.meters:
        meter = meter_of(sandbox, priced.meter_id)
        until = end if meter.archived_at is None else min(end, meter.archived_at)
        metadata = counted_metadata(sandbox, meter, one.customer.customer_id, start, until)
        with localcontext(prec=_EXACT_DIGITS):
            result.append(priced_usage(priced, units(meter, metadata)))
    return result


def priced_usage(meter: SubscribedMeter, consumed: Decimal) -> MeterUsage:
    with localcontext(prec=_EXACT_DIGITS):
        chargeable = max(consumed - meter.free_threshold, Decimal(0))
        total = (chargeable * Decimal(meter.price_per_unit)).quantize(Decimal(1), ROUND_HALF_UP)
    return MeterUsage(
        id=meter.meter_id, chargeable_units=f"{chargeable:f}", consumed_units=f"{consumed:f}", currency=meter.currency,
        free_threshold=meter.free_threshold, name=meter.name, price_per_unit=meter.price_per_unit,
        total_price=int(total),
    )  # fmt: skip


def usage_lines(meters: Sequence[MeterUsage]) -> list[Line]:
    return [
        line(meter.name, meter.total_price, f"{meter.chargeable_units} units at {meter.price_per_unit} cents")
        for meter in meters
        if meter.total_price
    ]


def run_due(sandbox: Sandbox) -> int:
    """Do everything that is due by the sandbox's clock, in order; returns the number of steps."""
    steps, settings, now = 0, sandbox.settings, sandbox.clock.now()
    for found in reversed(sandbox.store.find(SubscriptionRecord)):
        one = found
        while (due := recovery.next_step(settings, one)) is not None and due <= now:
            with sandbox.store.transaction():
                one = _step(sandbox, settings, one, due)
            steps += 1
    return steps


def _step(sandbox: Sandbox, settings: Settings, one: SubscriptionRecord, due: datetime) -> SubscriptionRecord:
    if one.status == "active":
        return renew(sandbox, one)
    if due == recovery.next_retry(settings, one):
        again = one.model_copy(update={"retries": one.retries + 1})
        return renew(sandbox, again, due) if one.paused_at is None else bill_pause(sandbox, again, due)
    return recovery.end_grace(sandbox, one, due)


def renew(sandbox: Sandbox, one: SubscriptionRecord, charged_at: datetime | None = None) -> SubscriptionRecord:
    """End the current period: bill its usage, and the price of the next period unless the subscription ends.

    ``charged_at`` is the time of the charge if it is not the end of the period, because an earlier charge failed.
    """
    ended = one.next_billing_date
    at = ended if charged_at is None else charged_at
    if one.cancel_at_next_billing_date:
        return end(sandbox, one, "cancelled")
    if one.expires_at is not None and ended >= one.expires_at:
        return end(sandbox, one, "expired")
    metered = usage(sandbox, one, one.unbilled_from, ended)
    renewed = with_scheduled_change(sandbox, one)
    following = next_billing(renewed, ended)
    payment = _renewal(
        sandbox,
        renewed,
        metered,
        ServicePeriod(subscription_id=one.subscription_id, starts_at=ended, ends_at=following),
        at,
    )
    if payment.status != "succeeded":
        return recovery.failed(sandbox, one, payment.payment_id, at)
    close_usage(sandbox, one, ended, metered)
    if renewed is not one:
        renewed = change(sandbox, renewed, "subscription.plan_changed", at)
    recovery.recovered(sandbox, one, payment.payment_id, at)
    return change(
        sandbox, renewed, f"subscription.{'renewed' if one.status == 'active' else 'active'}", at, status="active",
        previous_billing_date=ended, next_billing_date=following, payment_id=payment.payment_id,
        past_due_ends_at=None, failed_at=None, retries=0, usage_billed_at=None,
    )  # fmt: skip


def bill_pause(sandbox: Sandbox, one: SubscriptionRecord, at: datetime) -> SubscriptionRecord:
    """Bill only the usage up to a pause. The subscription stays paused, also if the invoice is paid late."""
    assert one.paused_at is not None, "the subscription is paused"
    metered = usage(sandbox, one, one.unbilled_from, one.paused_at)
    if not (lines := usage_lines(metered)):
        return one
    payment = charge(sandbox, _charge(one, lines, True).model_copy(update={"retry_attempt": one.retries}), at)
    if payment.status != "succeeded":
        return recovery.failed(sandbox, one, payment.payment_id, at)
    close_usage(sandbox, one, one.paused_at, metered)
    return change(
        sandbox, one, "subscription.updated" if one.status == "paused" else "subscription.paused", at, status="paused",
        usage_billed_at=one.paused_at, past_due_ends_at=None, failed_at=None, retries=0,
    )  # fmt: skip


def end(sandbox: Sandbox, one: SubscriptionRecord, status: str) -> SubscriptionRecord:
    """End the subscription. The last period's usage is billed by a renewal without a service period."""
    ended = one.next_billing_date
    metered = usage(sandbox, one, one.unbilled_from, ended)
    if lines := usage_lines(metered):
        charge(sandbox, _charge(one, lines, True), ended)
    close_usage(sandbox, one, ended, metered)
    fields = {"status": status} | ({"cancelled_at": ended} if status == "cancelled" else {})
    return change(sandbox, one, f"subscription.{status}", ended, **fields)


def with_scheduled_change(sandbox: Sandbox, one: SubscriptionRecord) -> SubscriptionRecord:
    if one.scheduled_change is None:
        return one
    fields = terms(product_of(sandbox, one.scheduled_change.product_id), one.scheduled_change.quantity)
    return one.model_copy(update=fields | {"scheduled_change": None})


def _renewal(
    sandbox: Sandbox, one: SubscriptionRecord, metered: Sequence[MeterUsage], period: ServicePeriod, at: datetime
) -> PaymentRecord:
    lines = usage_lines(metered)
    fixed = line(one.product_name or one.product_id, one.recurring_pre_tax_amount)
    asked = _charge(one, [fixed, *lines], bool(lines))
    return charge(sandbox, asked.model_copy(update={"service_periods": [period], "retry_attempt": one.retries}), at)


def _charge(one: SubscriptionRecord, lines: list[Line], includes_usage: bool) -> Charge:
    return Charge(
        customer_id=one.customer.customer_id,
        currency=one.currency,
        lines=lines,
        metadata=one.metadata,
        charge_type="renewal",
        includes_usage=includes_usage,
        subscription_ids=[one.subscription_id],
        payment_method_id=one.payment_method_id,
    )


def close_usage(sandbox: Sandbox, one: SubscriptionRecord, ended: datetime, metered: list[MeterUsage]) -> None:
    """Store the usage that is billed now, so that it is not billed again."""
    sandbox.store.put(
        UsagePeriodRecord(
            subscription_id=one.subscription_id, start_date=one.unbilled_from, end_date=ended, meters=metered
        )
    )


@router.get("/subscriptions/{subscription_id}/usage-history")
async def retrieve_usage_history(
    subscription_id: str, filters: Annotated[UsageFilter, Query()], sandbox: SandboxDep
) -> Page[UsagePeriod]:
    """The open period with its usage until now, then the billed periods, the newest first."""
    one = subscription_of(sandbox, subscription_id)
    periods: list[UsagePeriod] = list(sandbox.store.find(UsagePeriodRecord, subscription_id))
    if one.status in ("active", "on_hold", "past_due", "paused"):
        start, end = one.unbilled_from, one.next_billing_date
        open_ = UsagePeriod(start_date=start, end_date=end, meters=usage(sandbox, one, start, end))
        periods.insert(0, open_)
    return filters.of([cut for period in periods if (cut := filters.cut(period)) is not None])
