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


class KeysNotManaged(Refusal):
    """A key that may not make, rotate or revoke keys asked to."""

    def __str__(self) -> str:
        return (
            "this key may not manage keys, or is throttled: use one that was made with `manages_keys`, "
            "or ask the operator"
        )
