"""Plans, packs and limits as the owner configures them: what a tenant may draw on in a period, and how fast."""

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from billing.money import MAX_GRANT_NANOS, Nanos
from billing.pricing.prices import Usd
from billing.usage import Unit

Visibility = Literal["public", "hidden"]
"""What is hidden is sold only to the tenants whose experiment arm names it."""

LEAST_BURST = 10


class PlanKind(StrEnum):
    FREE = "free"
    PREPAID = "prepaid"
    PAY_AS_YOU_GO = "pay_as_you_go"
    SUBSCRIPTION = "subscription"


class _Configured(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Limits(_Configured):
    """Limits of one key. ``None`` means no limit of that kind."""

    requests_per_minute: Annotated[int, Field(gt=0)] | None = None
    burst: Annotated[int, Field(gt=0)] | None = None
    """Requests that may come at once; in any minute at most this many more than ``requests_per_minute`` pass."""
    tokens_per_minute: Annotated[int, Field(gt=0)] | None = None
    """A minute's worth may come at once."""
    concurrent_requests: Annotated[int, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _burst_is_of_something(self) -> Self:
        if self.burst is not None and self.burst > (self.requests_per_minute or 0):
            raise ValueError("`burst` must be at most `requests_per_minute`, which it needs beside it")
        return self

    def lowered_to(self, other: Self) -> Self:
        """The lower of each limit."""
        if other == NO_LIMITS:
            return self
        names = ("requests_per_minute", "tokens_per_minute", "concurrent_requests")
        both = {name: (getattr(self, name), getattr(other, name)) for name in names}
        lower = {name: min((one for one in pair if one is not None), default=None) for name, pair in both.items()}
        bursts = [limits.requests_at_once for limits in (self, other) if limits.requests_at_once]
        return type(self).model_validate(lower | {"burst": min(bursts, default=None)})

    @property
    def requests_at_once(self) -> int:
        """``burst``, or a tenth of a minute's requests but ten where a minute has them; 0 without a limit."""
        limit = self.requests_per_minute or 0
        return self.burst or min(limit, max(LEAST_BURST, limit // 10))


NO_LIMITS = Limits()


class Quota(_Configured):
    """Units of credit: either ``requests`` or ``usd`` is given, for the named adapters or for all."""

    requests: Annotated[int, Field(gt=0, le=2**53 - 1)] | None = None
    usd: Usd | None = None
    adapters: tuple[str, ...] = ()
    """Adapters that a requests quota covers; empty covers all."""

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if (self.requests is None) == (self.usd is None):
            raise ValueError("give either `requests` or `usd`")
        if self.usd is not None and not 0 < self.usd <= MAX_GRANT_NANOS:
            raise ValueError("`usd` must be above 0 and at most 1000000")
        if self.usd is not None and self.adapters:
            raise ValueError("a quota in `usd` covers every adapter: name adapters only with `requests`")
        return self

    @property
    def unit(self) -> Unit:
        return Unit.REQUESTS if self.requests is not None else Unit.NANOS

    @property
    def amount(self) -> int:
        return self.requests if self.requests is not None else int(self.usd or 0)


class Plan(_Configured):
    """What a tenant may draw on: an allowance each period, then packs, then postpaid credit up to a limit."""

    kind: PlanKind
    allowance: Quota | None = None
    credit_limit: Usd = Field(default=Nanos(0), validation_alias=AliasChoices("credit_limit", "overage_cap"))
    """Most nanos of unpaid postpaid use; 0 where the plan extends no credit. Read as ``overage_cap`` too, its name
    before 0.2."""
    monthly_price: Usd = Nanos(0)
    """The subscription's fixed price; Dodo charges it, farebox only creates the product."""
    limits: Limits = Limits()
    low_balance: Usd = Nanos(1_000_000_000)
    """A notice is recorded, once, of a prepaid tenant with this much left, or less."""
    licence_key: bool = False
    """Does Dodo hand its buyer a licence key, which is then an API key?"""
    grace_days: Annotated[int, Field(ge=0, le=60)] = 3
    """Days that a subscription in ``past_due`` keeps its postpaid credit."""
    visibility: Visibility = "public"
    weight: Annotated[int, Field(ge=1, le=100)] = 1
    """How much of busy replicas each of its tenants gets, beside one of a plan of weight 1."""

    @model_validator(mode="after")
    def _matches_its_kind(self) -> Self:
        wants_allowance = self.kind in (PlanKind.FREE, PlanKind.SUBSCRIPTION)
        if wants_allowance != (self.allowance is not None):
            raise ValueError(f"a {self.kind} plan {'needs' if wants_allowance else 'has no'} `allowance`")
        if self.kind is PlanKind.PAY_AS_YOU_GO and self.credit_limit == 0:
            raise ValueError("a pay_as_you_go plan needs `credit_limit`: the most that may stand unpaid")
        if self.kind in (PlanKind.FREE, PlanKind.PREPAID) and self.credit_limit:
            raise ValueError(f"a {self.kind} plan extends no credit: remove `credit_limit`")
        return self

    @property
    def is_postpaid(self) -> bool:
        """Does using it extend credit, and so need a Dodo subscription that carries our meter?"""
        return self.kind in (PlanKind.PAY_AS_YOU_GO, PlanKind.SUBSCRIPTION)

    @property
    def is_hidden(self) -> bool:
        return self.visibility == "hidden"


class Pack(_Configured):
    """Credit sold once: a one-time Dodo product that fills a bucket when its payment succeeds."""

    price: Usd
    grants: Quota
    expires_days: Annotated[int, Field(gt=0, le=3650)] | None = 365
    visibility: Visibility = "public"
    licence_key: bool = False
    """Does Dodo hand its buyer a licence key for each one bought, which is then an API key?"""

    @model_validator(mode="after")
    def _can_be_sold(self) -> Self:
        if self.price <= 0 or self.price % 10_000_000:
            raise ValueError("`price` must be above 0 and whole cents: Dodo charges in cents")
        return self

    @property
    def is_hidden(self) -> bool:
        return self.visibility == "hidden"
