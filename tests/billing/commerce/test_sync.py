"""What we sell is made at Dodo once, found again, never deleted; what differs is made anew beside it."""

from typing import Any

import httpx
import pytest
from dodopayments.types.price_param import OneTimePrice
from redis.asyncio import Redis

from billing.catalog.catalog import Catalog
from billing.catalog.publication import publish
from billing.catalog.terms import Terms
from billing.commerce.products import Products, sold
from billing.commerce.sync import Drift, plan, sync
from billing.dodo.client import Dodo
from billing.dodo.errors import DodoUnavailable
from billing.dodo.fields import Wire, WireError
from billing.dodo.wire import DodoProduct
from billing.store.keys import DODO_IDS, PRODUCTS
from cluster.dodo_sandbox.server import SandboxServer
from tests.support.sandbox_world import ONCE
from tests.support.world import API_KEY, CATALOG, SECRET, World

NOW = Catalog.model_validate(CATALOG)
SMALL = Terms.of_pack("small", NOW.packs["small"])
PRO = {"kind": "subscription", "allowance": {"usd": "10"}, "credit_limit": "50", "monthly_price": "20"}
EVERYTHING = {"meter:charge", "pack:small", "pack:calls", "plan:payg", "plan:pro", "webhook"}
URL = "http://127.0.0.1:8000/webhooks/dodo"


def sells_small_at(price: str, usd: str) -> Catalog:
    small = {"price": price, "grants": {"usd": usd}, "expires_days": 30}
    return Catalog.model_validate(CATALOG | {"packs": {"small": small}})


async def as_merchant(sandbox: SandboxServer, method: str, path: str, **body: object) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=sandbox.url, headers={"Authorization": f"Bearer {API_KEY}"}) as client:
        reply = await client.request(method, path, json=body or None)
    reply.raise_for_status()
    return dict(reply.json()) if reply.content else {}


async def test_everything_is_made_once(redis: Redis, dodo: Dodo) -> None:
    first = await sync(dodo, redis, NOW, URL)
    assert (set(first.created), first.found, first.drift) == (EVERYTHING, (), ())
    assert first.webhook_secret == SECRET
    assert SECRET not in repr(first)
    ids = await redis.hgetall(DODO_IDS)
    assert {name.partition("@")[0] for name in ids} == EVERYTHING
    second = await sync(dodo, redis, NOW, URL)
    assert (second.created, set(second.found), second.drift) == ((), EVERYTHING, ())
    assert await redis.hgetall(DODO_IDS) == ids


async def test_lost_ids_are_found_at_dodo(redis: Redis, dodo: Dodo) -> None:
    await sync(dodo, redis, NOW, URL)
    ids = await redis.hgetall(DODO_IDS)
    await redis.delete(DODO_IDS, PRODUCTS)
    assert (await sync(dodo, redis, NOW, URL)).created == ()
    assert await redis.hgetall(DODO_IDS) == ids


async def test_product_missing_at_dodo_is_made_again(redis: Redis, dodo: Dodo) -> None:
    products = Products(redis)
    await products.add("prd_of_another_account", SMALL)
    assert "pack:small" in (await sync(dodo, redis, NOW)).created
    assert await products.id_for(SMALL) not in ("", "prd_of_another_account")


async def test_interrupted_sync_goes_on(redis: Redis, dodo: Dodo, sandbox: SandboxServer) -> None:
    async with httpx.AsyncClient(base_url=sandbox.url) as operator:
        rule = {"path": "/products", "method": "POST", "kinds": ["drop_after"], "count": 1}
        await operator.post("/_sandbox/faults", json=rule)
        with pytest.raises(DodoUnavailable):
            await sync(dodo, redis, NOW)
        await sync(dodo, redis, NOW)
    tags = [product.tag.partition("@")[0] for product in await dodo.products()]
    assert sorted(tags) == sorted(EVERYTHING - {"meter:charge", "webhook"})
    assert len(await dodo.meters()) == 1


async def test_changed_price_is_a_new_product(redis: Redis, dodo: Dodo) -> None:
    await sync(dodo, redis, NOW)
    await publish(redis, NOW, "gateway", 0)
    old, products = await Products(redis).id_for(SMALL), Products(redis)
    changed = sells_small_at("50", "50")
    raised = Terms.of_pack("small", changed.packs["small"])
    planned = await plan(dodo, redis, changed)
    done = await sync(dodo, redis, changed)
    assert planned.created == done.created == ("pack:small",)
    differences = (("price", "$50.00", "$5.00"), ("grants", "$50.00", "$5.00"))
    assert planned.drift == done.drift == tuple(Drift("pack:small", *one) for one in differences)
    new = await products.id_for(raised)
    assert new not in ("", old)
    assert [(await dodo.retrieve_product(one)).cents for one in (old, new)] == [500, 5000]
    assert (await products.terms(old), await products.terms(new)) == (SMALL, raised)
    assert (await sync(dodo, redis, changed)).created == ()
    assert (await sync(dodo, redis, NOW)).created == (), "the old terms have their product"
    assert await products.id_for(SMALL) == old


