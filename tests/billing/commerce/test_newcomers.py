"""Who buys by a payment link has a working key and credit at once, in any order of webhooks and after any kill."""

import asyncio
import random

import pytest

from billing.catalog.catalog import Catalog
from billing.commerce.inbox import Outcome
from billing.commerce.licences import ENTITLEMENT
from billing.commerce.signups import Signups, tenant_id_for
from billing.commerce.sync import sync
from billing.store.keys import CUSTOMER_TENANTS, DODO_IDS
from billing.tenants import directory
from billing.tenants.directory import Tenants
from billing.tenants.tenant import Tenant
from billing.usage import TenantId
from tests.support.kills import killed_before
from tests.support.purchases import AUTH, USD, balance, buy_as_stranger
from tests.support.world import CATALOG, World, delivery

BUYERS = 16


@pytest.fixture
async def shop(world: World) -> World:
    """A shop with a pack that hands out a licence key."""
    keyed = {"price": "5", "grants": {"usd": "5"}, "licence_key": True}
    world.catalog = Catalog.model_validate(CATALOG | {"packs": {"keyed": keyed}})
    await sync(world.dodo, world.redis, world.catalog)
    return world


async def grants(world: World) -> list[dict[str, object]]:
    listed = await world.operator.get(
        f"/entitlements/{await world.product(ENTITLEMENT)}/grants?page_size=100", headers=AUTH
    )
    found: list[dict[str, object]] = listed.raise_for_status().json()["items"]
    return found


def customer_of(payment: dict[str, object]) -> str:
    return str(payment["customer"]["customer_id"])  # type: ignore[index]


@pytest.mark.parametrize("seed", range(3))
async def test_concurrent_newcomers_have_key_and_credit_at_once(shop: World, seed: int) -> None:
    payments = [await buy_as_stranger(shop, "pack:keyed", f"buyer{number}@example.com") for number in range(BUYERS)]
    events = [("payment.succeeded", payment, f"msg_{payment['payment_id']}") for payment in payments]
    for grant in await grants(shop):
        events += [
            (f"entitlement_grant.{name}", grant, f"msg_{grant['id']}_{name}") for name in ("created", "delivered")
        ]
    signed = [delivery(*event) for event in events]
    random.Random(seed).shuffle(signed)
    gateways = [shop.webhooks(), shop.webhooks()]
    done = await asyncio.gather(*(gateways[n % 2].receive(*one) for n, one in enumerate(signed)))
    assert {one.outcome for one in done} == {Outcome.APPLIED}, [one.reason for one in done]
    for grant in await grants(shop):
        principal = await Tenants(shop.redis, shop.clock).principal(str(grant["license_key"]["key"]))  # type: ignore[index]
        assert principal.tenant.dodo_customer_id == grant["customer_id"]
        assert await balance(shop, principal.tenant.id) == 5 * USD
    assert len(await shop.tenants.list()) == BUYERS


@pytest.mark.parametrize("number", range(4))
async def test_newcomer_killed_anywhere_is_completed(shop: World, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    payment = await buy_as_stranger(shop, "pack:keyed")
    signups = Signups(shop.commerce())
    was_killed = await killed_before(monkeypatch, number, signups.tenant_of(customer_of(payment)), directory)
    assert was_killed == (number < 3), "it writes three times"
    assert (await shop.webhooks().receive(*delivery("payment.succeeded", payment))).outcome is Outcome.APPLIED
    (tenant,) = await shop.tenants.list()
    assert tenant.dodo_customer_id == customer_of(payment)
    assert await balance(shop, tenant.id) == 5 * USD
    assert await shop.tenants.customers_wanted() == []


async def test_newcomer_that_was_begun_under_another_id_keeps_that(shop: World) -> None:
    """What a kill leaves, from before the customer changed its email."""
    payment = await buy_as_stranger(shop, "pack:keyed")
    await shop.redis.hset(CUSTOMER_TENANTS, customer_of(payment), "begun-1")
    done = await shop.webhooks().receive(*delivery("payment.succeeded", payment))
    assert done.outcome is Outcome.APPLIED
    assert [tenant.id for tenant in await shop.tenants.list()] == ["begun-1"]
    assert await balance(shop, TenantId("begun-1")) == 5 * USD


async def test_newcomer_whose_id_is_taken_gets_another(shop: World) -> None:
    payment = await buy_as_stranger(shop, "pack:keyed")
    taken = tenant_id_for("Ada.L@example.com", customer_of(payment))
    await shop.tenants.create(Tenant(id=taken, email="other@example.com", plan="prepaid"))
    assert (await shop.webhooks().receive(*delivery("payment.succeeded", payment))).outcome is Outcome.APPLIED
    tenant = await shop.tenants.by_customer(customer_of(payment))
    assert tenant is not None
    assert (tenant.id != taken, tenant.email) == (True, "Ada.L@example.com")
    assert (await balance(shop, taken), await balance(shop, tenant.id)) == (0, 5 * USD)


async def test_key_ahead_of_our_own_sync_waits(shop: World) -> None:
    payment = await buy_as_stranger(shop, "pack:keyed")
    (grant,) = await grants(shop)
    await shop.redis.hdel(DODO_IDS, ENTITLEMENT)
    waiting = await shop.webhooks().receive(*delivery("entitlement_grant.delivered", grant))
    assert (waiting.outcome, "farebox dodo sync" in waiting.reason) == (Outcome.WAITING, True)
    await sync(shop.dodo, shop.redis, shop.catalog)
    shop.clock.move(60_000)
    assert await shop.webhooks().replay(shop.sweep()) == 1
    assert await Tenants(shop.redis, shop.clock).principal(str(grant["license_key"]["key"]))  # type: ignore[index]
    assert customer_of(payment) == grant["customer_id"]
