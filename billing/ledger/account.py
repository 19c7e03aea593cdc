"""A tenant's account and the movements on it, as plain values.

Every movement carries an id that its sender chose: the same id twice is one movement.
"""

from dataclasses import dataclass, field

from billing.catalog.plans import Limits
from billing.ledger.errors import SpendCapReached
from billing.money import MAX_GRANT_NANOS, Nanos
from billing.pricing.prices import Price
from billing.tenants.spend_caps import SpendCap
from billing.usage import BucketId, Draw, Modifier, RequestId, Status, TenantId, Unit, Usage, UsageRecord


@dataclass(frozen=True, slots=True)
class Bucket:
    """Units that a tenant may draw on until they expire."""

    id: BucketId
    unit: Unit
    remaining: int
    granted: int
    expires_at_ms: int | None = None
    adapters: tuple[str, ...] = ()
    """Models that a requests bucket covers; empty covers all."""
    is_allowance: bool = False
    """An allowance is drawn before every pack and replaced when its period ends."""
    price: int = 0
    """Nanos that its credit was sold for; 0 for what was given."""
    sold: int = 0
    """Units that ``price`` bought: what was granted, before any refund. 0 where nothing was sold."""


@dataclass(frozen=True, slots=True)
class Account:
    """A tenant's money at one moment, as a hold would find it."""

    tenant: TenantId
    buckets: tuple[Bucket, ...]
    """In drawing order, without those that expired or that a plan left behind with nothing owed."""
    balance_nanos: Nanos
    """Money in the buckets, without what open holds drew; negative after a clawback."""
    available_nanos: Nanos
    """What a hold could draw now: the balance, and credit up to the credit limit."""
    held_nanos: Nanos
    """Nanos drawn by open holds, exposure included."""
    held_requests: int
    overage_nanos: Nanos
    """Exposure: unpaid postpaid use, settled. What open holds draw is in ``held_nanos``."""
    seq: int
    open_holds: int
    allowance_id: BucketId | None = None
    """The allowance that counts."""

    @property
    def allowance(self) -> Bucket | None:
        return next((bucket for bucket in self.buckets if bucket.id == self.allowance_id), None)

    @property
    def requests_left(self) -> int:
        """Requests in the buckets, less what is owed: below zero where more is owed."""
        return sum(bucket.remaining for bucket in self.buckets if bucket.unit is Unit.REQUESTS)

    def usable(self, bucket: Bucket) -> int:
        """What of a bucket can be drawn: while others of its unit and scope owe, so much of it stays undrawn."""
        return max(0, min(bucket.remaining, sum(one.remaining for one in self._beside(bucket))))

    def debt_beside(self, bucket: Bucket) -> int:
        """What buckets of its unit and scope owe."""
        return -sum(min(0, one.remaining) for one in self._beside(bucket))

    def _beside(self, bucket: Bucket) -> list[Bucket]:
        """Buckets of its unit that cover a model which it covers, itself among them."""
        scope = set(bucket.adapters)
        alike = (one for one in self.buckets if one.unit is bucket.unit)
        return [one for one in alike if not scope or not one.adapters or scope & set(one.adapters)]


@dataclass(frozen=True, slots=True)
class Funding:
    """What a request may draw on besides packs, decided by its tenant's plan and the clock."""

    allowance: Bucket | None = None
    """The current period's allowance: put in place of another period's by the same step that draws."""
    credit_limit: Nanos = Nanos(0)
    """0 where no subscription stands behind the credit."""
    former_allowance_id: BucketId | None = None
    """The id, without the plan's name, under which the version before put a period's allowance in place. Where it did,
    that one counts until the period is over."""


@dataclass(frozen=True, slots=True)
class HoldRequest:
    """Everything one atomic step needs to admit a request and hold its first step of output."""

    request_id: RequestId
    tenant: TenantId
    key_id: str
    model: str
    """The catalog's id, which requests buckets and private scopes name."""
    adapter: str
    adapter_class: str
    plan: str
    price: Price
    prompt_tokens: int
    max_tokens: int
    """Completion tokens asked for, already cut to the context."""
    funding: Funding
    limits: Limits = Limits()
    lease_ms: int = 30_000
    step_tokens: int = 256
    """Completion tokens that a hold begins with and grows by."""
    step_compute_ms: int = 5_000
    max_compute_ms: int = 0
    """0 where the price does not count compute."""
    modifiers: tuple[Modifier, ...] = ()
    """Why ``price`` is not the listed one."""
    month_start_ms: int = 0
    """The month whose spend this request counts towards; 0 where no price depends on it."""
    caps: tuple[SpendCap, ...] = ()
    counts_as: str = ""
    """The key under which limits and caps count it, where that is not its own: a rotated key goes on as the old."""

    @property
    def counted_key(self) -> str:
        return self.counts_as or self.key_id


