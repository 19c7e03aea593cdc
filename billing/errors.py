"""The tree of refusals and failures of billing.

Each class carries the fields its answer needs and pickles. Statuses are not decided here.
"""

from dataclasses import fields, is_dataclass

LONGEST_SHOWN = 256
"""Characters of a name that a refusal repeats."""


class BillingError(Exception):
    """Anything billing refuses or cannot do."""

    def __reduce__(self) -> tuple[type["BillingError"], tuple[object, ...]]:
        values = tuple(getattr(self, f.name) for f in fields(self)) if is_dataclass(self) else self.args
        return type(self), values


class Refusal(BillingError):
    """A request that may not run, for a reason its sender can act on."""
