"""What a tenant sees of its own money, and what the operator may do."""

import httpx
import pytest
from deployments.gateway.services import Services
from redis.asyncio import Redis

from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.money import parse_usd
from billing.store import keys
from billing.tenants.tenant import new_key
from billing.usage import TenantId
from tests.deployments.gateway.api.test_refusals import check
from tests.support.gateway import ADMIN_KEY, House, bearer

ADMIN = bearer(ADMIN_KEY)


async def get(house: House, path: str, key: str) -> dict[str, object]:
    reply = await house.client.get(path, headers=bearer(key))
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def test_the_account_shows_balance_plan_and_limits(house: House) -> None:
    key = await house.tenant(usd="2.50")
    await house.chat(key)
    account = await get(house, "/v1/account", key)
    assert account["balance_usd"] == "2.485000"
    assert account["plan"] == "prepaid"
    assert account["held_usd"] == "0.000000"
    assert account["open_holds"] == 0
    assert account["allowance"] is None


async def test_an_allowance_is_shown_before_its_first_use(house: House) -> None:
    account = await get(house, "/v1/account", await house.tenant(usd="0", plan="free"))
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


async def test_what_a_plan_that_was_left_still_allows_is_shown_nowhere(house: House) -> None:
    await house.chat(await house.tenant(usd="0.10", plan="free"))
    await house.services.tenants.update(TenantId("acme"), lambda one: one.model_copy(update={"plan": "prepaid"}))
    key, stored = new_key(TenantId("acme"), 0)  # one that no gateway has seen on the old plan
    await house.services.tenants.add_key(stored)
    account = await get(house, "/v1/account", key)
    assert (account["balance_usd"], account["allowance"]) == ("0.100000", None)
    reply = await house.chat(key)
    assert reply.json()["receipt"]["balance_usd"] == reply.headers["x-farebox-balance"] == "0.085000"
    assert (await get(house, "/v1/account", key))["balance_usd"] == "0.085000"
    quoted = (await house.post(key, "/v1/quote", model="pirate", prompt="one two three", max_tokens=60)).json()
    assert quoted["affordable_tokens"] == 41, "what $0.085 affords: 3 tokens at $0.001, 41 at $0.002"


async def test_usage_adds_up_to_the_receipts(house: House) -> None:
    key, other = await house.tenant(), await house.tenant("other")
    receipts = [(await house.chat(key, model=model)).json()["receipt"] for model in ("pirate", "pirate", "gratis")]
    await house.chat(other)
    usage = await get(house, "/v1/usage", key)
    rows = {row["model"]: row for row in usage["data"]}  # type: ignore[attr-defined]
    assert rows["pirate"]["records"] == 2
    assert rows["pirate"]["charged_usd"] == "0.030000"
    assert rows["gratis"]["charged_usd"] == "0.000000"
    by_day = await get(house, "/v1/usage?group_by=day", key)
    assert len(by_day["data"]) == 1  # type: ignore[arg-type]
    listed = await get(house, "/v1/usage/records", key)
    ids = [record["record_id"] for record in listed["data"]]  # type: ignore[attr-defined]
    assert ids == [receipt["record_id"] for receipt in reversed(receipts)]
    assert listed["next_cursor"] is None


async def test_records_come_in_pages(house: House) -> None:
    key = await house.tenant()
    for _ in range(5):
        await house.chat(key)
    seen: list[str] = []
    cursor = ""
    while True:
        page = await get(house, f"/v1/usage/records?limit=2&cursor={cursor}", key)
        seen += [record["record_id"] for record in page["data"]]  # type: ignore[attr-defined]
        if page["next_cursor"] is None:
            break
        cursor = str(page["next_cursor"])
    assert len(seen) == len(set(seen)) == 5


@pytest.mark.parametrize("query", ["start=2024-01-01&end=2024-12-31", "end=2000-01-01", "end=2100-12-31"])
async def test_a_span_may_be_a_leap_year_long(house: House, query: str) -> None:
    await get(house, f"/v1/usage?{query}", await house.tenant())


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
async def test_a_span_that_is_none_is_refused(house: House, query: str) -> None:
    key = await house.tenant()
    check(await house.client.get(f"/v1/usage?{query}", headers=bearer(key)), 400, "invalid_request")


@pytest.mark.parametrize("query", ["cursor=x", "limit=0", "limit=5000", "limit=x"])
async def test_a_page_that_is_none_is_refused(house: House, query: str) -> None:
    key = await house.tenant()
    check(await house.client.get(f"/v1/usage/records?{query}", headers=bearer(key)), 400, "invalid_request")


