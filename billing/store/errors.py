"""What the store cannot do."""

from dataclasses import dataclass

from billing.errors import BillingError


class StoreUnavailable(BillingError):
    """The store does not answer in time, or cannot write now. Nothing is served unmetered."""

    def __str__(self) -> str:
        return self.args[0] if self.args else "the metering store does not answer: retry shortly"


@dataclass(eq=False)
class ClockSkewError(StoreUnavailable):
    """The clocks of this process and of the store differ by more than is allowed, so no period is certain."""

    ahead_ms: int
    """How far this process's clock is ahead of the store's; below zero where it is behind."""

    def __str__(self) -> str:
        apart = f"{abs(self.ahead_ms) // 1000} s {'ahead of' if self.ahead_ms > 0 else 'behind'}"
        return f"this server's clock is {apart} the metering store's: nothing is admitted here"


class StoreRefused(BillingError):
    """The store is not fit to keep money: it evicts keys, writes no log, is too old, or has another schema."""
