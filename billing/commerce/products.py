"""The products that were made at Dodo: what each one sells, and which one sells a pack or plan as configured.

Terms are stored by Dodo's id when the product is made and are never changed: a changed price or grant is another
product. A payment therefore grants what its product sold, whatever is in force when its webhook comes.
"""

from collections.abc import Mapping
from typing import cast

from redis.asyncio import Redis

from billing.catalog.catalog import Catalog
from billing.catalog.terms import Terms
from billing.commerce.dodo_ids import id_of, keep_ids
from billing.store.connection import guarded
from billing.store.guard import BULK_DEADLINE_S
from billing.store.keys import PRODUCTS
from billing.store.write import write


class Products:
    """Their terms in the store."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def terms(self, product_id: str) -> Terms | None:
        """What a product sells; ``None`` for one that is not ours."""
        async with guarded():
            text = cast(str | None, await self._redis.hget(PRODUCTS, product_id))
        return None if text is None else Terms.model_validate_json(text)

    async def all(self) -> Mapping[str, Terms]:
        """By Dodo's id, the terms of every product that was ever made."""
        async with guarded(BULK_DEADLINE_S):
            found = cast(dict[str, str], await self._redis.hgetall(PRODUCTS))
        return {id_: Terms.model_validate_json(text) for id_, text in found.items()}

    async def id_for(self, terms: Terms) -> str:
        """The product that sells exactly this; empty where none was made yet."""
        if known := await id_of(self._redis, terms.key):
            return known
        return next((id_ for id_, other in (await self.all()).items() if other == terms), "")

    async def add(self, product_id: str, terms: Terms) -> None:
        """From now on this product sells these terms. Terms that it has already stay."""
        async with guarded(BULK_DEADLINE_S):
            await write(self._redis, ("HSETNX", PRODUCTS, product_id, terms.model_dump_json()))
        await keep_ids(self._redis, {terms.key: product_id})


def sold(catalog: Catalog) -> list[Terms]:
    """Everything that is paid for at Dodo: packs, and plans with a subscription."""
    packs = [Terms.of_pack(name, pack) for name, pack in catalog.packs.items()]
    return packs + [Terms.of_plan(name, plan) for name, plan in catalog.plans.items() if plan.is_postpaid]
