"""Tenants, their API keys and their Dodo subscriptions, as plain values; how a key is made and hashed."""

import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, computed_field, model_validator

from billing.catalog.plans import NO_LIMITS, Limits
from billing.catalog.terms import Terms
from billing.clock import iso
from billing.pricing.prices import Usd
from billing.tenants.errors import ScopeMissing, ScopesRefused
from billing.usage import TenantId

KEY_PREFIX = "fbx_"
SHOWN_DIGITS = 8
"""Characters of a key that are stored in clear, so that its owner can distinguish keys."""

TenantName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]

Email = Annotated[str, Field(pattern=r"^[^@\s\x00-\x1f\x7f]+@[^@\s\x00-\x1f\x7f]+$")]

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
"""Line breaks and other characters that no name is written with."""


def _without_control_characters(text: str) -> str:
    if _CONTROL.search(text):
        raise ValueError("line breaks, tabs and other control characters are refused: leave them out")
    return text


_OneLine = AfterValidator(_without_control_characters)
ShownName = Annotated[str, _OneLine]
"""A tenant's or a key's name, for people."""
Reference = Annotated[str, Field(min_length=1, max_length=128), _OneLine]
"""An operator's own, by which a grant or an adjustment counts once."""
Reason = Annotated[str, Field(min_length=1, max_length=500), _OneLine]
"""Why an operator does something."""


def clean_name(name: str) -> str:
    """A name from elsewhere as a ``ShownName``: control characters become spaces."""
    return _CONTROL.sub(" ", name).strip()


class _Stored(BaseModel):
    """A value kept in the store as JSON; fields that an older version wrote are ignored."""

    model_config = ConfigDict(frozen=True)


class SubscriptionStatus(StrEnum):
    """Dodo's own words for the state of a subscription."""

    PENDING = "pending"
    ACTIVE = "active"
    ON_HOLD = "on_hold"
    PAST_DUE = "past_due"
    PAUSED = "paused"
    CANCELLED = "cancelled"
    FAILED = "failed"
    EXPIRED = "expired"


ENDED = (SubscriptionStatus.CANCELLED, SubscriptionStatus.EXPIRED, SubscriptionStatus.FAILED)
"""These never come back; the tenant falls to the default plan."""
LAST_CHARGES_MS = 120_000
"""How long before its last period ends a subscription extends no more credit: what was drawn until then must
settle, wait for a flush and reach Dodo while there is an invoice for it."""


class Subscription(_Stored):
    """What we know of the Dodo subscription that carries a tenant's plan."""

    id: str
    plan: str
    status: SubscriptionStatus
    period_start_ms: int
    period_end_ms: int
    past_due_ends_at_ms: int | None = None
    cancel_at_period_end: bool = False
    paused_at_ms: int | None = None
    """When its latest pause began: until then Dodo has invoiced what was used."""
    product_id: str = ""
    """Of Dodo's product that it pays; empty for one that was stored before products had terms."""
    sold: Terms | None = None
    """What that product sells each period, which a later change of the plan does not alter."""
    scheduled_product_id: str = ""
    """Of Dodo's product that it changes to when its period ends; empty where no change is scheduled."""
    credit_paused: Mapping[str, int] = {}
    """By refund or dispute of a fee, the beginning of the period in which it keeps credit from being extended; 0 while
    that is open. One that is over is kept: an older answer must not open it again."""

    @property
    def is_last_period(self) -> bool:
        """No period follows this one, so what is not charged in it never is."""
        return self.cancel_at_period_end or self.status in ENDED

    def extends_credit(self, now_ms: int) -> bool:
        """May postpaid use go on? While it is live and paid, but not up to the very end of its last period."""
        is_closing = self.is_last_period and now_ms >= self.period_end_ms - LAST_CHARGES_MS
        return self.is_live(now_ms) and not is_closing and not self.pauses

    @property
    def pauses(self) -> tuple[str, ...]:
        """The refunds and disputes of this period's fee that keep credit from being extended; the open ones first."""
        now = {source: at_ms for source, at_ms in self.credit_paused.items() if at_ms in (0, self.period_start_ms)}
        return tuple(sorted(now, key=lambda source: bool(now[source])))

    @property
    def why_paused(self) -> str:
        """Why credit is not extended now, and until when; empty where no refund or dispute of its fee is the reason."""
        if not self.pauses:
            return ""
        kind, _, id_ = self.pauses[0].partition(":")
        if not self.credit_paused[self.pauses[0]]:
            return f"its fee is disputed ({id_}), until that is decided"
        what = "was refunded" if kind == "refund" else "was lost in a dispute"
        return f"its fee {what} ({id_}), until {iso(self.period_end_ms)}"

    def is_live(self, now_ms: int) -> bool:
        """Only while active, or past due within its grace."""
        if self.status is SubscriptionStatus.ACTIVE:
            return True
        return self.status is SubscriptionStatus.PAST_DUE and now_ms < (self.past_due_ends_at_ms or 0)

    def is_overdue(self, now_ms: int) -> bool:
        """Its period ended, and no event of the next has come."""
        return self.is_live(now_ms) and now_ms > self.period_end_ms

    def has_lapsed(self, now_ms: int) -> bool:
        """It was live, and carries nothing now."""
        return self.status is not SubscriptionStatus.PENDING and not self.is_live(now_ms)

    def is_resting(self, now_ms: int) -> bool:
        """Neither live nor ended: a payment or its customer may open it again."""
        is_open = self.status not in (*ENDED, SubscriptionStatus.PENDING)
        return is_open and not self.is_live(now_ms)


