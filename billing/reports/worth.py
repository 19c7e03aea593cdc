"""What a drawn unit of credit earned its owner: its share of what the credit was sold for."""

from collections.abc import Mapping
from dataclasses import dataclass

from billing.catalog.plans import Pack, PlanKind
from billing.catalog.publication import CatalogHistory
from billing.money import Nanos, divide_up
from billing.usage import OVERAGE, Draw, UsageRecord

DAY_MS = 24 * 3_600_000


@dataclass(frozen=True, slots=True)
class Worth:
    """Values draws. A draw says what its credit was sold for, so nothing that is sold later changes its value.

    Draws on credit that was sold before 0.2 do not say so: they are valued by the catalog that was in force when the
    record was written, and a pack or plan that is not in it is worth nothing.
    """

    history: CatalogHistory
    products: Mapping[str, str]
    """Dodo's product id to our name, such as ``pack:small``."""

    def revenue(self, record: UsageRecord) -> Nanos:
        """What a record earned: postpaid draws in full, prepaid ones at what their credit was sold for."""
        return Nanos(sum(self.of_draw(draw, record) for draw in record.draws))

    def of_draw(self, draw: Draw, record: UsageRecord) -> int:
        """Nanos that one of its draws earned."""
        if draw.bucket == OVERAGE:
            return draw.amount
        if draw.price:
            return divide_up(draw.amount * draw.price, draw.sold)
        kind, _, rest = draw.bucket.partition(":")
        if kind == "payment":
            return self._of_pack(draw.amount, rest.rpartition(":")[2], record.occurred_at_ms)
        if kind == "allowance":
            return self._of_allowance(draw.amount, record)
        return 0  # granted by the operator

    def of_grant(self, source: str, amount: int, at_ms: int) -> tuple[int, int]:
        """Price (0 of a gift) and expiry (0 is never) of a grant from before 0.2, whose entry has neither."""
        kind, _, rest = source.partition(":")
        pack = self._pack(rest.rpartition(":")[2], at_ms) if kind == "payment" else None
        if pack is None:
            return 0, 0
        expires_ms = 0 if pack.expires_days is None else at_ms + pack.expires_days * DAY_MS
        return divide_up(amount * pack.price, pack.grants.amount), expires_ms

    def _pack(self, product_id: str, at_ms: int) -> Pack | None:
        return self.history.at(at_ms).packs.get(self.products.get(product_id, "").removeprefix("pack:"))

    def _of_pack(self, amount: int, product_id: str, at_ms: int) -> int:
        pack = self._pack(product_id, at_ms)
        return 0 if pack is None else divide_up(amount * pack.price, pack.grants.amount)

    def _of_allowance(self, amount: int, record: UsageRecord) -> int:
        plan = self.history.at(record.occurred_at_ms).plan_named(record.plan)
        if plan is None or plan.kind is not PlanKind.SUBSCRIPTION or plan.allowance is None:
            return 0
        return divide_up(amount * plan.monthly_price, plan.allowance.amount)
