"""Plan changes over the API, by a buyer and by the operator."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from billing.catalog.catalog import Catalog
from billing.commerce.context import Commerce
from billing.commerce.subscriptions import Subscriptions
from billing.commerce.sync import sync
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.ledger.account import Adjustment
from billing.money import parse_usd
from billing.tenants.tenant import Tenant, new_key
from billing.usage import TenantId, Unit
from cluster.dodo_sandbox.server import SandboxServer
from tests.support.gateway import ADMIN_KEY, USER_CONFIG, Harness, assert_problem, bearer

PLANS: dict[str, object] = {
    "plans": {
        **USER_CONFIG["plans"],  # type: ignore[dict-item]
        "pro": {"kind": "subscription", "monthly_price": "20", "allowance": {"usd": "25"}, "credit_limit": "5"},
        "team": {"kind": "subscription", "monthly_price": "50", "allowance": {"usd": "70"}, "credit_limit": "5"},
        "club": {"kind": "subscription", "monthly_price": "9", "allowance": {"usd": "9"}, "visibility": "hidden"},
    }
}


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[SandboxServer]:
    with SandboxServer(tmp_path / "dodo", "key", webhook_secret="whsec_" + "c2VjcmV0" * 4) as server:
        yield server


@pytest.fixture
async def shop(harness: Harness, sandbox: SandboxServer, redis: Redis) -> AsyncIterator[Harness]:
    """A gateway that sells plans, and a Dodo that has their products."""
    harness.gateway.parts.catalog_holder.put(USER_CONFIG | PLANS)
    dodo = Dodo(DodoSettings("key", base_url=sandbox.url))
    await sync(dodo, redis, harness.gateway.parts.catalog_holder.current)
    harness.gateway.parts = replace(harness.gateway.parts, dodo=dodo)
    yield harness
    await dodo.close()


async def subscriber(harness: Harness, sandbox: SandboxServer, plan: str = "") -> str:
    """A tenant with a subscription to ``plan``, if one is named; its API key."""
    key, parts = await harness.tenant("acme"), harness.gateway.parts
    assert parts.dodo is not None
    tenant = await parts.tenants.get(TenantId("acme"))
    await parts.tenants.set_customer(tenant.id, await parts.dodo.create_customer(tenant))
    if plan:
        page = (await harness.post(key, "/v1/checkout", plan=plan)).json()
        async with httpx.AsyncClient(base_url=sandbox.url, trust_env=False) as dodo:
            paid = (await dodo.post(f"/_sandbox/pay/{page['session_id']}")).raise_for_status().json()

        async def catalog() -> Catalog:
            return parts.catalog_holder.current

        commerce = Commerce(parts.redis, parts.dodo, parts.ledger, parts.tenants, catalog)
        await Subscriptions(commerce).refresh(paid["subscription_id"])
    return key


async def refresh(harness: Harness) -> None:
    """As Dodo's webhook of a subscription that changed."""
    parts, one = harness.gateway.parts, (await stored(harness)).subscription
    assert parts.dodo is not None
    assert one is not None

    async def catalog() -> Catalog:
        return parts.catalog_holder.current

    commerce = Commerce(parts.redis, parts.dodo, parts.ledger, parts.tenants, catalog)
    await Subscriptions(commerce).refresh(one.id)


async def account(harness: Harness) -> dict[str, Any]:
    """The account, asked for with a key that the gateway has not seen."""
    secret, key = new_key(TenantId("acme"), 0)
    await harness.gateway.parts.tenants.add_key(key)
    return dict((await harness.client.get("/v1/account", headers=bearer(secret))).json())


async def stored(harness: Harness) -> Tenant:
    return await harness.gateway.parts.tenants.get(TenantId("acme"))


async def preview(harness: Harness, key: str, plan: str) -> httpx.Response:
    return await harness.client.get("/v1/plan/preview", params={"plan": plan}, headers=bearer(key))


async def test_buyer_upgrades_after_a_preview(shop: Harness, sandbox: SandboxServer) -> None:
    key = await subscriber(shop, sandbox, "pro")
    shown = (await preview(shop, key, "team")).json()
    assert (shown["object"], shown["plan"], shown["currency"]) == ("plan_preview", "team", "USD")
    assert 3_000 <= shown["total_amount"] <= 3_010, "$50 less what is left of the month's $20"
    assert (await stored(shop)).plan == "pro"
    made = await shop.post(key, "/v1/plan", plan="team")
    assert made.status_code == 200, made.text
    assert (made.json()["object"], made.json()["state"]) == ("plan_change", "changed")
    assert (await stored(shop)).plan == "team"
    again = (await shop.post(key, "/v1/plan", plan="team")).json()
    assert (again["state"], again["payment_id"]) == ("unchanged", None)