class Tenant(_Stored):
    """One paying customer of the owner."""

    id: TenantId
    email: str
    plan: str
    name: str = ""
    suspended: bool = False
    dodo_customer_id: str = ""
    """Empty until Dodo has the customer; until then its usage waits, counted."""
    subscription: Subscription | None = None
    created_at_ms: int = 0

    @property
    def plans_held(self) -> frozenset[str]:
        """The plan it is on, and the one that its subscription carries until that has ended."""
        one = self.subscription
        return frozenset({self.plan} if one is None or one.status in ENDED else {self.plan, one.plan})


class Throttle(_Stored):
    """Why a key may do little for now."""

    reason: str
    detail: str
    since_ms: int


class Scope(StrEnum):
    """What a key may be used for; each route of the API asks for one."""

    INFERENCE = "inference"
    USAGE_READ = "usage:read"
    """Account, usage, records and offers."""
    KEYS_WRITE = "keys:write"
    """Make, rotate and revoke the tenant's keys."""
    BILLING_READ = "billing:read"
    """Invoices, and how auto-refill is set up."""
    BILLING_WRITE = "billing:write"
    """Checkout, portal, auto-refill: what charges a card or changes what is paid for."""


BILLING = (Scope.BILLING_READ, Scope.BILLING_WRITE)
NEW_KEY_SCOPES = (Scope.INFERENCE, Scope.USAGE_READ)
"""Of a key for which no scopes are chosen."""
BUYER_SCOPES = (*NEW_KEY_SCOPES, *BILLING)
"""Of a licence key: its buyer may have no other key to buy again with."""
SUSPENDED_BY_THROTTLE = (Scope.KEYS_WRITE, *BILLING)

MADE_BY_OPERATOR = "admin"
MADE_BY_DODO = "dodo"


class ApiKey(_Stored):
    """A key as it is stored: never the key itself."""

    id: str
    tenant: TenantId
    hash: str
    shown: str
    """The key's first characters, for people."""
    name: str = ""
    models: tuple[str, ...] | None = None
    """Models it may use; ``None`` is all that its tenant may."""
    created_at_ms: int = 0
    expires_at_ms: int | None = None
    revoked_at_ms: int | None = None
    limits: Limits = NO_LIMITS
    """Its own, where they are lower than its plan's."""
    daily_cap: Usd | None = None
    """The most that it may spend in a day, in UTC."""
    monthly_cap: Usd | None = None
    scopes: tuple[Scope, ...] = ()
    """What it may be used for, in the order of ``Scope``."""
    made_by: str = ""
    """The id of the key that made or rotated it, ``admin`` or ``dodo``; empty in records from before 0.2."""
    throttled: Throttle | None = Field(default=None, validation_alias=AliasChoices("throttled", "quarantine"))
    lifted_at_ms: int = 0
    """When a person last lifted its throttle."""
    counts_as: str = ""
    """The key that it replaced: it goes on under that one's limits and caps."""

    @property
    def is_ours(self) -> bool:
        """Not a licence key, which Dodo made and ends."""
        return self.shown.startswith(KEY_PREFIX)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def manages_keys(self) -> bool:
        """The scope ``keys:write``, under its name before 0.2."""
        return Scope.KEYS_WRITE in self.scopes

    @property
    def is_bounded(self) -> bool:
        """It may do less than its tenant: it has models, limits or a spend cap of its own."""
        return self.models is not None or self.limits != NO_LIMITS or self.has_spend_cap

    @property
    def has_spend_cap(self) -> bool:
        return self.daily_cap is not None or self.monthly_cap is not None

    def is_usable(self, now_ms: int) -> bool:
        return self.revoked_at_ms is None and (self.expires_at_ms is None or now_ms < self.expires_at_ms)

    def require(self, scope: Scope) -> None:
        """Raises ScopeMissing unless the key may be used for this now."""
        if scope not in self.scopes:
            raise ScopeMissing(scope)
        if self.throttled is not None and scope in SUSPENDED_BY_THROTTLE:
            raise ScopeMissing(scope, is_throttled=True)

    @model_validator(mode="before")
    @classmethod
    def _with_scopes(cls, stored: object) -> object:
        """Give scopes to a record from before 0.2, when every key might buy.

        One without bounds of its own keeps that; one with bounds was never meant to, nor to manage keys.
        """
        if not isinstance(stored, Mapping) or "scopes" in stored:
            return stored
        bounds = (stored.get(name) for name in ("models", "daily_cap", "monthly_cap"))
        limits = Limits.model_validate(stored.get("limits", NO_LIMITS))
        if limits != NO_LIMITS or any(bound is not None for bound in bounds):
            return {**stored, "scopes": NEW_KEY_SCOPES}
        managing = (Scope.KEYS_WRITE,) if stored.get("manages_keys") else ()
        return {**stored, "scopes": in_order((*BUYER_SCOPES, *managing))}


