"""The tree of refusals and failures of billing.

Each class carries the fields its answer needs and pickles. Statuses are not decided here.
"""

from dataclasses import dataclass, fields, is_dataclass

from billing.money import Nanos, format_usd

LONGEST_SHOWN = 256
"""Characters of a name that a refusal repeats."""


class BillingError(Exception):
    """Anything billing refuses or cannot do."""

    def __reduce__(self) -> tuple[type["BillingError"], tuple[object, ...]]:
        values = tuple(getattr(self, f.name) for f in fields(self)) if is_dataclass(self) else self.args
        return type(self), values


class Refusal(BillingError):
    """A request that may not run, for a reason its sender can act on."""


@dataclass(eq=False)
class InvalidKey(Refusal):
    reason: str = "unknown"
    """``missing``, ``malformed``, ``unknown``, ``revoked`` or ``expired``."""

    def __str__(self) -> str:
        return f"the API key is {self.reason}: send `Authorization: Bearer <key>` with a valid key"


@dataclass(eq=False)
class TenantSuspended(Refusal):
    tenant: str

    def __str__(self) -> str:
        return f"tenant {self.tenant} is suspended: ask the operator"


@dataclass(eq=False)
class UnknownModel(Refusal):
    model: str

    def __str__(self) -> str:
        return f"model {self.model[:LONGEST_SHOWN]!r} does not exist: GET /v1/models lists those you may use"


@dataclass(eq=False)
class ModelNotAllowed(Refusal):
    model: str

    def __str__(self) -> str:
        return f"this key may not use model {self.model!r}: GET /v1/models lists those it may"


_REMEDIES = {
    "balance": "buy a pack with POST /v1/checkout",
    "overage_cap": "your plan's cap on what is invoiced later is reached, buy a pack with POST /v1/checkout",
    "subscription": "subscribe with POST /v1/checkout or pay the open invoice (POST /v1/portal), or buy a pack",
}


@dataclass(eq=False)
class InsufficientCredits(Refusal):
    """Not even with every hold released would the balance cover the least this request can cost."""

    balance_nanos: Nanos
    required_nanos: Nanos
    max_affordable_tokens: int = 0
    limit_source: str = "balance"
    """``balance``, ``overage_cap`` or ``subscription``."""

    def __str__(self) -> str:
        return (
            f"this request needs up to ${format_usd(self.required_nanos)} and ${format_usd(self.balance_nanos)} "
            f"is left: {_REMEDIES[self.limit_source]}, or lower max_tokens"
        )


@dataclass(eq=False)
class CreditOnHold(Refusal):
    """The balance would do, but other running requests hold it."""

    retry_after_s: int
    balance_nanos: Nanos
    held_nanos: Nanos
    required_nanos: Nanos

    def __str__(self) -> str:
        held = f"${format_usd(self.held_nanos)}" if self.held_nanos else "what would pay for it"
        return f"{held} is held by requests still running: retry in {self.retry_after_s} s, or lower max_tokens"


@dataclass(eq=False)
class SpendCapReached(Refusal):
    """The key has spent what it may in this hour, day or month; its tenant may have more."""

    window: str
    """``hour``, ``day`` or ``month``."""
    cap_nanos: Nanos
    spent_nanos: Nanos
    """Within the window, settled."""
    resets_at: str
    """ISO 8601, UTC: when the next window begins."""
    retry_after_s: float

    def __str__(self) -> str:
        return (
            f"this API key may spend ${format_usd(self.cap_nanos, 2)} {_PER[self.window]} and has spent "
            f"${format_usd(self.spent_nanos, 2)}: use another key, have its cap raised, or wait until {self.resets_at}"
        )


_PER = {
    "hour": "an hour while it is in quarantine (GET /v1/account says why, the operator lifts it)",
    "day": "a day (UTC)",
    "month": "a month (UTC)",
}


@dataclass(eq=False)
class RateLimited(Refusal):
    kind: str
    """``requests``, ``tokens`` or ``concurrency``."""
    limit: int
    retry_after_s: float
    """When one request of this size would pass, if no other came before it."""
    reset_s: float = 0.0
    """When nothing of the limit is used any more."""
    at_once: int = 0
    """How many may come at once."""

    def __str__(self) -> str:
        what = "running at once" if self.kind == "concurrency" else f"{self.kind} a minute"
        return f"the limit of {self.limit} {what} is reached: retry in {self.retry_after_s:g} s"


@dataclass(eq=False)
class DuplicateRequest(Refusal):
    """A request id is used once; a second hold under it is our bug or a forged id."""

    request_id: str

    def __str__(self) -> str:
        return f"request {self.request_id} was held or settled before"


class IdempotencyKeyReused(Refusal):
    """One key, two bodies: one of the two requests is not what its sender means."""

    def __str__(self) -> str:
        return "this Idempotency-Key was sent before with another body: use a new key for a new request"


