"""What a drawn unit of credit earned its owner: a pack's or a subscription's price, spread over what it granted."""

from collections.abc import Mapping
from dataclasses import dataclass

from billing.catalog.catalog import Catalog
from billing.catalog.plans import PlanKind
from billing.money import Nanos, divide_up
from billing.usage import OVERAGE, Draw, UsageRecord


@dataclass(frozen=True, slots=True)
class Worth:
    """Values draws by today's catalog; a pack or plan that is gone from it is worth nothing."""

    catalog: Catalog
    products: Mapping[str, str]
    """Dodo's product id to our name, such as ``pack:small``."""

    def revenue(self, record: UsageRecord) -> Nanos:
        """What a record earned: postpaid draws in full, prepaid ones at what their credit was bought for."""
        return Nanos(sum(self._of(draw, record.plan) for draw in record.draws))

    def _of(self, draw: Draw, plan_name: str) -> int:
        if draw.bucket == OVERAGE:
            return draw.amount
        kind, _, rest = draw.bucket.partition(":")
        if kind == "payment":
            return self._of_pack(draw.amount, rest.rpartition(":")[2])
        if kind == "allowance":
            return self._of_allowance(draw.amount, plan_name)
        return 0  # granted by the operator

    def _of_pack(self, amount: int, product_id: str) -> int:
        name = self.products.get(product_id, "").removeprefix("pack:")
        pack = self.catalog.packs.get(name)
        return 0 if pack is None else divide_up(amount * pack.price, pack.grants.amount)

    def _of_allowance(self, amount: int, plan_name: str) -> int:
        plan = self.catalog.plan_named(plan_name)
        if plan is None or plan.kind is not PlanKind.SUBSCRIPTION or plan.allowance is None:
            return 0
        return divide_up(amount * plan.monthly_price, plan.allowance.amount)
