"""An owner hears of a product whose price was changed at Dodo, and of one that is on sale and not there."""

from billing.catalog.catalog import Catalog
from billing.commerce.price_watch import compare_products
from billing.notices.log import Notices
from billing.notices.notice import NoticeKind
from tests.support.purchases import AUTH
from tests.support.world import CATALOG, World


async def test_changed_price_at_dodo_is_noticed_once(world: World) -> None:
    assert await compare_products(world.commerce()) == 0
    path = f"/products/{await world.product('pack:small')}"
    price = (await world.operator.get(path, headers=AUTH)).json()["price"]
    changed = await world.operator.patch(path, json={"price": price | {"price": 50}}, headers=AUTH)
    changed.raise_for_status()
    assert [await compare_products(world.commerce()) for _ in range(2)] == [1, 0]
    (notice,) = await Notices(world.redis).newest()
    facts = {name: notice.facts[name] for name in ("product", "what", "configured", "at_dodo")}
    assert notice.kind is NoticeKind.PRODUCT_DIFFERS
    assert facts == {"product": "pack:small", "what": "price", "configured": "$5.00", "at_dodo": "$0.50"}


async def test_pack_missing_at_dodo_is_noticed_once(world: World) -> None:
    more = {"large": {"price": "50", "grants": {"usd": "50"}}}
    world.catalog = Catalog.model_validate(CATALOG | {"packs": CATALOG["packs"] | more})  # type: ignore[operator]
    assert [await compare_products(world.commerce()) for _ in range(2)] == [1, 0]
    (notice,) = await Notices(world.redis).newest()
    assert (notice.kind, notice.facts["product"]) == (NoticeKind.PRODUCT_MISSING, "pack:large")
