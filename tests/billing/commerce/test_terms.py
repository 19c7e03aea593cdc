"""Who pays a product gets what it sold when it was made, whatever the configuration says by then."""

from billing.catalog.catalog import Catalog
from billing.catalog.terms import Terms
from billing.commerce.products import Products
from billing.commerce.sync import sync
from billing.ledger.admission import funding_for, plan_of
from billing.money import parse_usd
from tests.support.purchases import ACME, USD, balance, refund
from tests.support.world import CATALOG, DAY, World, delivery

PLANS: dict[str, object] = CATALOG["plans"]  # type: ignore[assignment]


def changed(**parts: object) -> Catalog:
    return Catalog.model_validate(CATALOG | parts)


DEAR = changed(packs={"small": {"price": "50", "grants": {"usd": "50"}, "expires_days": 60}})


async def change_catalog(world: World, catalog: Catalog) -> None:
    """As a deployment does: Dodo gets what is new, then the catalog is in force."""
    await sync(world.dodo, world.redis, catalog)
    world.catalog = catalog


async def test_open_checkout_paid_after_a_price_change_grants_the_old_terms(world: World) -> None:
    acme = await world.tenant("acme")
    url = await world.dodo.checkout(acme, await world.product("pack:small"), {}, "http://127.0.0.1/")
    await change_catalog(world, DEAR)
    paid = (await world.operator.post(f"/_sandbox/pay/{url.rpartition('/')[2]}")).json()
    assert paid["total_amount"] == 500
    await world.webhooks().receive(*delivery("payment.succeeded", paid))
    (bucket,) = (await world.ledger.account(ACME)).buckets
    assert (await balance(world), bucket.granted) == (5 * USD, 5 * USD)
    assert bucket.expires_at_ms is not None
    assert bucket.expires_at_ms - world.clock() <= 30 * DAY


async def test_webhook_after_a_price_change_grants_the_old_terms(world: World) -> None:
    await world.tenant("acme")
    paid = await world.buy("acme", "pack:small", quantity=2)
    await change_catalog(world, DEAR)
    await world.webhooks().receive(*delivery("payment.succeeded", paid))
    assert await balance(world) == 10 * USD


async def test_purchase_after_a_price_change_costs_the_new_price(world: World) -> None:
    await world.tenant("acme")
    await change_catalog(world, DEAR)
    paid = await world.buy("acme", "pack:small")
    assert paid["total_amount"] == 5_000
    await world.webhooks().receive(*delivery("payment.succeeded", paid))
    assert await balance(world) == 50 * USD


async def test_pack_off_sale_still_grants_what_was_paid(world: World) -> None:
    await world.tenant("acme")
    paid = await world.buy("acme", "pack:small")
    await change_catalog(world, changed(packs={}))
    await world.webhooks().receive(*delivery("payment.succeeded", paid))
    assert await balance(world) == 5 * USD
    done = await world.webhooks().receive(*delivery("refund.succeeded", await refund(world, paid, 250), "msg_2"))
    assert (done.outcome, await balance(world)) == ("applied", 5 * USD // 2)


async def test_subscriber_keeps_the_allowance_that_was_sold(world: World) -> None:
    """The plan in the configuration changes to $30 for $40; whoever pays $20 a month goes on getting $10."""
    await world.tenant("acme")
    await world.webhooks().receive(*delivery("payment.succeeded", await world.buy("acme", "plan:pro")))
    dearer = {"kind": "subscription", "allowance": {"usd": "40"}, "credit_limit": "50", "monthly_price": "30"}
    await change_catalog(world, changed(plans=PLANS | {"pro": dearer}))
    await world.webhooks().receive(*delivery("subscription.renewed", await subscription_of(world), "msg_2"))
    acme = await world.tenants.get(ACME)
    funding = funding_for(acme, plan_of(acme, world.catalog), world.clock())
    assert acme.subscription is not None
    assert acme.subscription.sold is not None
    assert acme.subscription.sold.price == parse_usd("20")
    assert funding.allowance is not None
    assert funding.allowance.granted == 10 * USD


async def test_new_subscriber_gets_the_new_allowance(world: World) -> None:
    await world.tenant("acme")
    dearer = {"kind": "subscription", "allowance": {"usd": "40"}, "credit_limit": "50", "monthly_price": "30"}
    await change_catalog(world, changed(plans=PLANS | {"pro": dearer}))
    paid = await world.buy("acme", "plan:pro")
    assert paid["total_amount"] == 3_000
    await world.webhooks().receive(*delivery("payment.succeeded", paid))
    acme = await world.tenants.get(ACME)
    funding = funding_for(acme, plan_of(acme, world.catalog), world.clock())
    assert funding.allowance is not None
    assert funding.allowance.granted == 40 * USD


async def test_terms_of_a_product_are_written_once(world: World) -> None:
    products, product = Products(world.redis), await world.product("pack:small")
    before = await products.terms(product)
    await products.add(product, Terms.of_pack("small", DEAR.packs["small"]))
    assert await products.terms(product) == before


async def subscription_of(world: World) -> dict[str, object]:
    acme = await world.tenants.get(ACME)
    assert acme.subscription is not None
    return {"subscription_id": acme.subscription.id}
