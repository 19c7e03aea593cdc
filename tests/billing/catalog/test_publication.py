"""The catalog in force is kept by its hash, and each gateway says which one it serves."""

from redis.asyncio import Redis

from billing.catalog import publication
from billing.catalog.catalog import Catalog
from tests.support.world import CATALOG

NOW = 1_795_000_000_000


async def test_published_catalog_reads_back_the_same(redis: Redis) -> None:
    assert await publication.current(redis) is None
    catalog = Catalog.model_validate(CATALOG)
    hash_ = await publication.publish(redis, catalog, "gw_1", NOW)
    assert await publication.current(redis) == catalog
    (gateway,) = await publication.gateways(redis)
    assert (gateway.gateway_id, gateway.hash, gateway.at_ms) == ("gw_1", hash_, NOW)
    await publication.forget_gateway(redis, "gw_1")
    assert await publication.gateways(redis) == []
