"""Usage events as they are exported to Dodo: records folded into one event per tenant and event name.

Pure: from records to events, and from an event to what is sent at a given moment. Quantities and ids are fixed when an
event is made; only its timestamp may be newer in a later send.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Self

from billing.dodo.client import Event
from billing.dodo.fields import to_iso
from billing.usage import TenantId, Usage, UsageRecord

CHARGE = "farebox.charge"
"""Overage and postpaid draws: Dodo's meter sums ``charge_nanos`` and invoices them."""
USAGE = "farebox.usage"
"""Everything that was paid before or costs nothing: no meter charges it."""

MAX_AGE_MS = 55 * 60_000
"""Dodo refuses timestamps older than an hour; the rest is the journey's time."""
MAX_CLASSES = 10
"""Adapter classes told apart in one event: Dodo takes 50 metadata values. The rest is ``other``."""
MAX_CLASS_NAME = 60


BOUNDARY_MS = 15_000
"""How long before the end of a billing period charges wait for the next one, lest they arrive too late."""


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a tenant's events go: its Dodo customer, and its billing period where it has a subscription."""

    customer_id: str
    period_start_ms: int = 0
    period_end_ms: int = 0
    is_last_period: bool = False
    """No later period will bill what misses this one."""
    paused_at_ms: int = 0
    """When its latest pause began, which bills what was used until then."""

    def is_closing(self, now_ms: int) -> bool:
        """Should charges wait for the next period? Only where there is one."""
        return not self.is_last_period and 0 < self.period_end_ms - now_ms < BOUNDARY_MS

    def boundary_ms(self, now_ms: int) -> int:
        """The last moment, as far as we know, until which usage was billed."""
        turned = self.period_end_ms if 0 < self.period_end_ms <= now_ms else self.period_start_ms
        return max(turned, self.paused_at_ms)


