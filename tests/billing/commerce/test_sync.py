"""What we sell is made at Dodo once, found again, never deleted; differences are reported."""

import httpx
import pytest
from redis.asyncio import Redis

from billing.catalog.catalog import Catalog
from billing.commerce.sync import plan, sync
from billing.dodo.client import Dodo
from billing.dodo.errors import DodoUnavailable
from billing.store.keys import DODO_IDS
from cluster.dodo_sandbox.server import SandboxServer
from tests.support.world import CATALOG, SECRET, World

CATALOGUE_NOW = Catalog.model_validate(CATALOG)
EVERYTHING = {"meter:charge", "pack:small", "pack:calls", "plan:payg", "plan:pro", "webhook"}
URL = "http://127.0.0.1:8000/webhooks/dodo"


async def test_everything_is_made_once(redis: Redis, dodo: Dodo) -> None:
    first = await sync(dodo, redis, CATALOGUE_NOW, URL)
    assert (set(first.created), first.found, first.drift) == (EVERYTHING, (), ())
    assert first.webhook_secret == SECRET
    assert SECRET not in repr(first)
    ids = await redis.hgetall(DODO_IDS)
    assert set(ids) == EVERYTHING
    second = await sync(dodo, redis, CATALOGUE_NOW, URL)
    assert (second.created, set(second.found), second.drift) == ((), EVERYTHING, ())
    assert await redis.hgetall(DODO_IDS) == ids


async def test_lost_ids_are_found_at_dodo(redis: Redis, dodo: Dodo) -> None:
    await sync(dodo, redis, CATALOGUE_NOW, URL)
    ids = await redis.hgetall(DODO_IDS)
    await redis.delete(DODO_IDS)
    assert (await sync(dodo, redis, CATALOGUE_NOW, URL)).created == ()
    assert await redis.hgetall(DODO_IDS) == ids


async def test_product_missing_at_dodo_is_made_again(redis: Redis, dodo: Dodo) -> None:
    await redis.hset(DODO_IDS, "pack:small", "prd_of_another_account")
    assert "pack:small" in (await sync(dodo, redis, CATALOGUE_NOW)).created
    assert await redis.hget(DODO_IDS, "pack:small") != "prd_of_another_account"


async def test_interrupted_sync_goes_on(redis: Redis, dodo: Dodo, sandbox: SandboxServer) -> None:
    async with httpx.AsyncClient(base_url=sandbox.url) as operator:
        rule = {"path": "/products", "method": "POST", "kinds": ["drop_after"], "count": 1}
        await operator.post("/_sandbox/faults", json=rule)
        with pytest.raises(DodoUnavailable):
            await sync(dodo, redis, CATALOGUE_NOW)
        await sync(dodo, redis, CATALOGUE_NOW)
    tags = [product.tag for product in await dodo.products()]
    assert sorted(tags) == sorted(EVERYTHING - {"meter:charge", "webhook"})
    assert len(await dodo.meters()) == 1


async def test_changed_price_is_reported_only(redis: Redis, dodo: Dodo) -> None:
    await sync(dodo, redis, CATALOGUE_NOW)
    packs = CATALOGUE_NOW.packs
    raised = packs["small"].model_copy(update={"price": 6_000_000_000})
    changed = CATALOGUE_NOW.model_copy(update={"packs": packs | {"small": raised}})
    (drift,) = (await sync(dodo, redis, changed)).drift
    assert (drift.name, drift.what, drift.ours, drift.theirs) == ("pack:small", "cents", "600", "500")
    assert [p.cents for p in await dodo.products() if p.tag == "pack:small"] == [500]


async def test_pack_taken_off_sale_stays_at_dodo(redis: Redis, dodo: Dodo) -> None:
    await sync(dodo, redis, CATALOGUE_NOW)
    fewer = CATALOGUE_NOW.model_copy(update={"packs": {}})
    await sync(dodo, redis, fewer)
    assert "pack:small" in {product.tag for product in await dodo.products()}
    assert await redis.hexists(DODO_IDS, "pack:small"), "a late payment still names it"


async def test_meter_charges_one_nano_as_one_nano(world: World) -> None:
    product = await world.dodo.retrieve_product(await world.product("plan:pro"))
    ((meter),) = product.meters
    assert meter.meter_id == await world.product("meter:charge")
    assert meter.price_per_unit in ("0.0000001", "1E-7")
    assert (meter.free_threshold, product.cents, product.kind) == (0, 2000, "usage_based_price")


async def test_dry_run_makes_nothing(redis: Redis, dodo: Dodo) -> None:
    intended = await plan(dodo, redis, CATALOGUE_NOW, URL)
    assert (set(intended.created), intended.found, intended.webhook_secret) == (EVERYTHING, (), "")
    assert (await dodo.meters(), await dodo.products(), await dodo.webhooks()) == ([], [], [])
    assert await redis.hgetall(DODO_IDS) == {}
    await sync(dodo, redis, CATALOGUE_NOW, URL)
    again = await plan(dodo, redis, CATALOGUE_NOW, URL)
    assert (again.created, set(again.found)) == ((), EVERYTHING)


async def test_dry_run_reports_differences(redis: Redis, dodo: Dodo) -> None:
    await sync(dodo, redis, CATALOGUE_NOW)
    raised = CATALOGUE_NOW.packs["small"].model_copy(update={"price": 9_000_000_000})
    changed = CATALOGUE_NOW.model_copy(update={"packs": {"small": raised}})
    (drift,) = (await plan(dodo, redis, changed)).drift
    assert (drift.name, drift.what, drift.ours, drift.theirs) == ("pack:small", "cents", "900", "500")