async def test_a_checkout_names_what_is_wrong_with_it(house: House) -> None:
    key = await house.tenant()
    for body, status, code in (
        ({}, 400, "invalid_request"),
        ({"pack": "small", "plan": "payg"}, 400, "invalid_request"),
        ({"pack": "small", "price": "1"}, 400, "invalid_request"),
        ({"pack": "nothing"}, 404, "not_found"),
        ({"plan": "prepaid"}, 404, "not_found"),
        ({"pack": "small"}, 503, "payments_unavailable"),
    ):
        check(await house.post(key, "/v1/checkout", **body), status, code)


async def test_a_webhook_without_payments_configured_is_kept_by_its_sender(house: House) -> None:
    check(await house.client.post("/webhooks/dodo", json={}), 503, "payments_unavailable")


@pytest.mark.parametrize("header", [{}, bearer("wrong"), {"authorization": f"Basic {ADMIN_KEY}"}])
@pytest.mark.parametrize("path", ["tenants", "catalogue", "gateways", "billing", "dead-letters", "tenants/acme/keys"])
async def test_the_admin_api_wants_its_key(house: House, path: str, header: dict[str, str]) -> None:
    check(await house.client.get(f"/admin/{path}", headers=header), 401, "invalid_admin_key")


async def test_a_tenants_key_is_no_admin_key(house: House) -> None:
    key = await house.tenant()
    check(await house.client.get("/admin/tenants", headers=bearer(key)), 401, "invalid_admin_key")


async def admin(house: House, method: str, path: str, **body: object) -> httpx.Response:
    return await house.client.request(method, f"/admin/{path}", json=body or None, headers=ADMIN)


async def test_the_operator_makes_a_tenant_that_can_pay_and_call(house: House) -> None:
    made = await admin(house, "POST", "tenants", id="newco", email="new@example.com", name="New Co")
    assert made.status_code == 201
    assert made.json()["plan"] == "prepaid"
    granted = await admin(house, "POST", "tenants/newco/grants", source="welcome", usd="0.50")
    assert granted.json()["granted"] is True
    again = await admin(house, "POST", "tenants/newco/grants", source="welcome", usd="0.50")
    assert again.json()["granted"] is False
    key = (await admin(house, "POST", "tenants/newco/keys", name="laptop", models=["pirate"])).json()
    reply = await house.chat(key["api_key"])
    assert reply.json()["receipt"]["balance_usd"] == "0.485000"
    check(await house.chat(key["api_key"], model="gratis"), 403, "model_not_allowed")
    shown = (await admin(house, "GET", "tenants/newco")).json()
    assert shown["account"]["balance_usd"] == "0.485000"
    assert "hash" not in str((await admin(house, "GET", "tenants/newco/keys")).json())
    listed = (await admin(house, "GET", "tenants")).json()["data"]
    assert [tenant["id"] for tenant in listed] == ["newco"]


async def test_requests_granted_by_the_operator_cover_calls_whole(house: House) -> None:
    key = await house.tenant(usd="0")
    granted = await admin(house, "POST", "tenants/acme/grants", source="g", requests=1, adapters=["pirate"])
    assert granted.json()["unit"] == "requests"
    reply = await house.chat(key)
    assert reply.json()["receipt"]["cost_usd"] == "0.000000"
    assert reply.json()["receipt"]["list_usd"] == "0.015000"
    check(await house.chat(key), 402, "insufficient_credits")


async def test_a_correction_takes_or_gives_once_and_may_leave_a_debt(house: House) -> None:
    await house.tenant(usd="1.00")
    asked = {"source": "ticket-7", "usd": "-1.25", "reason": "granted twice"}
    for is_new in (True, False):
        reply = (await admin(house, "POST", "tenants/acme/adjustments", **asked)).json()
        assert (reply["adjusted"], reply["amount"]) == (is_new, -1_250_000_000)
        assert await house.balance() == parse_usd("-0.25")
    await admin(house, "POST", "tenants/acme/adjustments", source="ticket-8", usd="0.50", reason="goodwill")
    assert await house.balance() == parse_usd("0.25")


