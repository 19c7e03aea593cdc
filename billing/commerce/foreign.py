"""Tell products of ours from what else the merchant sells under the same Dodo account."""

from collections.abc import Collection, Iterable

from billing.commerce.waiting import NotYet
from billing.dodo.client import Dodo


async def foreign_among(dodo: Dodo, products: Iterable[str], known: Collection[str]) -> set[str]:
    """Those of ``products`` that are not ours. Dodo is asked about those whose ids are not ``known`` here.

    Raises:
        NotYet: one carries our tag: it was made by us, and its id is not kept here yet.
        DodoUnavailable, DodoRefused: Dodo could not say.
    """
    foreign = {product for product in products if product not in known}
    for product in sorted(foreign):
        if tag := await dodo.product_tag(product):
            raise NotYet(f"product {product} is {tag}, and its id is not kept here yet: run `farebox dodo sync`")
    return foreign
