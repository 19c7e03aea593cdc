"""Notices: what an owner, or a tenant's own systems, should know of, as named events with a few facts each."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Self

from billing.usage import TenantId


class NoticeKind(StrEnum):
    ALLOWANCE = "allowance.reached"
    """A share of a period's allowance is used up: ``percent`` says which, 80 or 100."""
    OVERAGE = "overage.reached"
    """The same of the most that may stand unpaid."""
    BALANCE_LOW = "balance.low"
    REFILL_SUCCEEDED = "refill.succeeded"
    REFILL_FAILED = "refill.failed"
    PAYMENT_FAILED = "payment.failed"
    PAYMENT_SET_ASIDE = "payment.set_aside"
    """A payment is for a product that is not ours: once for each product."""
    WEBHOOK_WAITING = "webhook.waiting"
    """A payment, refund or dispute could not be applied for a quarter of an hour: ``reason`` says why."""
    WEBHOOK_DROPPED = "webhook.dropped"
    """A person decided that a webhook is never applied."""
    REFUND_SUCCEEDED = "refund.succeeded"
    DISPUTE_OPENED = "dispute.opened"
    DISPUTE_WON = "dispute.won"
    DISPUTE_LOST = "dispute.lost"
    DISPUTE_CANCELLED = "dispute.cancelled"
    DISPUTE_ACCEPTED = "dispute.accepted"
    DISPUTE_EXPIRED = "dispute.expired"
    SUBSCRIPTION_PAST_DUE = "subscription.past_due"
    SUBSCRIPTION_ON_HOLD = "subscription.on_hold"
    DUNNING_STARTED = "dunning.started"
    """Dodo asks the customer of an unpaid renewal for another card."""
    DUNNING_RECOVERED = "dunning.recovered"
    RECORD_WITHHELD = "record.withheld"
    """A usage record is not as it was written, and is not exported to Dodo."""
    EVENT_REFUSED = "event.refused"
    """Dodo refuses a tenant's usage for good, for instance because it has no such customer any more: dead letters."""
    EXPORT_STARVED = "export.starved"
    """Usage waits, and for minutes no call to Dodo was left for it."""
    KEY_THROTTLED = "key.quarantined"
    """A key is used like a stolen one: it is throttled until a person lifts that."""
    PRODUCT_DIFFERS = "product.differs"
    """A product at Dodo has another price, say, than it was made with."""
    PRODUCT_MISSING = "product.missing"
    """Something that is on sale is not at Dodo, so that it cannot be bought."""
    ITEM_STUCK = "task.item_stuck"
    """A periodic task of the billing actor fails again and again for one tenant, webhook or shard, its ``item``."""


@dataclass(frozen=True, slots=True)
class Notice:
    """One event. ``once`` names what it is about: the same name is recorded a single time."""

    kind: NoticeKind
    tenant: TenantId
    once: str
    at_ms: int
    facts: Mapping[str, str] = field(default_factory=dict)
    id: str = ""
    """Its position in the log, given when it is recorded."""

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "kind": self.kind.value, "facts": dict(self.facts)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, id_: str = "") -> Self:
        raw = json.loads(text)
        return cls(**{**raw, "kind": NoticeKind(raw["kind"]), "tenant": TenantId(raw["tenant"]), "id": id_})
