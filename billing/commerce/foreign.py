"""Tell products of ours from what else the merchant sells under the same Dodo account."""

from collections.abc import Collection

from billing.commerce.products import Products
from billing.commerce.waiting import NotYet
from billing.dodo.client import Dodo


async def foreign_among(dodo: Dodo, ours: Products, products: Collection[str]) -> set[str]:
    """Those of ``products`` that are not ours. Dodo is asked about those whose terms are not stored.

    Raises:
        NotYet: one carries our tag: it was made by us, and its terms are not stored yet.
        DodoUnavailable, DodoRefused: Dodo could not say.
    """
    foreign = {product for product in products if await ours.terms(product) is None}
    for product in sorted(foreign):
        if tag := await dodo.product_tag(product):
            raise NotYet(f"product {product} is {tag}, and its terms are not stored yet: run `farebox dodo sync`")
    return foreign