@dataclass(frozen=True, slots=True)
class Principal:
    """Who sends a request: a usable key and its tenant."""

    key: ApiKey
    tenant: Tenant


def hash_key(key: str) -> str:
    """SHA-256 of a key, 64 hex digits. Keys carry 192 random bits, so a plain hash suffices."""
    return hashlib.sha256(key.encode()).hexdigest()


def in_order(scopes: Iterable[Scope]) -> tuple[Scope, ...]:
    """Each scope once, in the order of ``Scope``."""
    given = set(scopes)
    return tuple(scope for scope in Scope if scope in given)


def check_scopes(key: ApiKey) -> None:
    """Raises ScopesRefused where a key's scopes would make its bounds worthless."""
    if Scope.KEYS_WRITE in key.scopes and key.is_bounded:
        raise ScopesRefused(Scope.KEYS_WRITE, "model, limit or cap", "it could make a key without")
    for scope in BILLING:
        if scope in key.scopes and key.has_spend_cap:
            raise ScopesRefused(scope, "spend cap", "it could spend more through the saved card")


def made_by(maker: ApiKey, key: ApiKey) -> ApiKey:
    """``key`` as one that ``maker`` makes or rotates: it may do no more, and expires no later.

    Raises:
        ScopeMissing: it has a scope that ``maker`` lacks.
    """
    assert not maker.is_bounded, "a key that makes keys has no bounds that they would have to keep"
    for scope in key.scopes:
        if scope not in maker.scopes:
            raise ScopeMissing(scope, of_other=True)
    ends = [at for at in (key.expires_at_ms, maker.expires_at_ms) if at is not None]
    return key.model_copy(update={"made_by": maker.id, "expires_at_ms": min(ends, default=None)})


def successor(key: ApiKey, now_ms: int) -> tuple[str, ApiKey]:
    """A new secret with all that the old key may do, counted as the old one."""
    secret, made = new_key(key.tenant, now_ms, key.name, key.models)
    fresh = {name: getattr(made, name) for name in ("id", "hash", "shown", "created_at_ms", "made_by")}
    return secret, key.model_copy(update=fresh | {"counts_as": key.counts_as or key.id})


def new_key(
    tenant: TenantId,
    now_ms: int,
    name: str = "",
    models: tuple[str, ...] | None = None,
    scopes: tuple[Scope, ...] = NEW_KEY_SCOPES,
) -> tuple[str, ApiKey]:
    """Make a key as the operator does: the secret, shown once, and what is stored of it."""
    secret = KEY_PREFIX + secrets.token_urlsafe(24)
    stored = ApiKey(
        id="key_" + secrets.token_hex(8),
        tenant=tenant,
        hash=hash_key(secret),
        shown=secret[: len(KEY_PREFIX) + SHOWN_DIGITS],
        name=name,
        models=models,
        created_at_ms=now_ms,
        scopes=in_order(scopes),
        made_by=MADE_BY_OPERATOR,
    )
    return secret, stored