async def test_buyer_downgrades_at_the_end_of_the_period(shop: Harness, sandbox: SandboxServer) -> None:
    key = await subscriber(shop, sandbox, "team")
    made = (await shop.post(key, "/v1/plan", plan="pro")).json()
    subscription = (await stored(shop)).subscription
    assert subscription is not None
    assert (made["state"], made["effective_at_ms"]) == ("scheduled", subscription.period_end_ms)
    assert (await stored(shop)).plan == "team"


async def test_account_shows_the_plan_that_is_scheduled(shop: Harness, sandbox: SandboxServer) -> None:
    key = await subscriber(shop, sandbox, "team")
    await shop.post(key, "/v1/plan", plan="pro")
    before = (await account(shop))["subscription"]
    assert (before["scheduled_plan"], before["scheduled_product_id"]) == (None, "")
    await refresh(shop)
    shown = await account(shop)
    assert (shown["plan"], shown["subscription"]["scheduled_plan"]) == ("team", "pro")


async def test_allowance_shows_what_a_debt_leaves_of_it(shop: Harness, sandbox: SandboxServer) -> None:
    await subscriber(shop, sandbox, "pro")
    await shop.gateway.parts.ledger.adjust(
        Adjustment("adjustment:1", TenantId("acme"), Unit.NANOS, parse_usd("-4"), "granted twice")
    )
    allowance = (await account(shop))["allowance"]
    assert (allowance["remaining_usd"], allowance["debt_usd"]) == ("25.000000", "3.000000"), (
        "a pack of $1 paid the rest"
    )
    assert allowance["usable_usd"] == "22.000000"


async def test_second_checkout_names_the_change_of_plan(shop: Harness, sandbox: SandboxServer) -> None:
    key = await subscriber(shop, sandbox, "pro")
    refused = await shop.post(key, "/v1/checkout", plan="team")
    assert_problem(refused, 409, "conflict")
    assert "POST /v1/plan" in refused.json()["error"]["message"]


async def test_plan_that_is_not_sold_to_the_buyer_is_not_found(shop: Harness, sandbox: SandboxServer) -> None:
    key = await subscriber(shop, sandbox, "pro")
    for plan in ("club", "nothing", "prepaid"):
        refused = await shop.post(key, "/v1/plan", plan=plan)
        assert_problem(refused, 404, "not_found")
        assert refused.json()["error"]["message"].endswith(": payg, pro, team")
        assert_problem(await preview(shop, key, plan), 404, "not_found")


async def test_change_without_a_subscription_is_refused(shop: Harness, sandbox: SandboxServer) -> None:
    refused = await shop.post(await subscriber(shop, sandbox), "/v1/plan", plan="pro")
    assert_problem(refused, 409, "plan_change_refused")
    assert "POST /v1/checkout" in refused.json()["error"]["message"]


async def test_declined_card_is_402_and_keeps_the_plan(shop: Harness, sandbox: SandboxServer) -> None:
    key = await subscriber(shop, sandbox, "pro")
    customer = (await stored(shop)).dodo_customer_id
    async with httpx.AsyncClient(base_url=sandbox.url, trust_env=False) as dodo:
        await dodo.post(f"/_sandbox/customers/{customer}/card", json={"declines": True})
    refused = await shop.post(key, "/v1/plan", plan="team")
    assert_problem(refused, 402, "payment_failed")
    assert refused.headers["x-should-retry"] == "false"
    assert (await stored(shop)).plan == "pro"


async def test_operator_moves_a_subscribed_tenant_at_dodo(shop: Harness, sandbox: SandboxServer) -> None:
    await subscriber(shop, sandbox, "pro")
    moved = await shop.client.patch("/admin/tenants/acme", json={"plan": "team"}, headers=bearer(ADMIN_KEY))
    assert moved.status_code == 200, moved.text
    subscription = (await stored(shop)).subscription
    assert subscription is not None
    assert (moved.json()["plan"], subscription.plan) == ("team", "team")


async def test_operator_cannot_move_a_subscribed_tenant_off_what_it_pays(shop: Harness, sandbox: SandboxServer) -> None:
    await subscriber(shop, sandbox, "pro")
    refused = await shop.client.patch("/admin/tenants/acme", json={"plan": "prepaid"}, headers=bearer(ADMIN_KEY))
    assert_problem(refused, 409, "plan_change_refused")
    assert "cancel" in refused.json()["error"]["message"]
