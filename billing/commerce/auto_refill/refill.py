"""Auto-refill as its tenant set it up, and each attempt to charge: values, when one is due, what each outcome means."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field

from billing.catalog.plans import Pack
from billing.money import NANOS_PER_CENT, divide_up, format_usd
from billing.usage import Name

COOLDOWN_MS = 10 * 60_000
"""Between the end of one attempt and the start of the next."""
KEPT_ATTEMPTS = 20


class AttemptState(StrEnum):
    STARTED = "started"
    """Dodo was, or was about to be, asked to charge: whether it did is not known yet."""
    CHARGED = "charged"
    """There is a payment; it has not ended."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True)


class Attempt(_Stored):
    """One try to buy the pack. ``id`` stands in the payment's metadata, so that a lost answer can be looked up."""

    id: str
    started_at_ms: int
    cents: int
    """What it costs, tax included: estimated until it has succeeded."""
    price_cents: int = 0
    """The pack's price, without tax; 0 of an attempt before 0.2."""
    state: AttemptState = AttemptState.STARTED
    payment_id: str = ""
    reason: str = ""
    ended_at_ms: int = 0

    @property
    def is_open(self) -> bool:
        return self.state in (AttemptState.STARTED, AttemptState.CHARGED)


class Refill(_Stored):
    """A tenant's consent to have its saved card charged for a pack when its balance is low."""

    pack: Name
    threshold_nanos: Annotated[int, Field(ge=0)]
    monthly_cap_cents: Annotated[int, Field(gt=0)]
    terms: str = ""
    """The key of the terms that the pack had when it was chosen; empty for one set up before 0.2."""
    is_on: bool = True
    stopped_because: str = ""
    """Why farebox switched it off; empty where its tenant did, or it is on."""
    attempts: tuple[Attempt, ...] = ()
    """The newest last; only so many are kept."""
    month_start_ms: int = 0
    month_cents: int = 0
    """What attempts begun in that month have cost, or may have."""

    @property
    def open_attempt(self) -> Attempt | None:
        return next((one for one in self.attempts if one.is_open), None)

    def spent_cents(self, month_start_ms: int) -> int:
        return self.month_cents if month_start_ms == self.month_start_ms else 0

    def is_due(self, balance_nanos: int, cents: int, now_ms: int, month_start_ms: int) -> bool:
        """Is the balance low enough, no attempt open, the cooldown over and the month's cap not reached?"""
        if not self.is_on or self.open_attempt is not None or balance_nanos > self.threshold_nanos:
            return False
        is_cool = all(now_ms - one.ended_at_ms >= COOLDOWN_MS for one in self.attempts)
        return is_cool and self.spent_cents(month_start_ms) + cents <= self.monthly_cap_cents

    def renewed(self, wanted: Self) -> Self:
        """What the tenant wants now, with the attempts made so far."""
        kept = {"attempts": self.attempts, "month_start_ms": self.month_start_ms, "month_cents": self.month_cents}
        return wanted.model_copy(update=kept)

    def expected_cents(self, price_cents: int) -> int:
        """What the next attempt costs, as far as is known: the price, with tax as the last one had it."""
        last = next((one for one in reversed(self.attempts) if one.state is AttemptState.SUCCEEDED), None)
        if last is None or last.cents <= last.price_cents or not last.price_cents:
            return price_cents
        return divide_up(price_cents * last.cents, last.price_cents)

    def begun(self, attempt: Attempt, month_start_ms: int) -> Self:
        assert self.open_attempt is None, "one attempt at a time"
        spent = self.spent_cents(month_start_ms) + attempt.cents
        kept = (*self.attempts, attempt)[-KEPT_ATTEMPTS:]
        return self.model_copy(update={"attempts": kept, "month_start_ms": month_start_ms, "month_cents": spent})

    def charged(self, attempt_id: str, payment_id: str) -> Self:
        return self._changed(attempt_id, state=AttemptState.CHARGED, payment_id=payment_id)

    def succeeded(self, attempt_id: str, cents: int, now_ms: int) -> Self:
        """Counts what was paid, tax included."""
        more = sum(cents - one.cents for one in self.attempts if one.id == attempt_id and self._counts(one))
        ended = self._changed(attempt_id, state=AttemptState.SUCCEEDED, cents=cents, ended_at_ms=now_ms)
        return ended.model_copy(update={"month_cents": self.month_cents + more})

    def failed(self, attempt_id: str, reason: str, now_ms: int) -> Self:
        """A failed charge switches auto-refill off: a refused card is tried again only when the tenant asks for it."""
        ended = self._changed(attempt_id, state=AttemptState.FAILED, reason=reason, ended_at_ms=now_ms)
        back = sum(one.cents for one in self.attempts if one.id == attempt_id and self._counts(one))
        off = {"is_on": False, "stopped_because": reason, "month_cents": self.month_cents - back}
        return ended.model_copy(update=off)

    def _counts(self, attempt: Attempt) -> bool:
        """Is it open, and part of what this month has cost?"""
        return attempt.is_open and attempt.started_at_ms >= self.month_start_ms

    def _changed(self, attempt_id: str, **changes: object) -> Self:
        attempts = tuple(one.model_copy(update=changes) if one.id == attempt_id else one for one in self.attempts)
        return self.model_copy(update={"attempts": attempts})


def refusal_of(refill: Refill, packs: Mapping[str, Pack]) -> str | None:
    """Why a tenant to whom these packs are offered may not have this auto-refill; ``None`` where it may."""
    pack = packs.get(refill.pack)
    if pack is None or pack.grants.usd is None:
        sold = ", ".join(sorted(name for name, one in packs.items() if one.grants.usd is not None))
        return f"pack {refill.pack!r} is no pack of dollars: choose one of {sold or 'none'}"
    if refill.threshold_nanos >= pack.grants.amount:
        return f"the threshold must be below what the pack gives, ${format_usd(pack.grants.amount, 2)}"
    if refill.monthly_cap_cents * NANOS_PER_CENT < pack.price:
        return f"the monthly cap does not pay for one pack of ${format_usd(pack.price, 2)}"
    return None
