"""What happens after a failed renewal: retries on Dodo's schedule, the grace period ``past_due``, and dunning.

Retries are those of features/recovery/payment-retries: off by default, at most eight, and only within the recovery
window. The invoice of a pause is retried in the same way; during its grace period the subscription stays paused.
"""

from datetime import datetime, timedelta
from typing import ClassVar, Literal

from cluster.dodo_sandbox.endpoints import announce
from cluster.dodo_sandbox.state import Sandbox, Settings
from cluster.dodo_sandbox.subscriptions import SubscriptionRecord, change
from cluster.dodo_sandbox.wire import BRAND_ID, Resource, Wire, new_id

RETRY_DELAYS_H = (12, 24, 48, 72, 96, 120, 168, 168)
"""The delay of each retry after the attempt before it."""


class Dunning(Wire):
    brand_id: str = BRAND_ID
    created_at: datetime
    customer_id: str
    status: Literal["recovering", "recovered", "exhausted"] = "recovering"
    subscription_id: str
    trigger_state: Literal["on_hold", "cancelled", "past_due"]
    payment_id: str | None = None


class DunningRecord(Dunning, Resource):
    kind: ClassVar[str] = "dunning"
    id: str

    @property
    def key(self) -> str:
        return self.id

    @property
    def owner(self) -> str:
        return self.subscription_id


def next_retry(settings: Settings, one: SubscriptionRecord) -> datetime | None:
    """When the failed renewal is retried, or ``None``."""
    if not settings.payment_retries or one.failed_at is None or one.retries >= len(RETRY_DELAYS_H):
        return None
    after = timedelta(hours=sum(RETRY_DELAYS_H[: one.retries + 1]))
    return one.failed_at + after if after <= timedelta(days=settings.recovery_window_days) else None


def next_step(settings: Settings, one: SubscriptionRecord) -> datetime | None:
    """When the next renewal, retry or end of a grace period is due, or ``None``."""
    if one.status == "active":
        return one.next_billing_date
    if one.status not in ("on_hold", "past_due", "paused"):
        return None
    return min((at for at in (next_retry(settings, one), one.past_due_ends_at) if at is not None), default=None)


def failed(sandbox: Sandbox, one: SubscriptionRecord, payment_id: str, at: datetime) -> SubscriptionRecord:
    """Record a failed charge. The first one puts on hold, or past due if there is a grace period."""
    if one.failed_at is not None:
        sandbox.store.put(one)
        return one
    grace_days, is_paused = sandbox.settings.past_due_grace_days, one.paused_at is not None
    status: Literal["past_due", "on_hold"] = "past_due" if grace_days else "on_hold"
    ends = at + timedelta(days=grace_days) if grace_days else None
    if grace_days and is_paused:
        return change(sandbox, one, "subscription.updated", at, past_due_ends_at=ends, failed_at=at, retries=0)
    if sandbox.settings.dunning and not is_paused:
        started = DunningRecord(
            id=new_id("dun"), created_at=at, customer_id=one.customer.customer_id,
            subscription_id=one.subscription_id, trigger_state=status, payment_id=payment_id,
        )  # fmt: skip
        sandbox.store.put(started)
        announce(sandbox, "dunning.started", "dunning", started, at)
    return change(
        sandbox, one, f"subscription.{status}", at, status=status, past_due_ends_at=ends, failed_at=at, retries=0
    )


def end_grace(sandbox: Sandbox, one: SubscriptionRecord, at: datetime) -> SubscriptionRecord:
    return change(sandbox, one, "subscription.on_hold", at, status="on_hold", past_due_ends_at=None)


def recovered(sandbox: Sandbox, one: SubscriptionRecord, payment_id: str, at: datetime) -> None:
    """The invoice is paid: mark the subscription's dunning as recovered."""
    for running in sandbox.store.find(DunningRecord, one.subscription_id):
        if running.status == "recovering":
            ended = running.model_copy(update={"status": "recovered", "payment_id": payment_id})
            sandbox.store.put(ended)
            announce(sandbox, "dunning.recovered", "dunning", ended, at)