async def test_changed_grant_is_a_new_product(redis: Redis, dodo: Dodo) -> None:
    await sync(dodo, redis, NOW)
    assert (await sync(dodo, redis, sells_small_at("5", "6"))).created == ("pack:small",)
    assert sorted(p.cents for p in await dodo.products() if p.tag.startswith("pack:small@")) == [500, 500]


async def test_changed_monthly_price_is_a_new_product(redis: Redis, dodo: Dodo) -> None:
    await sync(dodo, redis, NOW)
    dearer = Catalog.model_validate(CATALOG | {"plans": CATALOG["plans"] | {"pro": PRO | {"monthly_price": "30"}}})
    assert (await sync(dodo, redis, dearer)).created == ("plan:pro",)


@pytest.mark.parametrize(
    ("name", "price", "what", "theirs"),
    [
        ("pack:small", {"price": 50}, "price", "$0.50"),
        ("pack:small", {"price": 500, "currency": "EUR"}, "price", "500 minor units of EUR"),
        ("plan:pro", {"fixed_price": 100}, "price", "$1.00"),
    ],
)
async def test_price_changed_at_dodo_is_a_new_product(
    redis: Redis, dodo: Dodo, sandbox: SandboxServer, name: str, price: dict[str, object], what: str, theirs: str
) -> None:
    """What the merchant changed in Dodo's dashboard is never sold from here again."""
    await sync(dodo, redis, NOW)
    terms = next(terms for terms in sold(NOW) if terms.name == name)
    old = await Products(redis).id_for(terms)
    there = (await as_merchant(sandbox, "GET", f"/products/{old}"))["price"]
    await as_merchant(sandbox, "PATCH", f"/products/{old}", price=there | price)
    done = await sync(dodo, redis, NOW)
    assert done.created == (name,)
    assert [(one.what, one.theirs) for one in done.drift] == [(what, theirs)]
    assert await Products(redis).id_for(terms) not in ("", old)
    assert (await sync(dodo, redis, NOW)).created == ()


async def test_product_of_another_kind_stops_no_sync(redis: Redis, dodo: Dodo, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merchant sells something else there, of a form that is none of ours."""
    other = await dodo.create_product("", "My e-book", OneTimePrice(**ONCE, price=900))  # type: ignore[typeddict-item]
    read = DodoProduct.read

    def strict(wire: Wire) -> DodoProduct:
        if wire["product_id"] == other.id:
            raise WireError("price is no number")
        return read(wire)

    monkeypatch.setattr(DodoProduct, "read", strict)
    assert "pack:small" in (await sync(dodo, redis, NOW)).created


async def test_pack_taken_off_sale_stays_at_dodo(redis: Redis, dodo: Dodo) -> None:
    await sync(dodo, redis, NOW)
    fewer = NOW.model_copy(update={"packs": {}})
    await sync(dodo, redis, fewer)
    assert SMALL.key in {product.tag for product in await dodo.products()}
    assert await Products(redis).id_for(SMALL), "a late payment still names it"


async def test_meter_charges_one_nano_as_one_nano(world: World) -> None:
    product = await world.dodo.retrieve_product(await world.product("plan:pro"))
    ((meter),) = product.meters
    assert meter.meter_id == await world.product("meter:charge")
    assert meter.price_per_unit in ("0.0000001", "1E-7")
    assert (meter.free_threshold, product.cents, product.kind) == (0, 2000, "usage_based_price")


async def test_dry_run_makes_nothing(redis: Redis, dodo: Dodo) -> None:
    intended = await plan(dodo, redis, NOW, URL)
    assert (set(intended.created), intended.found, intended.webhook_secret) == (EVERYTHING, (), "")
    assert (await dodo.meters(), await dodo.products(), await dodo.webhooks()) == ([], [], [])
    assert await redis.hgetall(DODO_IDS) == {}
    await sync(dodo, redis, NOW, URL)
    again = await plan(dodo, redis, NOW, URL)
    assert (again.created, set(again.found)) == ((), EVERYTHING)


async def test_dry_run_reports_differences(redis: Redis, dodo: Dodo) -> None:
    await sync(dodo, redis, NOW)
    await publish(redis, NOW, "gateway", 0)
    raised = NOW.packs["small"].model_copy(update={"price": 9_000_000_000})
    changed = NOW.model_copy(update={"packs": {"small": raised}})
    (drift,) = (await plan(dodo, redis, changed)).drift
    assert (drift.name, drift.what, drift.ours, drift.theirs) == ("pack:small", "price", "$9.00", "$5.00")
