"""A tenant's account, usage and records, and the operator's routes."""

from dataclasses import replace

import httpx
import pytest
from redis.asyncio import Redis

from billing.catalog.terms import Terms
from billing.commerce.products import Products
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.money import parse_usd
from billing.tenants.tenant import new_key
from billing.usage import TenantId
from tests.support.gateway import ADMIN_KEY, Harness, assert_problem, bearer

ADMIN = bearer(ADMIN_KEY)


async def get(harness: Harness, path: str, key: str) -> dict[str, object]:
    reply = await harness.client.get(path, headers=bearer(key))
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def test_account_shows_balance_plan_and_limits(harness: Harness) -> None:
    key = await harness.tenant(usd="2.50")
    await harness.chat(key)
    account = await get(harness, "/v1/account", key)
    assert account["balance_usd"] == "2.485000"
    assert account["plan"] == "prepaid"
    assert account["held_usd"] == "0.000000"
    assert account["open_holds"] == 0
    assert account["allowance"] is None


async def test_account_shows_allowance_before_first_use(harness: Harness) -> None:
    account = await get(harness, "/v1/account", await harness.tenant(usd="0", plan="free"))
    allowance = account["allowance"]
    assert isinstance(allowance, dict)
    assert allowance["remaining_usd"] == "1.000000"
    assert account["balance_usd"] == "1.000000"
    assert account["limits"] == {
        "requests_per_minute": 3,
        "burst": None,
        "tokens_per_minute": None,
        "concurrent_requests": None,
    }


async def test_account_leaves_out_allowance_of_former_plan(harness: Harness) -> None:
    await harness.chat(await harness.tenant(usd="0.10", plan="free"))
    await harness.gateway.parts.tenants.update(TenantId("acme"), lambda one: one.model_copy(update={"plan": "prepaid"}))
    key, stored = new_key(TenantId("acme"), 0)  # one that no gateway has seen on the old plan
    await harness.gateway.parts.tenants.add_key(stored)
    account = await get(harness, "/v1/account", key)
    assert (account["balance_usd"], account["allowance"]) == ("0.100000", None)
    reply = await harness.chat(key)
    assert reply.json()["receipt"]["balance_usd"] == reply.headers["x-farebox-balance"] == "0.085000"
    assert (await get(harness, "/v1/account", key))["balance_usd"] == "0.085000"
    quoted = (await harness.post(key, "/v1/quote", model="pirate", prompt="one two three", max_tokens=60)).json()
    assert quoted["affordable_tokens"] == 41, "what $0.085 affords: 3 tokens at $0.001, 41 at $0.002"


async def test_usage_is_sum_of_receipts(harness: Harness) -> None:
    key, other = await harness.tenant(), await harness.tenant("other")
    receipts = [(await harness.chat(key, model=model)).json()["receipt"] for model in ("pirate", "pirate", "gratis")]
    await harness.chat(other)
    usage = await get(harness, "/v1/usage", key)
    rows = {row["model"]: row for row in usage["data"]}  # type: ignore[attr-defined]
    assert rows["pirate"]["records"] == 2
    assert rows["pirate"]["charged_usd"] == "0.030000"
    assert rows["gratis"]["charged_usd"] == "0.000000"
    by_day = await get(harness, "/v1/usage?group_by=day", key)
    assert len(by_day["data"]) == 1  # type: ignore[arg-type]
    listed = await get(harness, "/v1/usage/records", key)
    ids = [record["record_id"] for record in listed["data"]]  # type: ignore[attr-defined]
    assert ids == [receipt["record_id"] for receipt in reversed(receipts)]
    assert listed["next_cursor"] is None


async def test_records_are_paged(harness: Harness) -> None:
    key = await harness.tenant()
    for _ in range(5):
        await harness.chat(key)
    seen: list[str] = []
    cursor = ""
    while True:
        page = await get(harness, f"/v1/usage/records?limit=2&cursor={cursor}", key)
        seen += [record["record_id"] for record in page["data"]]  # type: ignore[attr-defined]
        if page["next_cursor"] is None:
            break
        cursor = str(page["next_cursor"])
    assert len(seen) == len(set(seen)) == 5


@pytest.mark.parametrize("query", ["start=2024-01-01&end=2024-12-31", "end=2000-01-01", "end=2100-12-31"])
async def test_usage_of_leap_year(harness: Harness, query: str) -> None:
    await get(harness, f"/v1/usage?{query}", await harness.tenant())


@pytest.mark.parametrize(
    "query",
    [
        "start=2026-02-30",
        "start=2026-03-02&end=2026-03-01",
        "group_by=tenant",
        "start=x",
        "end=9999-12-31",
        "end=0001-01-01",
        "start=1999-12-31&end=2000-01-02",
        "end=2101-01-01",
        "start=2024-01-01&end=2025-01-01",
    ],
)
async def test_usage_refused_for_bad_days(harness: Harness, query: str) -> None:
    key = await harness.tenant()
    assert_problem(await harness.client.get(f"/v1/usage?{query}", headers=bearer(key)), 400, "invalid_request")


