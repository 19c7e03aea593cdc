"""Offers, checkout, Dodo's portal and invoices of a tenant."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from redis.asyncio import Redis

from billing.commerce.sync import sync
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.tenants.tenant import Subscription, SubscriptionStatus
from billing.usage import TenantId
from cluster.dodo_sandbox.server import SandboxServer
from tests.support.gateway import USER_CONFIG, Harness, assert_problem, bearer

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
async def shop(harness: Harness, sandbox: SandboxServer, redis: Redis) -> AsyncIterator[Harness]:
    """A gateway with hidden offers, and a Dodo that has all products."""
    harness.gateway.parts.catalog_holder.put(USER_CONFIG | HIDDEN)
    dodo = Dodo(DodoSettings("key", SECRET, base_url=sandbox.url))
    await sync(dodo, redis, harness.gateway.parts.catalog_holder.current)
    use(harness, dodo)
    yield harness
    await dodo.close()


def use(harness: Harness, dodo: Dodo) -> None:
    harness.gateway.parts = replace(harness.gateway.parts, dodo=dodo)


async def customer(harness: Harness, name: str = "acme") -> str:
    """A tenant that is a customer at Dodo; its API key."""
    key = await harness.tenant(name)
    parts = harness.gateway.parts
    assert parts.dodo is not None
    tenant = await parts.tenants.get(TenantId(name))
    await parts.tenants.set_customer(tenant.id, await parts.dodo.create_customer(tenant))
    return key


def of_arm(harness: Harness, arm: str) -> str:
    [experiment] = harness.gateway.parts.catalog_holder.current.pricing.experiments
    return next(name for name in (f"t{n}" for n in range(100)) if experiment.arm_of(TenantId(name)).id == arm)


async def get(harness: Harness, path: str, key: str) -> dict[str, object]:
    reply = await harness.client.get(path, headers=bearer(key))
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def test_offer_shows_price_grants_and_how_to_buy(shop: Harness) -> None:
    offers = await get(shop, "/v1/offers", await customer(shop, of_arm(shop, "control")))
    packs = {pack["id"]: pack for pack in offers["packs"]}  # type: ignore[attr-defined]
    assert set(packs) == {"small", "calls"}
    assert packs["calls"] == {
        "id": "calls",
        "price_usd": "7.000000",
        "grants": {"unit": "requests", "amount": 9, "adapters": ["pirate"]},
        "expires_days": None,
        "licence_key": False,
        "buy": {"method": "POST", "url": shop.gateway.config.checkout_url, "body": {"pack": "calls"}},
    }
    assert packs["small"]["grants"] == {"unit": "usd", "amount": "5.000000", "adapters": []}
    [plan] = offers["plans"]  # type: ignore[misc]
    assert (plan["id"], plan["overage_cap_usd"], plan["grants"]) == ("payg", "5.000000", None)  # type: ignore[index]
    assert offers["subscribed_to"] is None


async def test_offer_can_be_bought_as_shown(shop: Harness) -> None:
    key = await customer(shop, of_arm(shop, "trial"))
    offers = await get(shop, "/v1/offers", key)
    listed = [*offers["packs"], *offers["plans"]]  # type: ignore[misc]
    assert {one["id"] for one in listed} == {"small", "calls", "trial", "payg", "club"}
    for one in listed:
        reply = await shop.post(key, "/v1/checkout", **one["buy"]["body"])
        assert reply.status_code == 200, reply.text
        assert reply.json()["checkout_url"].startswith("http")


async def test_hidden_offer_not_sold_to_other_arm(shop: Harness) -> None:
    key = await customer(shop, of_arm(shop, "control"))
    for body in ({"pack": "trial"}, {"plan": "club"}):
        refused = await shop.post(key, "/v1/checkout", **body)
        assert_problem(refused, 404, "not_found")
        names = refused.json()["error"]["message"].rpartition(": ")[2]
        assert names in ("calls, small", "payg"), "the error does not name hidden offers"
    refill = {"pack": "trial", "threshold_usd": "1", "monthly_cap_usd": "20"}
    assert_problem(
        await shop.client.put("/v1/account/auto-refill", json=refill, headers=bearer(key)), 400, "invalid_request"
    )


async def test_subscriber_is_offered_a_change_of_plan(shop: Harness) -> None:
    name = of_arm(shop, "control")
    key = await customer(shop, name)
    (plan,) = (await get(shop, "/v1/offers", key))["plans"]
    assert (plan["id"], plan["buy"]["url"].rpartition("/v1")[2]) == ("payg", "/checkout")
    live = Subscription(id="s", plan="pro", status=SubscriptionStatus.ACTIVE, period_start_ms=0, period_end_ms=1)
    await shop.gateway.parts.tenants.update(TenantId(name), lambda t: t.model_copy(update={"subscription": live}))
    shop.gateway.parts.tenants._seen.clear()
    offers = await get(shop, "/v1/offers", key)
    (plan,) = offers["plans"]
    assert (plan["buy"]["url"].rpartition("/v1")[2], plan["buy"]["body"]) == ("/plan", {"plan": "payg"})
    assert offers["subscribed_to"] == "pro"
    assert_problem(await shop.post(key, "/v1/checkout", plan="payg"), 409, "conflict")


async def test_portal_belongs_to_tenant(shop: Harness, sandbox: SandboxServer) -> None:
    key = await customer(shop)
    await customer(shop, "other")
    made = await shop.post(key, "/v1/portal")
    assert made.status_code == 200, made.text
    async with httpx.AsyncClient(trust_env=False) as browser:
        page = await browser.get(made.json()["url"])
    assert "acme@example.com" in page.text
    assert "other@example.com" not in page.text


async def pay(shop: Harness, sandbox: SandboxServer, key: str, declined: bool = False) -> None:
    session = (await shop.post(key, "/v1/checkout", pack="small")).json()["session_id"]
    body = {"decline": True} if declined else {}
    async with httpx.AsyncClient(base_url=sandbox.url, trust_env=False) as buyer:
        (await buyer.post(f"/_sandbox/pay/{session}", json=body)).raise_for_status()


async def test_invoices_are_paged(shop: Harness, sandbox: SandboxServer) -> None:
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


async def test_no_invoices_without_payment(shop: Harness) -> None:
    found = await get(shop, "/v1/invoices", await customer(shop))
    assert (found["data"], found["next_page"]) == ([], None)


@pytest.mark.parametrize("query", ["page=-1", "page=x", "limit=0", "limit=101", "page=1001"])
async def test_page_refused_when_out_of_bounds(harness: Harness, query: str) -> None:
    reply = await harness.client.get(f"/v1/invoices?{query}", headers=bearer(await harness.tenant()))
    assert_problem(reply, 400, "invalid_request")


async def at_dodo(harness: Harness, key: str) -> list[httpx.Response]:
    return [await harness.post(key, "/v1/portal"), await harness.client.get("/v1/invoices", headers=bearer(key))]


async def test_portal_unavailable_before_customer_exists(shop: Harness) -> None:
    for reply in await at_dodo(shop, await shop.tenant()):
        assert_problem(reply, 503, "payments_unavailable")
        assert "still being made" in reply.json()["detail"]
        assert reply.headers["retry-after"]


async def test_portal_unavailable_without_payments(harness: Harness) -> None:
    for reply in await at_dodo(harness, await harness.tenant()):
        assert_problem(reply, 503, "payments_unavailable")
        assert "operator" in reply.json()["detail"]


async def test_offers_shown_while_dodo_is_away(shop: Harness) -> None:
    key = await customer(shop)
    away = Dodo(DodoSettings("key", base_url="http://127.0.0.1:9"))
    use(shop, away)
    for reply in await at_dodo(shop, key):
        assert_problem(reply, 503, "payments_unavailable")
    assert (await get(shop, "/v1/offers", key))["packs"]
    await away.close()


async def test_portal_refused_for_unknown_customer(shop: Harness) -> None:
    key = await shop.tenant()
    await shop.gateway.parts.tenants.set_customer(TenantId("acme"), "cus_unknown")
    assert_problem(await shop.post(key, "/v1/portal"), 502, "payments_refused")


async def test_shop_refused_without_key(harness: Harness) -> None:
    for method, path in (("GET", "offers"), ("GET", "invoices"), ("POST", "portal")):
        assert_problem(await harness.client.request(method, f"/v1/{path}"), 401, "invalid_api_key")


async def test_dropped_plan_stays_with_its_tenants(harness: Harness) -> None:
    key = await harness.tenant(usd="0", plan="free")
    plans = {name: plan for name, plan in USER_CONFIG["plans"].items() if name != "free"}  # type: ignore[attr-defined]
    harness.gateway.parts.catalog_holder.put(USER_CONFIG | {"plans": plans})
    account = await get(harness, "/v1/account", key)
    assert (account["plan"], account["plan_kind"], account["balance_usd"]) == ("free", "free", "1.000000")
    for _ in range(2):
        assert (await harness.chat(key)).status_code == 200
    assert harness.gateway.parts.catalog_holder.current.content_hash
    assert "free" not in harness.gateway.parts.catalog_holder.current.plans, "no new tenant gets it"


async def test_plan_of_earlier_process_is_remembered(harness: Harness) -> None:
    catalog_holder = harness.gateway.parts.catalog_holder
    gone = catalog_holder.current.plans["free"]
    catalog_holder.remember({"legacy": gone})
    assert (catalog_holder.current.plan_named("legacy"), set(catalog_holder.current.retired)) == (gone, {"legacy"})
    back = {"legacy": {"kind": "prepaid"}}
    catalog_holder.put(USER_CONFIG | {"plans": USER_CONFIG["plans"] | back})  # type: ignore[operator]
    assert not catalog_holder.current.retired
    assert catalog_holder.current.plan_named("legacy") == catalog_holder.current.plans["legacy"]