async def test_the_operators_mistakes_are_named(house: House) -> None:
    await house.tenant()
    for method, path, body, status, code in (
        ("POST", "tenants", {"id": "acme", "email": "x@example.com"}, 409, "tenant_exists"),
        ("POST", "tenants", {"id": "UPPER", "email": "x@example.com"}, 400, "invalid_request"),
        ("POST", "tenants", {"id": "b", "email": "nomail"}, 400, "invalid_request"),
        ("POST", "tenants", {"id": "b", "email": "x@example.com", "plan": "gold"}, 404, "not_found"),
        ("GET", "tenants/nobody", {}, 404, "tenant_not_found"),
        ("POST", "tenants/nobody/keys", {"name": "x"}, 404, "tenant_not_found"),
        ("DELETE", "tenants/acme/keys/nothing", {}, 404, "key_not_found"),
        ("PATCH", "tenants/acme", {"plan": "gold"}, 404, "not_found"),
        ("PATCH", "tenants/acme", {"pln": "free"}, 400, "invalid_request"),
        ("POST", "tenants/acme/grants", {"source": "a"}, 400, "invalid_request"),
        ("POST", "tenants/acme/grants", {"source": "a", "usd": "1", "requests": 1}, 400, "invalid_request"),
        ("POST", "tenants/acme/grants", {"source": "a", "usd": "-1"}, 400, "invalid_request"),
        ("POST", "tenants/acme/grants", {"source": "a", "usd": 1.5}, 400, "invalid_request"),
        ("POST", "tenants/acme/grants", {"source": "a", "usd": "1000000.01"}, 400, "invalid_request"),
        ("POST", "tenants/acme/grants", {"source": "a", "requests": 0}, 400, "invalid_request"),
        ("POST", "tenants/acme/adjustments", {"source": "a", "usd": "1"}, 400, "invalid_request"),
        ("POST", "tenants/acme/adjustments", {"source": "a", "reason": "b"}, 400, "invalid_request"),
        ("POST", "tenants/acme/adjustments", {"source": "a", "usd": "x", "reason": "b"}, 400, "invalid_request"),
        ("POST", "tenants/acme/adjustments", {"source": "a", "usd": "0", "reason": "b"}, 400, "grant_refused"),
    ):
        check(await admin(house, method, path, **body), status, code)


async def test_a_plan_can_be_changed_and_takes_effect(house: House) -> None:
    await house.tenant(usd="0")
    changed = await admin(house, "PATCH", "tenants/acme", plan="free")
    assert changed.json()["plan"] == "free"
    tenant = await house.services.tenants.get(TenantId("acme"))
    assert tenant.plan == "free"


async def test_the_catalogue_shows_what_was_set_aside(house: House) -> None:
    catalog = (await admin(house, "GET", "catalogue")).json()
    assert catalog["hash"] == house.services.gateway.catalog_holder.current.content_hash
    [bad] = catalog["rejected"]
    assert (bad["id"], "price" in bad["reason"]) == ("unpriced", True)


async def test_the_billing_page_works_before_the_actor_ever_ran(house: House) -> None:
    await house.chat(await house.tenant())
    billing = (await admin(house, "GET", "billing")).json()
    assert billing["backlog"] == 2, "the grant and the record"
    assert billing["open_holds"] == 0
    assert billing["pump"]["state"] == "starting"
    assert billing["unsettled_on_this_gateway"] == 0
    assert (billing["refused_settles"], billing["quarantined_settles"]) == (0, 0)
    assert (await admin(house, "GET", "dead-letters")).json()["data"] == []
    assert (await admin(house, "GET", "gateways")).json()["data"] == []


async def test_engines_are_for_the_operator(house: House) -> None:
    await house.chat(await house.tenant())
    assert (await admin(house, "GET", "engines")).json()["data"][0]["steps"] == 5
    check(await house.client.get("/admin/engines"), 401, "invalid_admin_key")


async def test_a_checkout_asks_dodo_for_the_tenants_own_customer(house: House, redis: Redis) -> None:
    """Everything but Dodo's own answer: an SDK call that reaches nobody is told as unavailable."""
    key = await house.tenant()
    settings = DodoSettings("key", base_url="http://127.0.0.1:9")
    dodo = Dodo(settings)
    parts = {name: getattr(house.services, name) for name in Services.__slots__} | {"dodo": dodo}
    house.app._app.state.services = Services(**parts)  # type: ignore[attr-defined]
    check(await house.post(key, "/v1/checkout", pack="small"), 503, "payments_unavailable")
    await house.services.tenants.set_customer(TenantId("acme"), "cus_1")
    check(await house.post(key, "/v1/checkout", pack="small"), 503, "payments_unavailable")
    await redis.hset(keys.DODO_IDS, "pack:small", "prd_1")
    reply = await house.post(key, "/v1/checkout", pack="small")
    check(reply, 503, "payments_unavailable")
    assert reply.headers["retry-after"]
    await dodo.close()