@dataclass(eq=False)
class IdempotencyKeyInUse(Refusal):
    retry_after_s: float

    def __str__(self) -> str:
        return f"the request with this Idempotency-Key is still running: retry in {self.retry_after_s:g} s"


@dataclass(eq=False)
class AnswerTooLarge(Refusal):
    record_id: str

    def __str__(self) -> str:
        return (
            f"the answer under this Idempotency-Key was delivered, charged by {self.record_id}, and is too large "
            "to be kept: nothing was charged again; to run the request once more use a new key"
        )


@dataclass(eq=False)
class AnswerIncomplete(Refusal):
    record_id: str

    def __str__(self) -> str:
        return (
            f"the request with this Idempotency-Key broke off and what it had made may be charged by {self.record_id} "
            "(GET /v1/usage/records): nothing was charged again; to run it once more use a new key"
        )


@dataclass(eq=False)
class UnknownHold(Refusal):
    """Nothing is known of this request id: never held, or settled too long ago to remember. Never guessed."""

    request_id: str

    def __str__(self) -> str:
        return f"no hold or recent settlement is known under {self.request_id}"


@dataclass(eq=False)
class GrantRefused(Refusal):
    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source} is refused: {self.reason}"


@dataclass(eq=False)
class SourceReused(Refusal):
    """The same source came again with different content: one of the two is wrong."""

    source: str

    def __str__(self) -> str:
        return f"{self.source} was used before for a different movement: give this one another source"


@dataclass(eq=False)
class UnknownTenant(Refusal):
    tenant: str

    def __str__(self) -> str:
        return f"tenant {self.tenant!r} does not exist: list the tenants to find its id"


@dataclass(eq=False)
class TenantExists(Refusal):
    tenant: str

    def __str__(self) -> str:
        return f"tenant {self.tenant!r} exists already: choose another id"


@dataclass(eq=False)
class CustomerTaken(Refusal):
    """Two tenants with one Dodo customer would pay each other's bills."""

    customer: str
    owner: str

    def __str__(self) -> str:
        return f"Dodo customer {self.customer} is tenant {self.owner}'s: give this tenant another"


@dataclass(eq=False)
class UnknownKey(Refusal):
    key_id: str

    def __str__(self) -> str:
        return f"API key {self.key_id!r} does not exist: list the keys to find its id"


@dataclass(eq=False)
class KeyNotRotated(Refusal):
    key_id: str
    reason: str

    def __str__(self) -> str:
        return f"API key {self.key_id!r} cannot be rotated, {self.reason}: make a new key"


class KeysNotManaged(Refusal):
    """A key that may not make, rotate or revoke keys asked to."""

    def __str__(self) -> str:
        return (
            "this key may not manage keys, or is in quarantine: use one that was made with `manages_keys`, "
            "or ask the operator"
        )


@dataclass(eq=False)
class Quarantined(BillingError):
    """The store has lost a hold and nobody can be sure that it was not charged: a person decides."""

    request_id: str
    reason: str

    def __str__(self) -> str:
        return f"the record of {self.request_id} is kept for its operator (`farebox quarantine`): {self.reason}"


class StoreUnavailable(BillingError):
    """The store does not answer in time. Nothing was or will be served unmetered."""

    def __str__(self) -> str:
        return self.args[0] if self.args else "the metering store does not answer: retry shortly"


@dataclass(eq=False)
class ClockAstray(StoreUnavailable):
    """This process and the store do not agree on the time: what expires, and in which period, nobody can say."""

    ahead_ms: int
    """Of the store; below zero it is behind."""

    def __str__(self) -> str:
        apart = f"{abs(self.ahead_ms) // 1000} s {'ahead of' if self.ahead_ms > 0 else 'behind'}"
        return f"this server's clock is {apart} the metering store's: nothing is admitted here"


class StoreRefused(BillingError):
    """The store is not fit to keep money (evicts keys, writes no log, wrong shard count)."""


class ArchiveUnavailable(BillingError):
    """The archive's files cannot be written or read."""


@dataclass(eq=False)
class DodoUnavailable(BillingError):
    """Dodo Payments does not answer, or not as it should: whether it acted is unknown. Try again later."""

    message: str = "Dodo Payments does not answer: retry shortly"
    retry_after_s: float = 0.0
    """What Dodo asked for; 0 where it asked for nothing."""

    def __str__(self) -> str:
        return self.message


@dataclass(eq=False)
class DodoRefused(BillingError):
    """Dodo Payments answered that it will not do this; the same call again gets the same answer."""

    status: int
    code: str = ""
    """Dodo's own word in upper snake case, where it gave one."""
    message: str = ""

    def __str__(self) -> str:
        return f"Dodo Payments refused with {self.status} {self.code}: {self.message}"


class DodoMisconfigured(BillingError):
    """The environment does not say, or says two ways, which Dodo to talk to."""


class WebhookRejected(BillingError):
    """A webhook whose signature or body does not verify."""