@pytest.mark.parametrize("query", ["cursor=x", "limit=0", "limit=5000", "limit=x"])
async def test_page_refused_when_out_of_bounds(harness: Harness, query: str) -> None:
    key = await harness.tenant()
    assert_problem(await harness.client.get(f"/v1/usage/records?{query}", headers=bearer(key)), 400, "invalid_request")


async def test_checkout_refused_with_reason(harness: Harness) -> None:
    key = await harness.tenant()
    for body, status, code in (
        ({}, 400, "invalid_request"),
        ({"pack": "small", "plan": "payg"}, 400, "invalid_request"),
        ({"pack": "small", "price": "1"}, 400, "invalid_request"),
        ({"pack": "nothing"}, 404, "not_found"),
        ({"plan": "prepaid"}, 404, "not_found"),
        ({"pack": "small"}, 503, "payments_unavailable"),
    ):
        assert_problem(await harness.post(key, "/v1/checkout", **body), status, code)


async def test_webhook_unavailable_without_payments(harness: Harness) -> None:
    assert_problem(await harness.client.post("/webhooks/dodo", json={}), 503, "payments_unavailable")


@pytest.mark.parametrize("header", [{}, bearer("wrong"), {"authorization": f"Basic {ADMIN_KEY}"}])
@pytest.mark.parametrize("path", ["tenants", "catalogue", "gateways", "billing", "dead-letters", "tenants/acme/keys"])
async def test_admin_api_refused_without_admin_key(harness: Harness, path: str, header: dict[str, str]) -> None:
    assert_problem(await harness.client.get(f"/admin/{path}", headers=header), 401, "invalid_admin_key")


async def test_admin_api_refused_with_tenant_key(harness: Harness) -> None:
    key = await harness.tenant()
    assert_problem(await harness.client.get("/admin/tenants", headers=bearer(key)), 401, "invalid_admin_key")


async def admin(harness: Harness, method: str, path: str, **body: object) -> httpx.Response:
    return await harness.client.request(method, f"/admin/{path}", json=body or None, headers=ADMIN)


async def test_new_tenant_with_grant_and_key_can_chat(harness: Harness) -> None:
    made = await admin(harness, "POST", "tenants", id="newco", email="new@example.com", name="New Co")
    assert made.status_code == 201
    assert made.json()["plan"] == "prepaid"
    granted = await admin(harness, "POST", "tenants/newco/grants", source="welcome", usd="0.50")
    assert granted.json()["granted"] is True
    again = await admin(harness, "POST", "tenants/newco/grants", source="welcome", usd="0.50")
    assert again.json()["granted"] is False
    key = (await admin(harness, "POST", "tenants/newco/keys", name="laptop", models=["pirate"])).json()
    reply = await harness.chat(key["api_key"])
    assert reply.json()["receipt"]["balance_usd"] == "0.485000"
    assert_problem(await harness.chat(key["api_key"], model="gratis"), 403, "model_not_allowed")
    shown = (await admin(harness, "GET", "tenants/newco")).json()
    assert shown["account"]["balance_usd"] == "0.485000"
    assert "hash" not in str((await admin(harness, "GET", "tenants/newco/keys")).json())
    listed = (await admin(harness, "GET", "tenants")).json()["data"]
    assert [tenant["id"] for tenant in listed] == ["newco"]


async def test_granted_requests_cover_whole_calls(harness: Harness) -> None:
    key = await harness.tenant(usd="0")
    granted = await admin(harness, "POST", "tenants/acme/grants", source="g", requests=1, adapters=["pirate"])
    assert granted.json()["unit"] == "requests"
    reply = await harness.chat(key)
    assert reply.json()["receipt"]["cost_usd"] == "0.000000"
    assert reply.json()["receipt"]["list_usd"] == "0.015000"
    assert_problem(await harness.chat(key), 402, "insufficient_credits")


async def test_adjustment_is_idempotent_and_may_leave_debt(harness: Harness) -> None:
    await harness.tenant(usd="1.00")
    asked = {"source": "ticket-7", "usd": "-1.25", "reason": "granted twice"}
    for is_new in (True, False):
        reply = (await admin(harness, "POST", "tenants/acme/adjustments", **asked)).json()
        assert (reply["adjusted"], reply["amount"]) == (is_new, -1_250_000_000)
        assert await harness.balance() == parse_usd("-0.25")
    await admin(harness, "POST", "tenants/acme/adjustments", source="ticket-8", usd="0.50", reason="goodwill")
    assert await harness.balance() == parse_usd("0.25")


