"""Auto-refill asks once, after its cooldown, within its cap, and is off after a failure."""

import pytest

from billing.commerce.auto_refill.refill import COOLDOWN_MS, KEPT_ATTEMPTS, Attempt, Refill

MONTH, NEXT_MONTH = 1_000_000_000, 9_000_000_000
LATER = MONTH + 100 * COOLDOWN_MS
ON = Refill(pack="small", threshold_nanos=1_000, monthly_cap_cents=1_200)


def attempt(number: int = 1, at: int = MONTH) -> Attempt:
    return Attempt(id=f"refill_{number}", started_at_ms=at, cents=500)


@pytest.mark.parametrize(("balance", "is_due"), [(1_001, False), (1_000, True), (0, True), (-5, True)])
def test_refill_is_due_at_the_threshold_and_below(balance: int, is_due: bool) -> None:
    assert ON.is_due(balance, 500, MONTH, MONTH) == is_due


def test_next_attempt_waits_for_the_cooldown() -> None:
    begun = ON.begun(attempt(), MONTH)
    assert not begun.is_due(0, 500, LATER, MONTH)
    assert not begun.charged("refill_1", "pay_1").is_due(0, 500, LATER, MONTH)
    done = begun.succeeded("refill_1", begun.attempts[0].cents, MONTH + 5)
    assert not done.is_due(0, 500, MONTH + 5 + COOLDOWN_MS - 1, MONTH)
    assert done.is_due(0, 500, MONTH + 5 + COOLDOWN_MS, MONTH)
    with pytest.raises(AssertionError):
        begun.begun(attempt(2), MONTH)


def test_monthly_cap_holds_over_forgotten_attempts() -> None:
    cheap = ON.model_copy(update={"monthly_cap_cents": 500 * (KEPT_ATTEMPTS + 5)})
    for number in range(KEPT_ATTEMPTS + 5):
        at = MONTH + number * 2 * COOLDOWN_MS
        assert cheap.is_due(0, 500, at, MONTH)
        cheap = cheap.begun(attempt(number, at), MONTH).succeeded(f"refill_{number}", 500, at)
    assert len(cheap.attempts) == KEPT_ATTEMPTS
    assert not cheap.is_due(0, 500, LATER, MONTH)
    assert cheap.is_due(0, 500, NEXT_MONTH, NEXT_MONTH), "a new month"


def test_failure_switches_off_and_costs_nothing_of_the_cap() -> None:
    failed = ON.begun(attempt(), MONTH).failed("refill_1", "the card was declined", LATER)
    assert (failed.is_on, failed.stopped_because, failed.month_cents) == (False, "the card was declined", 0)
    assert not failed.is_due(0, 500, LATER + COOLDOWN_MS, MONTH)
    again = failed.renewed(ON)
    assert again.attempts == failed.attempts
    assert again.is_due(0, 500, LATER + COOLDOWN_MS, MONTH)


def test_failure_of_last_month_does_not_change_this_months_cap() -> None:
    begun = ON.begun(attempt(1, MONTH), MONTH)
    moved = begun.model_copy(update={"month_start_ms": NEXT_MONTH, "month_cents": 700})
    assert moved.failed("refill_1", "late", NEXT_MONTH).month_cents == 700
