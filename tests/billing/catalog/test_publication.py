"""The catalog in force is kept by its hash, and each gateway says which one it serves."""

from redis.asyncio import Redis

from billing.catalog import publication
from billing.catalog.catalog import Catalog
from billing.clock import now_ms
from billing.store.keys import CATALOG_HISTORY
from tests.support.world import CATALOG

NOW = 1_795_000_000_000


def with_costs(usd: str) -> Catalog:
    return Catalog.model_validate(CATALOG | {"costs": {"gpu_hour": usd}})


async def test_published_catalog_reads_back_the_same(redis: Redis) -> None:
    assert await publication.current(redis) is None
    catalog = Catalog.model_validate(CATALOG)
    hash_ = await publication.publish(redis, catalog, "gw_1", NOW)
    assert await publication.current(redis) == catalog
    (gateway,) = await publication.gateways(redis)
    assert (gateway.gateway_id, gateway.hash, gateway.at_ms) == ("gw_1", hash_, NOW)
    await publication.forget_gateway(redis, "gw_1")
    assert await publication.gateways(redis) == []


async def test_history_has_each_catalog_since_it_came_into_force(redis: Redis) -> None:
    """The same one again, from another gateway or after a restart, is not news; one that comes back is."""
    assert await publication.in_force_ever(redis) is None
    one, other = with_costs("1"), with_costs("2")
    started = now_ms()
    for gateway, catalog in (("gw_1", one), ("gw_2", one), ("gw_1", other), ("gw_2", one)):
        await publication.publish(redis, catalog, gateway, NOW)
    history = await publication.in_force_ever(redis)
    assert history is not None
    assert history.catalogs == (one, other, one)
    assert list(history.starts_ms) == sorted(history.starts_ms)
    assert started - 1_000 < history.starts_ms[0] <= now_ms() + 1_000, "by the store's clock, not by the gateway's"
    assert history.at(0) == one, "what was before the first is as the first"
    assert history.at(history.starts_ms[-1]) == one


async def test_history_begins_with_the_catalog_of_a_version_that_kept_none(redis: Redis) -> None:
    await publication.publish(redis, with_costs("1"), "gw_1", NOW)
    await redis.delete(CATALOG_HISTORY)
    only = await publication.in_force_ever(redis)
    assert only is not None
    assert only.at(0) == with_costs("1")
    await publication.publish(redis, with_costs("2"), "gw_1", NOW)
    history = await publication.in_force_ever(redis)
    assert history is not None
    assert history.catalogs == (with_costs("1"), with_costs("2"))


async def test_plan_that_a_later_catalog_lacks_is_retired_there_as_it_last_was(redis: Redis) -> None:
    first = Catalog.model_validate(CATALOG)
    fewer = {name: plan for name, plan in CATALOG["plans"].items() if name != "pro"}  # type: ignore[attr-defined]
    cheaper = CATALOG["plans"] | {"pro": CATALOG["plans"]["pro"] | {"monthly_price": "5"}}  # type: ignore[operator, index]
    for plans in (CATALOG["plans"], fewer, cheaper):
        await publication.publish(redis, Catalog.model_validate(CATALOG | {"plans": plans}), "gw_1", NOW)
    history = await publication.in_force_ever(redis)
    assert history is not None
    prices = [catalog.plan_named("pro").monthly_price for catalog in history.catalogs]  # type: ignore[union-attr]
    assert prices == [first.plans["pro"].monthly_price, first.plans["pro"].monthly_price, 5 * 10**9]


async def test_catalog_that_cannot_be_read_is_left_out_of_the_history(redis: Redis) -> None:
    await publication.publish(redis, with_costs("1"), "gw_1", NOW)
    await redis.xadd(CATALOG_HISTORY, {"hash": "gone"})
    history = await publication.in_force_ever(redis)
    assert history is not None
    assert history.catalogs == (with_costs("1"),)
