"""The gateway's own errors, by cause. ``api/errors.py`` maps them, and those of every feature, to HTTP."""

from billing.errors import BillingError, Refusal
from billing.store.errors import StoreUnavailable
from deployments.inference.request import EngineError, EngineFailed, RequestRejected

# What was sent.


class BadRequest(Refusal):
    """The request is malformed; ``param`` names the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextTooLong(RequestRejected):
    """The prompt leaves no room for an answer in the model's context."""


class AdminDenied(Refusal):
    """The admin key is missing, wrong or not configured."""


class NotFound(Refusal):
    """There is nothing of that name."""


class Conflict(Refusal):
    """The request contradicts the present state."""


# How a request that was admitted can end early.


class AnswerTimeout(EngineError):
    """The answer took longer than this gateway allows: a whole answer is free, a stream is billed for what it got."""


class HoldLost(EngineFailed):
    """The store ended this request's hold while it ran: what was reported until then is billed."""


# What this gateway lacks.


class MeteringUnavailable(StoreUnavailable):
    """The store is away: a settlement waits on this gateway's disk, or a hold could not be extended."""


class NotConfigured(BillingError):
    """This process has not received a catalog yet."""

    def __str__(self) -> str:
        return "nothing is for sale yet: this gateway waits for its configuration"
