"""A tenant sees what it may buy and how, reaches Dodo's portal and its invoices; nothing hidden is sold to others."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from deployments.gateway.services import Services
from redis.asyncio import Redis

from billing.commerce.sync import sync
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.tenants.tenant import Subscription, SubscriptionStatus
from billing.usage import TenantId
from cluster.dodo_sandbox.server import SandboxServer
from tests.deployments.gateway.api.test_refusals import check
from tests.support.gateway import USER_CONFIG, House, bearer

SECRET = "whsec_" + "c2VjcmV0" * 4
HIDDEN: dict[str, object] = {
    "plans": {
        **USER_CONFIG["plans"],  # type: ignore[dict-item]
        "club": {"kind": "subscription", "monthly_price": "9", "allowance": {"requests": 10}, "visibility": "hidden"},
    },
    "packs": {
        "small": {"price": "5.00", "grants": {"usd": "5.00"}},
        "calls": {"price": "7.00", "grants": {"requests": 9, "adapters": ["pirate"]}, "expires_days": None},
        "trial": {"price": "1.00", "grants": {"usd": "2.00"}, "visibility": "hidden"},
    },
    "pricing": {
        "experiments": [
            {"id": "trial", "arms": [{"id": "control"}, {"id": "trial", "packs": ["trial"], "plans": ["club"]}]}
        ]
    },
}


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[SandboxServer]:
    with SandboxServer(tmp_path / "dodo", "key", webhook_secret=SECRET) as server:
        yield server


@pytest.fixture
async def shop(house: House, sandbox: SandboxServer, redis: Redis) -> AsyncIterator[House]:
    """A gateway with hidden offers, and a Dodo that knows all of them."""
    house.services.gateway.catalog_holder.put(USER_CONFIG | HIDDEN)
    dodo = Dodo(DodoSettings("key", SECRET, base_url=sandbox.url))
    await sync(dodo, redis, house.services.gateway.catalog_holder.current)
    use(house, dodo)
    yield house
    await dodo.close()


def use(house: House, dodo: Dodo) -> None:
    parts = {name: getattr(house.services, name) for name in Services.__slots__} | {"dodo": dodo}
    house.app._app.state.services = Services(**parts)  # type: ignore[attr-defined]


async def customer(house: House, name: str = "acme") -> str:
    """A tenant that Dodo knows; its API key."""
    key = await house.tenant(name)
    services: Services = house.app._app.state.services  # type: ignore[attr-defined]
    assert services.dodo is not None
    tenant = await services.tenants.get(TenantId(name))
    await services.tenants.set_customer(tenant.id, await services.dodo.create_customer(tenant))
    return key


def of_arm(house: House, arm: str) -> str:
    [experiment] = house.services.gateway.catalog_holder.current.pricing.experiments
    return next(name for name in (f"t{n}" for n in range(100)) if experiment.arm_of(TenantId(name)).id == arm)


async def get(house: House, path: str, key: str) -> dict[str, object]:
    reply = await house.client.get(path, headers=bearer(key))
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def test_an_offer_says_price_grants_expiry_and_how_to_buy(shop: House) -> None:
    offers = await get(shop, "/v1/offers", await customer(shop, of_arm(shop, "control")))
    packs = {pack["id"]: pack for pack in offers["packs"]}  # type: ignore[attr-defined]
    assert set(packs) == {"small", "calls"}
    assert packs["calls"] == {
        "id": "calls",
        "price_usd": "7.000000",
        "grants": {"unit": "requests", "amount": 9, "adapters": ["pirate"]},
        "expires_days": None,
        "licence_key": False,
        "buy": {"method": "POST", "url": shop.services.top_up_url, "body": {"pack": "calls"}},
    }
    assert packs["small"]["grants"] == {"unit": "usd", "amount": "5.000000", "adapters": []}
    [plan] = offers["plans"]  # type: ignore[misc]
    assert (plan["id"], plan["overage_cap_usd"], plan["grants"]) == ("payg", "5.000000", None)  # type: ignore[index]
    assert offers["subscribed_to"] is None


async def test_every_offer_can_be_bought_as_it_says(shop: House) -> None:
    key = await customer(shop, of_arm(shop, "trial"))
    offers = await get(shop, "/v1/offers", key)
    listed = [*offers["packs"], *offers["plans"]]  # type: ignore[misc]
    assert {one["id"] for one in listed} == {"small", "calls", "trial", "payg", "club"}
    for one in listed:
        reply = await shop.post(key, "/v1/checkout", **one["buy"]["body"])
        assert reply.status_code == 200, reply.text
        assert reply.json()["checkout_url"].startswith("http")


async def test_what_is_hidden_is_neither_shown_nor_sold_to_another_arm(shop: House) -> None:
    key = await customer(shop, of_arm(shop, "control"))
    for body in ({"pack": "trial"}, {"plan": "club"}):
        refused = await shop.post(key, "/v1/checkout", **body)
        check(refused, 404, "not_found")
        names = refused.json()["error"]["message"].rpartition(": ")[2]
        assert names in ("calls, small", "payg"), "what is hidden is not told either"
    refill = {"pack": "trial", "threshold_usd": "1", "monthly_cap_usd": "20"}
    check(await shop.client.put("/v1/account/auto-refill", json=refill, headers=bearer(key)), 400, "invalid_request")


async def test_who_has_a_subscription_is_offered_no_second_one(shop: House) -> None:
    name = of_arm(shop, "control")
    key = await customer(shop, name)
    live = Subscription(id="s", plan="payg", status=SubscriptionStatus.ACTIVE, period_start_ms=0, period_end_ms=1)
    await shop.services.tenants.update(TenantId(name), lambda t: t.model_copy(update={"subscription": live}))
    shop.services.tenants._seen.clear()
    offers = await get(shop, "/v1/offers", key)
    assert (offers["plans"], offers["subscribed_to"]) == ([], "payg")
    check(await shop.post(key, "/v1/checkout", plan="payg"), 409, "conflict")


async def test_the_portal_is_the_tenants_own(shop: House, sandbox: SandboxServer) -> None:
    key = await customer(shop)
    await customer(shop, "other")
    made = await shop.post(key, "/v1/portal")
    assert made.status_code == 200, made.text
    async with httpx.AsyncClient(trust_env=False) as browser:
        page = await browser.get(made.json()["url"])
    assert "acme@example.com" in page.text
    assert "other@example.com" not in page.text


async def pay(shop: House, sandbox: SandboxServer, key: str, declined: bool = False) -> None:
    session = (await shop.post(key, "/v1/checkout", pack="small")).json()["session_id"]
    body = {"decline": True} if declined else {}
    async with httpx.AsyncClient(base_url=sandbox.url, trust_env=False) as buyer:
        (await buyer.post(f"/_sandbox/pay/{session}", json=body)).raise_for_status()


async def test_invoices_come_in_pages_each_payment_once(shop: House, sandbox: SandboxServer) -> None:
    key, other = await customer(shop), await customer(shop, "other")
    await pay(shop, sandbox, other)
    for declined in (False, True, False, False, False):
        await pay(shop, sandbox, key, declined)
    seen: list[dict[str, object]] = []
    page: object = 0
    while page is not None:
        found = await get(shop, f"/v1/invoices?limit=2&page={page}", key)
        seen += found["data"]  # type: ignore[operator]
        page = found["next_page"]
    assert len({one["payment_id"] for one in seen}) == len(seen) == 5
    assert sorted(str(one["status"]) for one in seen) == ["failed"] + ["succeeded"] * 4
    for one in seen:
        assert (one["product"], one["currency"], one["total_amount"]) == ("pack:small", "USD", 500)
        assert bool(one["invoice_url"]) == bool(one["invoice_id"]) == (one["status"] == "succeeded")


async def test_who_has_bought_nothing_has_no_invoice(shop: House) -> None:
    found = await get(shop, "/v1/invoices", await customer(shop))
    assert (found["data"], found["next_page"]) == ([], None)


@pytest.mark.parametrize("query", ["page=-1", "page=x", "limit=0", "limit=101", "page=1001"])
async def test_a_page_that_is_none_is_refused(house: House, query: str) -> None:
    reply = await house.client.get(f"/v1/invoices?{query}", headers=bearer(await house.tenant()))
    check(reply, 400, "invalid_request")


async def at_dodo(house: House, key: str) -> list[httpx.Response]:
    return [await house.post(key, "/v1/portal"), await house.client.get("/v1/invoices", headers=bearer(key))]


async def test_without_a_customer_yet_the_tenant_is_told_to_wait(shop: House) -> None:
    for reply in await at_dodo(shop, await shop.tenant()):
        check(reply, 503, "payments_unavailable")
        assert "still being made" in reply.json()["detail"]
        assert reply.headers["retry-after"]


async def test_without_payments_the_tenant_is_told_whom_to_ask(house: House) -> None:
    for reply in await at_dodo(house, await house.tenant()):
        check(reply, 503, "payments_unavailable")
        assert "operator" in reply.json()["detail"]


async def test_while_dodo_is_away_offers_are_still_shown(shop: House) -> None:
    key = await customer(shop)
    away = Dodo(DodoSettings("key", base_url="http://127.0.0.1:9"))
    use(shop, away)
    for reply in await at_dodo(shop, key):
        check(reply, 503, "payments_unavailable")
    assert (await get(shop, "/v1/offers", key))["packs"]
    await away.close()


async def test_a_customer_that_dodo_does_not_know_is_told_as_its_refusal(shop: House) -> None:
    key = await shop.tenant()
    await shop.services.tenants.set_customer(TenantId("acme"), "cus_nobody")
    check(await shop.post(key, "/v1/portal"), 502, "payments_refused")


async def test_nobody_shops_without_a_key(house: House) -> None:
    for method, path in (("GET", "offers"), ("GET", "invoices"), ("POST", "portal")):
        check(await house.client.request(method, f"/v1/{path}"), 401, "invalid_api_key")


async def test_a_tenant_of_a_dropped_plan_keeps_its_terms(house: House) -> None:
    """It used to fall to the default plan, and its requests to 402, without a word to anybody."""
    key = await house.tenant(usd="0", plan="free")
    plans = {name: plan for name, plan in USER_CONFIG["plans"].items() if name != "free"}  # type: ignore[attr-defined]
    house.services.gateway.catalog_holder.put(USER_CONFIG | {"plans": plans})
    account = await get(house, "/v1/account", key)
    assert (account["plan"], account["plan_kind"], account["balance_usd"]) == ("free", "free", "1.000000")
    for _ in range(2):
        assert (await house.chat(key)).status_code == 200
    assert house.services.gateway.catalog_holder.current.content_hash
    assert "free" not in house.services.gateway.catalog_holder.current.plans, "nobody new gets it"


async def test_a_plan_from_before_this_process_is_kept_and_its_return_ends_that(house: House) -> None:
    catalog_holder = house.services.gateway.catalog_holder
    gone = catalog_holder.current.plans["free"]
    catalog_holder.remember({"legacy": gone})
    assert (catalog_holder.current.plan_named("legacy"), set(catalog_holder.current.retired)) == (gone, {"legacy"})
    back = {"legacy": {"kind": "prepaid"}}
    catalog_holder.put(USER_CONFIG | {"plans": USER_CONFIG["plans"] | back})  # type: ignore[operator]
    assert not catalog_holder.current.retired
    assert catalog_holder.current.plan_named("legacy") == catalog_holder.current.plans["legacy"]
