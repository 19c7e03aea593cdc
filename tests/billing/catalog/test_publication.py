"""The catalog in force is kept by its hash, and each gateway says which one it serves."""

from redis.asyncio import Redis

from billing.catalog import publication
from billing.catalog.catalog import Catalog
from tests.support.world import CATALOG

NOW = 1_795_000_000_000


async def test_the_catalogue_in_force_comes_back_as_it_was_published(redis: Redis) -> None:
    assert await publication.current(redis) is None
    catalog = Catalog.model_validate(CATALOG)
    hash_ = await publication.publish(redis, catalog, "gw_1", NOW)
    assert await publication.current(redis) == catalog
    (gateway,) = await publication.gateways(redis)
    assert (gateway.gateway_id, gateway.hash, gateway.at_ms) == ("gw_1", hash_, NOW)
    await publication.forget_gateway(redis, "gw_1")
    assert await publication.gateways(redis) == []
