"""What one product at Dodo sells, and for how much: fixed when the product is created, never changed."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Self

from pydantic import BaseModel, ConfigDict

from billing.catalog.plans import Pack, Plan, Quota
from billing.money import format_usd
from billing.pricing.prices import Usd

KEY_DIGITS = 12


class Terms(BaseModel):
    """The terms of one pack or plan. Whoever pays its product gets these, whatever the configuration says by then."""

    model_config = ConfigDict(frozen=True)

    name: str
    """``pack:small`` or ``plan:pro``."""
    price: Usd
    """Of one pack, or of one month of the plan."""
    grants: Quota | None = None
    """What one pack brings, or one period of the plan; ``None`` for a plan without an allowance."""
    expires_days: int | None = None
    """Days from its payment for which a pack can be drawn on; ``None`` is for ever."""
    licence_key: bool = False

    @classmethod
    def of_pack(cls, name: str, pack: Pack) -> Self:
        return cls.model_construct(
            name=f"pack:{name}",
            price=pack.price,
            grants=pack.grants,
            expires_days=pack.expires_days,
            licence_key=pack.licence_key,
        )

    @classmethod
    def of_plan(cls, name: str, plan: Plan) -> Self:
        return cls.model_construct(
            name=f"plan:{name}", price=plan.monthly_price, grants=plan.allowance, licence_key=plan.licence_key
        )

    @property
    def kind(self) -> str:
        """``pack`` or ``plan``."""
        return self.name.partition(":")[0]

    @property
    def plain_name(self) -> str:
        """The name in the configuration: ``small``, ``pro``."""
        return self.name.partition(":")[2]

    @property
    def key(self) -> str:
        """``pack:small@`` and the first digits of a hash of all terms: equal terms have an equal key."""
        content = self.model_dump_json(exclude_defaults=True)
        return f"{self.name}@{hashlib.sha256(content.encode()).hexdigest()[:KEY_DIGITS]}"

    def differences(self, other: Self) -> Iterator[tuple[str, str, str]]:
        """What differs: the name of each field, as it is here and as it is in ``other``."""
        for what, show in _SHOWN.items():
            ours, theirs = show(self), show(other)
            if ours != theirs:
                yield what, ours, theirs


def _grants(terms: Terms) -> str:
    quota = terms.grants
    if quota is None:
        return "nothing"
    return f"{quota.unit.show(quota.amount)}{' on ' if quota.adapters else ''}{', '.join(quota.adapters)}"


_SHOWN: Mapping[str, Callable[[Terms], str]] = {
    "price": lambda terms: f"${format_usd(terms.price, 2)}",
    "grants": _grants,
    "expiry": lambda terms: "never" if terms.expires_days is None else f"{terms.expires_days} days",
    "licence key": lambda terms: "yes" if terms.licence_key else "no",
}
