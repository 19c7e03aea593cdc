"""Failures of calls to Dodo Payments."""

from dataclasses import dataclass

from billing.errors import BillingError


@dataclass(eq=False)
class DodoUnavailable(BillingError):
    """Dodo Payments does not answer, or not as it should: whether it acted is unknown. Try again later."""

    message: str = "Dodo Payments does not answer: retry shortly"
    retry_after_s: float = 0.0
    """What Dodo asked for; 0 where it asked for nothing."""

    def __str__(self) -> str:
        return self.message


@dataclass(eq=False)
class DodoUnreadable(DodoUnavailable):
    """Dodo Payments answered with a value that this version cannot read, such as a status that it does not know."""


@dataclass(eq=False)
class DodoRefused(BillingError):
    """Dodo Payments answered that it will not do this; the same call again gets the same answer."""

    status: int
    code: str = ""
    """Dodo's error code in upper snake case, where it gave one."""
    message: str = ""

    def __str__(self) -> str:
        return f"Dodo Payments refused with {self.status} {self.code}: {self.message}"


class DodoMisconfigured(BillingError):
    """The environment names no Dodo to talk to, or contradicts itself."""


class WebhookRejected(BillingError):
    """A webhook whose signature or body does not verify."""
