"""Refusals of the ledger, by cause: credit, limits, and requests or movements that came before."""

from dataclasses import dataclass

from redis.exceptions import ResponseError

from billing.errors import BillingError, Refusal
from billing.money import Nanos, format_usd

UNREADABLE = (ResponseError, ValueError, KeyError, TypeError, AssertionError)
"""What the store or a file has cannot be read, by our scripts or by us. It is no refusal: whether a movement that met
it took effect is unknown, and it may be sent again."""

_REMEDIES = {
    "balance": "buy a pack with POST /v1/checkout",
    "overage_cap": "your plan's limit on what is invoiced later is reached, buy a pack with POST /v1/checkout",
    "debt": "a refund or a dispute left this account in debt, which a pack pays: buy one with POST /v1/checkout",
    "subscription": "subscribe with POST /v1/checkout or pay the open invoice (POST /v1/portal), or buy a pack",
    "subscription_fee": "your subscription extends no credit because {why_paused}; buy a pack with POST /v1/checkout",
}


@dataclass(eq=False)
class InsufficientCredits(Refusal):
    """Not even with every hold released would the balance cover the least this request can cost."""

    balance_nanos: Nanos
    required_nanos: Nanos
    max_affordable_tokens: int = 0
    limit_source: str = "balance"
    """``balance``, ``overage_cap`` (the credit limit), ``debt``, ``subscription`` or ``subscription_fee``."""
    why_paused: str = ""
    """Why a subscription extends no credit, and until when: where ``limit_source`` is ``subscription_fee``."""

    def __str__(self) -> str:
        remedy = _REMEDIES[self.limit_source].format(why_paused=self.why_paused)
        return (
            f"this request needs up to ${format_usd(self.required_nanos)} and ${format_usd(self.balance_nanos)} "
            f"is left: {remedy}, or lower max_tokens"
        )


@dataclass(eq=False)
class CreditOnHold(Refusal):
    """The balance would pay for it, but other running requests hold it."""

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
    "hour": "an hour while it is throttled (GET /v1/account says why, the operator lifts it)",
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
    """One key came with two bodies: one of the two requests is a mistake."""

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
    """The request id was never held, or was settled longer ago than is remembered. Which of the two is not guessed."""

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
class UnresolvedSettlement(BillingError):
    """The store has lost a hold and it is not sure that it was never charged: the operator decides."""

    request_id: str
    reason: str

    def __str__(self) -> str:
        return f"the record of {self.request_id} is kept for its operator (`farebox unresolved`): {self.reason}"
