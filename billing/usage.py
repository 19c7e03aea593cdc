"""What a request consumed, and the usage record that is charged for it."""

import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Annotated, NewType, Self

from pydantic import Field

from billing.money import Nanos, format_usd

TenantId = NewType("TenantId", str)
RequestId = NewType("RequestId", str)
BucketId = NewType("BucketId", str)
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")]
"""What an owner may call a plan, a pack, an arm or a model."""


class Status(StrEnum):
    """How a request ended, as far as its bill is concerned."""

    COMPLETE = "complete"
    """Everything asked for was delivered."""
    CANCELLED = "cancelled"
    """The client cancelled: the prompt and the tokens generated until then are billed."""
    FAILED = "failed"
    """Farebox failed: a stream is billed for what was delivered, anything else is free."""
    EXPIRED = "expired"
    """The gateway died: the last checkpoint is billed when its lease runs out."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Quantities of one request, as the engine counted them.

    ``prompt_tokens`` includes ``cached_tokens``, as in OpenAI's API; ``compute_ms`` is the
    request's share of the step time of the batches it was in.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 1
    compute_ms: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.cached_tokens <= self.prompt_tokens, "cached tokens are part of the prompt"
        assert min(self.completion_tokens, self.requests, self.compute_ms) >= 0, (
            "quantities are counted, never negative"
        )

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            requests=self.requests + other.requests,
            compute_ms=self.compute_ms + other.compute_ms,
        )

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


NOTHING = Usage(requests=0)
"""What a request is billed for when nothing was delivered."""


class Unit(StrEnum):
    """What a bucket of credit counts."""

    NANOS = "nanos"
    REQUESTS = "requests"

    def show(self, amount: int) -> str:
        """An amount as people read it: "$12.50", "300 requests"."""
        sign = "-" if amount < 0 else ""
        return f"{sign}${format_usd(abs(amount), 2)}" if self is Unit.NANOS else f"{amount:,} requests"


OVERAGE = BucketId("overage")
"""The name under which a record lists what was drawn from postpaid exposure, in nanos."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Units taken from one bucket; ``OVERAGE`` stands for postpaid exposure."""

    bucket: BucketId
    unit: Unit
    amount: int
    price: int = 0
    """Nanos that ``sold`` units of the bucket were sold for; 0 for what was given, and in records before 0.2."""
    sold: int = 0


@dataclass(frozen=True, slots=True)
class Modifier:
    """One reason why a request cost more or less than its list price, as it stands on the record."""

    kind: str
    """``volume``, ``time``, ``load`` or ``experiment``."""
    name: str
    multiplier: str
    """A decimal string; ``1`` where an arm has a price of its own."""


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """One settled request: append-only, and the only source of every charge and statistic."""

    record_id: str
    request_id: RequestId
    tenant: TenantId
    key_id: str
    adapter: str
    """``name@digest``, or the base model's id for a request without an adapter."""
    adapter_class: str
    plan: str
    price_version: str
    usage: Usage
    status: Status
    occurred_at_ms: int
    """Unix time in milliseconds, by the store's clock."""
    list_nanos: Nanos
    """What the request would cost at list price, whatever covered it."""
    charged_nanos: Nanos
    """Nanos drawn from buckets of money and from exposure; 0 where a requests bucket covered it."""
    draws: tuple[Draw, ...] = field(default=())
    balance_nanos: Nanos = Nanos(0)
    """Money left in the tenant's buckets right after this record."""
    seq: int = 0
    """The tenant's record number, without gaps."""
    modifiers: tuple[Modifier, ...] = ()
    """Why its price was not the listed one; empty where it was."""

    def drawn_from(self, bucket: BucketId) -> int:
        return sum(draw.amount for draw in self.draws if draw.bucket == bucket)

    @property
    def overage_nanos(self) -> Nanos:
        return Nanos(self.drawn_from(OVERAGE))

    def to_json(self) -> str:
        raw = asdict(self)
        for draw in raw["draws"]:
            if not draw["price"]:
                del draw["price"], draw["sold"]
        return json.dumps(raw, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        raw = json.loads(text)
        draws = tuple(
            Draw(BucketId(d["bucket"]), Unit(d["unit"]), d["amount"], d.get("price", 0), d.get("sold", 0))
            for d in raw.pop("draws")
        )
        usage, status = Usage(**raw.pop("usage")), Status(raw.pop("status"))
        modifiers = tuple(Modifier(**m) for m in raw.pop("modifiers", ()))
        return cls(usage=usage, status=status, draws=draws, modifiers=modifiers, **raw)
