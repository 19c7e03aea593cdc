"""The base of billing's exceptions; each feature has its own beneath it, in ``errors.py`` of its folder.

A class carries the fields that its answer needs, and pickles. HTTP statuses are decided in the gateway.
"""

from dataclasses import fields, is_dataclass

LONGEST_SHOWN = 256
"""Characters of a name that an error message repeats at most."""


class BillingError(Exception):
    """Anything billing refuses or cannot do."""

    def __reduce__(self) -> tuple[type["BillingError"], tuple[object, ...]]:
        values = tuple(getattr(self, f.name) for f in fields(self)) if is_dataclass(self) else self.args
        return type(self), values


class Refusal(BillingError):
    """A request that may not run, for a reason its sender can act on."""