async def test_admin_request_refused_with_reason(harness: Harness) -> None:
    await harness.tenant()
    for method, path, body, status, code in (
        ("POST", "tenants", {"id": "acme", "email": "x@example.com"}, 409, "tenant_exists"),
        ("POST", "tenants", {"id": "UPPER", "email": "x@example.com"}, 400, "invalid_request"),
        ("POST", "tenants", {"id": "b", "email": "nomail"}, 400, "invalid_request"),
        ("POST", "tenants", {"id": "b", "email": "x@example.com", "plan": "gold"}, 404, "not_found"),
        ("GET", "tenants/unknown", {}, 404, "tenant_not_found"),
        ("POST", "tenants/unknown/keys", {"name": "x"}, 404, "tenant_not_found"),
        ("DELETE", "tenants/acme/keys/nothing", {}, 404, "key_not_found"),
        ("PATCH", "tenants/acme", {"plan": "gold"}, 404, "not_found"),
        ("PATCH", "tenants/acme", {"pln": "free"}, 400, "invalid_request"),
        ("POST", "tenants/acme/grants", {"source": "a"}, 400, "invalid_request"),
        ("POST", "tenants/acme/grants", {"source": "a", "usd": "1", "requests": 1}, 400, "invalid_request"),
        ("POST", "tenants/acme/grants", {"source": "a", "usd": "-1"}, 400, "invalid_request"),
        ("POST", "tenants/acme/grants", {"source": "a", "usd": 1.5}, 400, "invalid_request"),
        ("POST", "tenants/acme/grants", {"source": "n\nl", "usd": "1"}, 400, "invalid_request"),
        ("POST", "tenants/acme/adjustments", {"source": "n\tl", "usd": "1", "reason": "b"}, 400, "invalid_request"),
        ("POST", "tenants/acme/adjustments", {"source": "a", "usd": "1", "reason": "n\x85l"}, 400, "invalid_request"),
        ("POST", "tenants/acme/grants", {"source": "a", "usd": "1000000.01"}, 400, "invalid_request"),
        ("POST", "tenants/acme/grants", {"source": "a", "requests": 0}, 400, "invalid_request"),
        ("POST", "tenants/acme/adjustments", {"source": "a", "usd": "1"}, 400, "invalid_request"),
        ("POST", "tenants/acme/adjustments", {"source": "a", "reason": "b"}, 400, "invalid_request"),
        ("POST", "tenants/acme/adjustments", {"source": "a", "usd": "x", "reason": "b"}, 400, "invalid_request"),
        ("POST", "tenants/acme/adjustments", {"source": "a", "usd": "0", "reason": "b"}, 400, "grant_refused"),
    ):
        assert_problem(await admin(harness, method, path, **body), status, code)


async def test_tenant_plan_is_changed(harness: Harness) -> None:
    await harness.tenant(usd="0")
    changed = await admin(harness, "PATCH", "tenants/acme", plan="free")
    assert changed.json()["plan"] == "free"
    tenant = await harness.gateway.parts.tenants.get(TenantId("acme"))
    assert tenant.plan == "free"


async def test_catalog_shows_rejected_entries(harness: Harness) -> None:
    catalog = (await admin(harness, "GET", "catalogue")).json()
    assert catalog["hash"] == harness.gateway.parts.catalog_holder.current.content_hash
    [bad] = catalog["rejected"]
    assert (bad["id"], "price" in bad["reason"]) == ("unpriced", True)


async def test_billing_before_first_run_of_actor(harness: Harness) -> None:
    await harness.chat(await harness.tenant())
    billing = (await admin(harness, "GET", "billing")).json()
    assert billing["backlog"] == 2, "the grant and the record"
    assert billing["open_holds"] == 0
    assert billing["pump"]["state"] == "starting"
    assert billing["unsettled_on_this_gateway"] == 0
    assert (billing["refused_settles"], billing["quarantined_settles"]) == (0, 0)
    assert (await admin(harness, "GET", "dead-letters")).json()["data"] == []
    assert (await admin(harness, "GET", "gateways")).json()["data"] == []


async def test_engines_shown_to_operator_only(harness: Harness) -> None:
    await harness.chat(await harness.tenant())
    assert (await admin(harness, "GET", "engines")).json()["data"][0]["steps"] == 5
    assert_problem(await harness.client.get("/admin/engines"), 401, "invalid_admin_key")


async def test_checkout_unavailable_until_customer_and_product_exist(harness: Harness, redis: Redis) -> None:
    """The SDK's own call is refused by the address, and answered as unavailable too."""
    key = await harness.tenant()
    settings = DodoSettings("key", base_url="http://127.0.0.1:9")
    dodo = Dodo(settings)
    harness.gateway.parts = replace(harness.gateway.parts, dodo=dodo)
    assert_problem(await harness.post(key, "/v1/checkout", pack="small"), 503, "payments_unavailable")
    await harness.gateway.parts.tenants.set_customer(TenantId("acme"), "cus_1")
    assert_problem(await harness.post(key, "/v1/checkout", pack="small"), 503, "payments_unavailable")
    small = harness.gateway.parts.catalog_holder.current.packs["small"]
    await Products(redis).add("prd_1", Terms.of_pack("small", small))
    reply = await harness.post(key, "/v1/checkout", pack="small")
    assert_problem(reply, 503, "payments_unavailable")
    assert reply.headers["retry-after"]
    await dodo.close()
