"""Refusals about tenants and API keys."""

from dataclasses import dataclass

from billing.errors import Refusal


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


@dataclass(eq=False)
class ScopeMissing(Refusal):
    """A key may not be used for what it was sent for."""

    scope: str
    is_throttled: bool = False
    """It has the scope, which its throttle suspends."""
    of_other: bool = False
    """The key that it makes or rotates has the scope, and it has not."""

    def __str__(self) -> str:
        if self.is_throttled:
            return (
                f"this key is throttled, which suspends its scope `{self.scope}`: GET /v1/account says why, "
                "the operator lifts it"
            )
        what = ", so it can neither make nor rotate a key that has it" if self.of_other else ""
        return f"this key lacks the scope `{self.scope}`{what}: use a key that has it, or ask the operator for one"


@dataclass(eq=False)
class ScopesRefused(Refusal):
    """A key cannot have this scope together with its bounds."""

    scope: str
    bound: str
    reason: str

    def __str__(self) -> str:
        return f"a key with the scope `{self.scope}` takes no {self.bound}: {self.reason}; leave one of them out"