@dataclass(frozen=True, slots=True)
class SealedEvent:
    """An event whose content is fixed: sent until Dodo takes it, always with the same id and quantities."""

    id: str
    tenant: TenantId
    name: str
    occurred_at_ms: int
    """When its last record was settled."""
    sealed_at_ms: int
    charge_nanos: int
    covered_nanos: int
    quantities: dict[str, int]
    until: str = ""
    """The stream id of the last entry in its window."""
    first_attempt_ms: int | None = None
    """The earliest send whose outcome we do not know; ``None`` before the first."""
    reason: str = ""
    """Why Dodo refused it, on a dead letter."""
    first_at_ms: int = 0
    """When its first record was settled; 0 on an event that was sealed without it."""

    @property
    def nanos(self) -> int:
        """All its money, whether charged or covered."""
        return self.charge_nanos + self.covered_nanos

    @property
    def oldest_ms(self) -> int:
        """When its oldest record was settled, as far as is known."""
        return self.first_at_ms or self.occurred_at_ms

    def attempted(self, at_ms: int | None) -> Self:
        return replace(self, first_attempt_ms=at_ms)

    def to_event(self, destination: Destination, now_ms: int) -> Event:
        """What is sent now. Where Dodo would refuse the timestamp, or never bill it because its period is
        closed, ``now`` takes its place and the true one stays in metadata; ``crosses_period`` says that it is
        billed in a later period than it was used in. A charge always has ``now``: a pause or another plan may
        have closed its period without our knowing yet.
        """
        true = {"occurred_at": to_iso(self.occurred_at_ms), "until": self.until}
        is_fresh = 0 <= now_ms - self.occurred_at_ms < MAX_AGE_MS
        is_open = self.occurred_at_ms >= destination.boundary_ms(now_ms)
        is_kept = is_fresh and is_open and self.name != CHARGE
        return Event(
            id=self.id,
            customer_id=destination.customer_id,
            name=self.name,
            timestamp_ms=self.occurred_at_ms if is_kept else now_ms,
            metadata={**self.quantities, **true, "restamped": not is_kept, "crosses_period": not is_open},
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


@dataclass
class _Sum:
    """One event in the making."""

    nanos: int = 0
    list_nanos: int = 0
    records: int = 0
    first_ms: int = 0
    last_ms: int = 0
    usage: Usage = field(default_factory=lambda: Usage(requests=0))
    classes: dict[str, Usage] = field(default_factory=dict)

    def add_money(self, nanos: int, at_ms: int) -> None:
        assert nanos >= 0, "a correction after export is a credit, never a negative event"
        self.nanos += nanos
        self._add_moment(at_ms)

    def add_quantities(self, record: UsageRecord) -> None:
        name = record.adapter_class[:MAX_CLASS_NAME]
        self.usage = self.usage + record.usage
        self.classes[name] = self.classes.get(name, Usage(requests=0)) + record.usage
        self.list_nanos += record.list_nanos
        self.records += 1
        self._add_moment(record.occurred_at_ms)

    def _add_moment(self, at_ms: int) -> None:
        self.first_ms = min(self.first_ms or at_ms, at_ms)
        self.last_ms = max(self.last_ms, at_ms)

    @property
    def is_empty(self) -> bool:
        return self.nanos == 0 and self.list_nanos == 0 and self.usage == Usage(requests=0)


def fold(shard: int, start: str, end: str, records: Iterable[UsageRecord], now_ms: int) -> list[SealedEvent]:
    """Sum the records of one shard between two stream ids.

    A record that drew both on credit and on exposure is split: the money goes where it belongs,
    its tokens are counted once, with what was paid before. Ids depend on the range alone.
    """
    sums: dict[tuple[TenantId, str], _Sum] = defaultdict(_Sum)
    for record in records:
        charge, covered = record.overage_nanos, record.charged_nanos - record.overage_nanos
        if charge:
            sums[record.tenant, CHARGE].add_money(charge, record.occurred_at_ms)
        if covered:
            sums[record.tenant, USAGE].add_money(covered, record.occurred_at_ms)
        is_all_charge = charge > 0 and covered == 0
        sums[record.tenant, CHARGE if is_all_charge else USAGE].add_quantities(record)
    return [
        replace(_seal(event_id(shard, start, end, tenant, name), tenant, name, total, now_ms), until=end)
        for (tenant, name), total in sorted(sums.items())
        if not total.is_empty
    ]


def event_id(shard: int, start: str, end: str, tenant: TenantId, name: str) -> str:
    return hashlib.sha256(f"{shard}|{start}|{end}|{tenant}|{name}".encode()).hexdigest()[:32]


def _seal(id_: str, tenant: TenantId, name: str, total: _Sum, now_ms: int) -> SealedEvent:
    is_charge = name == CHARGE
    quantities = {
        "charge_nanos" if is_charge else "covered_nanos": total.nanos,
        "charged_nanos": total.nanos,
        "list_nanos": total.list_nanos,
        "records": total.records,
        **_quantities(total.usage),
    }
    for class_name, usage in _by_class(total.classes).items():
        quantities |= {
            f"{class_name}.requests": usage.requests,
            f"{class_name}.tokens": usage.total_tokens,
            f"{class_name}.compute_ms": usage.compute_ms,
        }
    return SealedEvent(
        id=id_,
        tenant=tenant,
        name=name,
        occurred_at_ms=total.last_ms,
        sealed_at_ms=now_ms,
        charge_nanos=total.nanos if is_charge else 0,
        covered_nanos=0 if is_charge else total.nanos,
        quantities=quantities,
        first_at_ms=total.first_ms,
    )


def _quantities(usage: Usage) -> dict[str, int]:
    return {
        "requests": usage.requests,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        "compute_ms": usage.compute_ms,
    }


def _by_class(classes: dict[str, Usage]) -> dict[str, Usage]:
    named: dict[str, Usage] = {}
    for rank, (name, usage) in enumerate(sorted(classes.items())):
        key = f"class.{name}" if rank < MAX_CLASSES else "class_other"
        named[key] = named.get(key, Usage(requests=0)) + usage
    return named
