"""What the store cannot or will not do."""

from dataclasses import dataclass

from billing.errors import BillingError


class StoreUnavailable(BillingError):
    """The store does not answer in time. Nothing was or will be served unmetered."""

    def __str__(self) -> str:
        return self.args[0] if self.args else "the metering store does not answer: retry shortly"


@dataclass(eq=False)
class ClockSkewError(StoreUnavailable):
    """This process and the store do not agree on the time: what expires, and in which period, nobody can say."""

    ahead_ms: int
    """Of the store; below zero it is behind."""

    def __str__(self) -> str:
        apart = f"{abs(self.ahead_ms) // 1000} s {'ahead of' if self.ahead_ms > 0 else 'behind'}"
        return f"this server's clock is {apart} the metering store's: nothing is admitted here"


class StoreRefused(BillingError):
    """The store is not fit to keep money (evicts keys, writes no log, wrong shard count)."""