@dataclass(frozen=True, slots=True)
class LimitsLeft:
    """What is left of each limit after a hold, for the ``x-ratelimit-*`` headers; ``None`` is no limit."""

    requests: int | None = None
    requests_reset_s: float = 0.0
    tokens: int | None = None
    tokens_reset_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Hold:
    """Credit set aside for one request until it is settled or its lease ends."""

    request: HoldRequest
    max_tokens: int
    """Completion tokens that the tenant's credit affords, the part that others hold included."""
    draws: tuple[Draw, ...]
    """What the hold begins with; it grows by ``Ledger.extend``."""
    lease_ends_at_ms: int
    """By the store's clock."""
    balance_nanos: Nanos
    """Money left in the buckets right after the hold."""
    covered_by_requests: bool
    """A requests bucket pays for it, whatever it costs in nanos."""
    limits_left: LimitsLeft = field(default_factory=LimitsLeft)
    clamped_by: SpendCapReached | None = None
    """The key's cap, where that and not the credit decides ``max_tokens``."""

    @property
    def held_nanos(self) -> Nanos:
        return Nanos(sum(draw.amount for draw in self.draws if draw.unit is Unit.NANOS))


@dataclass(frozen=True, slots=True)
class Progress:
    """A checkpoint: tokens generated so far and what they cost, which is billed if the lease ends."""

    request_id: RequestId
    tenant: TenantId
    usage: Usage
    list_nanos: Nanos
    held_nanos: Nanos = Nanos(0)
    """What the gateway has of the hold: billed as far, though the store lost extensions. 0: the store's own number."""


@dataclass(frozen=True, slots=True)
class HoldSnapshot:
    """What a settle carries of its hold, and is charged against where the store has lost that."""

    head: str
    """Members of the usage record that the hold froze, as JSON without braces."""
    unit: Unit
    drawn: tuple[BucketId, ...]
    """What the hold began to draw on, in drawing order; nothing for what is free. The last owes what is not there any
    more."""
    held: int
    """Nanos, or 1 request: the most that is charged."""
    credit_limit: Nanos
    held_at_ms: int
    """By the store's clock; not later than any settle of it."""
    counted_key: str = ""
    caps: tuple[SpendCap, ...] = ()
    month_start_ms: int = 0
    """What else counts what it costs: its key's caps, and the month on which a volume price depends."""
    allowance: Bucket | None = None
    """Put in place again where the hold drew on it and the store lost it too."""


@dataclass(frozen=True, slots=True)
class Settlement:
    """What was served, once and for all. ``list_nanos`` above the hold is cut to it: our loss."""

    request_id: RequestId
    tenant: TenantId
    usage: Usage
    list_nanos: Nanos
    status: Status
    snapshot: HoldSnapshot | None = None
    """Without it, a settle whose hold is lost is refused."""
    is_undelivered: bool = False
    """For what was not delivered, after attempts without a reply: what one of them charged is given back."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """The settled record, and whether this call or an earlier one settled it."""

    record: UsageRecord
    is_repeat: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """Credit given once per ``source`` (a payment's id, an operator's reference)."""

    source: str
    tenant: TenantId
    unit: Unit
    amount: int
    expires_at_ms: int | None = None
    adapters: tuple[str, ...] = ()
    price: int = 0
    """Nanos that all of it was sold for; 0 for what is given."""


@dataclass(frozen=True, slots=True)
class Clawback:
    """Credit taken back once per ``source`` (a refund's id) from what ``granted_by`` gave: a grant's source, or an
    allowance's id.

    The bucket, and so the balance, may go below zero; never more is taken than was granted.
    """

    source: str
    tenant: TenantId
    granted_by: str
    amount: int
    allowance: Bucket | None = None
    """Where that is an allowance: as a hold would put it in place, which none may have done yet."""
    former_allowance_id: BucketId | None = None
    """The id that this allowance may have from the version before, as in ``Funding``."""


@dataclass(frozen=True, slots=True)
class Adjustment:
    """An operator's correction once per ``source``: credit given, or taken where ``amount`` is below zero.

    It moves credit only: what was exported to Dodo stays as it is. A balance may go below zero.
    """

    source: str
    tenant: TenantId
    unit: Unit
    amount: int
    reason: str


@dataclass(frozen=True, slots=True)
class Restoration:
    """What a clawback took, given back once: a dispute that was won."""

    clawback: Clawback

    @property
    def tenant(self) -> TenantId:
        return self.clawback.tenant


@dataclass(frozen=True, slots=True)
class Repayment:
    """Exposure lowered once per ``source``: the payment that bills it succeeded."""

    source: str
    tenant: TenantId
    nanos: int


Movement = Grant | Clawback | Adjustment | Settlement | Restoration | Repayment
"""What counts once by its own id, however often it is sent."""


def out_of_bounds(unit: Unit, amount: int) -> str:
    """Why a grant or a correction of this size is refused."""
    return f"{unit.show(amount)} is nothing, or more than the {unit.show(MAX_GRANT_NANOS)} that one movement may bring"
