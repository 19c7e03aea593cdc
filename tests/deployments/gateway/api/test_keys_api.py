"""API keys that a tenant manages itself, and a key's own spend caps and limits."""

from dataclasses import replace

import httpx
import pytest

from billing.tenants.tenant import Throttle, new_key
from billing.usage import TenantId
from deployments.gateway.api.dependencies import client_address
from tests.support.gateway import ADMIN_KEY, Harness, assert_problem, bearer

Reply = httpx.Response


async def make(harness: Harness, **asked: object) -> tuple[str, str]:
    """A key that the operator makes for acme: its secret and its id."""
    reply = await harness.client.post("/admin/tenants/acme/keys", json=asked, headers=bearer(ADMIN_KEY))
    assert reply.status_code == 201, reply.text
    return reply.json()["api_key"], reply.json()["key"]["id"]


async def own(harness: Harness, key: str, method: str, path: str = "", **body: object) -> Reply:
    return await harness.client.request(method, f"/v1/keys{path}", headers=bearer(key), json=body or None)


@pytest.fixture
async def manager(harness: Harness) -> str:
    await harness.tenant()
    return (await make(harness, manages_keys=True))[0]


async def test_tenant_manages_own_keys(harness: Harness, manager: str) -> None:
    made = (await own(harness, manager, "POST", name="ci", models=["gratis"], daily_cap="1.50")).json()
    assert (await harness.chat(made["api_key"], model="gratis")).status_code == 200
    assert_problem(await harness.chat(made["api_key"]), 403, "model_not_allowed")
    rotated = await own(harness, manager, "POST", f"/{made['key']['id']}/rotate", grace_hours=0)
    assert rotated.status_code == 201
    body = assert_problem(await harness.chat(made["api_key"], model="gratis"), 401, "invalid_api_key")
    assert "expired" in str(body["detail"])
    assert (await harness.chat(rotated.json()["api_key"], model="gratis")).status_code == 200
    new = rotated.json()["key"]
    assert (new["models"], new["daily_cap"], new["counts_as"]) == (["gratis"], "1.500000", made["key"]["id"])
    assert (await own(harness, manager, "DELETE", f"/{new['id']}")).json()["revoked_at_ms"]
    assert_problem(await harness.chat(rotated.json()["api_key"], model="gratis"), 401, "invalid_api_key")
    listed = (await own(harness, manager, "GET")).json()["data"]
    assert {made["key"]["id"], new["id"]} < {key["id"] for key in listed}
    assert not any("hash" in key for key in listed)


@pytest.mark.parametrize("name", ["two\nlines", "tab\t", "\x1b[31mred", "\u2028"])
async def test_names_have_no_control_characters(harness: Harness, manager: str, name: str) -> None:
    admin = bearer(ADMIN_KEY)
    tenant = {"id": "globex", "email": "it@globex.example", "name": name}
    for reply in (
        await harness.client.post("/admin/tenants", json=tenant, headers=admin),
        await harness.client.patch("/admin/tenants/acme", json={"name": name}, headers=admin),
        await harness.client.post("/admin/tenants/acme/keys", json={"name": name}, headers=admin),
        await own(harness, manager, "POST", name=name),
    ):
        assert "control characters are refused: leave them out" in str(assert_problem(reply, 400, "invalid_request"))
    assert (await harness.client.get("/admin/tenants/globex", headers=admin)).status_code == 404


async def test_rotated_secret_works_during_grace(harness: Harness, manager: str) -> None:
    secret, key = await make(harness)
    rotated = await own(harness, manager, "POST", f"/{key}/rotate", grace_hours=1)
    assert (await harness.chat(secret)).status_code == 200
    assert (await harness.chat(rotated.json()["api_key"])).status_code == 200
    assert_problem(await own(harness, manager, "POST", "/key_none/rotate", grace_hours=1), 404, "key_not_found")
    await own(harness, manager, "DELETE", f"/{key}")
    assert_problem(await own(harness, manager, "POST", f"/{key}/rotate", grace_hours=1), 409, "key_not_rotated")


async def test_ordinary_key_manages_no_keys(harness: Harness, manager: str) -> None:
    secret, key = await make(harness)
    for method, path in (("GET", ""), ("POST", ""), ("DELETE", f"/{key}"), ("POST", f"/{key}/rotate")):
        body = assert_problem(
            await own(harness, secret, method, path, **({"name": "x"} if method == "POST" and not path else {})),
            403,
            "scope_missing",
        )
        assert "`keys:write`" in str(body["detail"])


async def test_keys_of_other_tenant_not_found(harness: Harness, manager: str) -> None:
    await harness.tenant("other")
    other, stored = new_key(TenantId("other"), 0)
    await harness.gateway.parts.tenants.add_key(stored)
    assert_problem(await own(harness, manager, "DELETE", f"/{stored.id}"), 404, "key_not_found")
    assert (await harness.chat(other)).status_code == 200


async def test_managing_key_has_no_bounds(harness: Harness, manager: str) -> None:
    for bound in ({"daily_cap": "1"}, {"models": ["gratis"]}, {"limits": {"concurrent_requests": 1}}):
        assert_problem(await own(harness, manager, "POST", manages_keys=True, **bound), 400, "invalid_request")


@pytest.mark.parametrize("is_rotated", [False, True])
async def test_key_lives_no_longer_than_its_maker(harness: Harness, manager: str, is_rotated: bool) -> None:
    brief, maker = await make(harness, manages_keys=True, expires_days=1)
    if is_rotated:
        _, lasting = await make(harness)
        reply = await own(harness, brief, "POST", f"/{lasting}/rotate", grace_hours=0)
    else:
        reply = await own(harness, brief, "POST", expires_days=30)
    made = reply.json()["key"]
    [listed] = [key for key in (await own(harness, manager, "GET")).json()["data"] if key["id"] == maker]
    assert (made["expires_at_ms"], made["made_by"]) == (listed["expires_at_ms"], maker)
    assert listed["made_by"] == "admin"


@pytest.mark.parametrize("scope", ["billing:read", "billing:write"])
async def test_key_has_no_scope_that_its_maker_lacks(harness: Harness, manager: str, scope: str) -> None:
    asked = {"scopes": ["inference", scope]}
    body = assert_problem(await own(harness, manager, "POST", **asked), 403, "scope_missing")
    assert f"`{scope}`" in str(body["detail"])
    secret, stronger = await make(harness, **asked)
    assert_problem(await own(harness, manager, "POST", f"/{stronger}/rotate", grace_hours=0), 403, "scope_missing")
    assert (await harness.chat(secret)).status_code == 200, "the refused rotation ended nothing"
    full, _ = await make(harness, scopes=["inference", "keys:write", scope])
    assert (await own(harness, full, "POST", **asked)).json()["key"]["scopes"] == ["inference", scope]
    assert (await own(harness, full, "POST", f"/{stronger}/rotate", grace_hours=0)).status_code == 201


async def test_key_without_chosen_scopes_has_the_first_two(harness: Harness, manager: str) -> None:
    for asked in ({"name": "ci"}, {"manages_keys": True}):
        made = await own(harness, manager, "POST", **asked)
        scopes = made.json()["key"]["scopes"]
        assert scopes[:2] == ["inference", "usage:read"]
        assert made.json()["key"]["manages_keys"] is ("keys:write" in scopes)
    assert scopes[2:] == ["keys:write"]


@pytest.mark.parametrize(
    ("asked", "is_allowed"),
    [
        ({"scopes": ["billing:write"], "daily_cap": "0.01"}, False),
        ({"scopes": ["billing:read"], "monthly_cap": "50"}, False),
        ({"scopes": ["billing:write"], "monthly_cap": "0"}, False),
        ({"scopes": ["billing:read", "billing:write"], "models": ["pirate"]}, True),
        ({"scopes": ["inference", "usage:read"], "daily_cap": "0.01"}, True),
        ({"scopes": ["keys:write"], "limits": {"concurrent_requests": 1}}, False),
        ({"scopes": ["keys:write", "billing:write"]}, True),
        ({"scopes": []}, False),
        ({"scopes": ["admin"]}, False),
    ],
)
async def test_scopes_go_with_bounds_at_creation_and_change(
    harness: Harness, manager: str, asked: dict[str, object], is_allowed: bool
) -> None:
    admin = "/admin/tenants/acme/keys"
    made = await harness.client.post(admin, json=asked, headers=bearer(ADMIN_KEY))
    _, plain = await make(harness, **{name: value for name, value in asked.items() if name != "scopes"})
    changed = await harness.client.patch(
        f"{admin}/{plain}", json={"scopes": asked["scopes"]}, headers=bearer(ADMIN_KEY)
    )
    if is_allowed:
        assert (made.status_code, changed.status_code) == (201, 200)
        assert changed.json()["scopes"] == asked["scopes"] == made.json()["key"]["scopes"]
    else:
        for refused in (made, changed):
            assert_problem(refused, 400, "invalid_request")


async def test_key_at_spend_cap_refused_with_retry_after(harness: Harness) -> None:
    rich = await harness.tenant()
    secret, _ = await make(harness, monthly_cap="100", daily_cap="0.007")
    reply = await harness.chat(secret, max_tokens=1)
    assert reply.status_code == 200
    assert reply.json()["receipt"]["cost_usd"] == "0.007000"
    refused = await harness.chat(secret, max_tokens=1)
    body = assert_problem(refused, 402, "spend_cap_reached")
    assert (body["cap"], body["spent"], body["limit_source"]) == ("0.007000", "0.007000", "key_day")
    assert str(body["resets_at"]) in str(body["detail"])
    assert 1 <= int(refused.headers["retry-after"]) <= 86_400
    assert (await harness.chat(rich)).status_code == 200, "the tenant's other keys go on"


async def test_answer_clamped_by_spend_cap(harness: Harness) -> None:
    await harness.tenant()
    secret, _ = await make(harness, daily_cap="0.009")
    reply = (await harness.chat(secret, max_tokens=5)).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["incomplete_details"]["reason"] == "spend_cap_reached"
    assert reply["receipt"]["cost_usd"] == "0.009000"


async def test_lower_limits_of_key_apply(harness: Harness) -> None:
    await harness.tenant(plan="free", usd="0")
    secret, _ = await make(harness, limits={"requests_per_minute": 600, "burst": 1, "concurrent_requests": 5})
    reply = await harness.chat(secret)
    assert reply.headers["x-ratelimit-limit-requests"] == "3"
    assert reply.headers["ratelimit-policy"] == '"requests";q=1;w=20;qu="requests"'
    assert_problem(await harness.chat(secret), 429, "rate_limit_exceeded")


@pytest.mark.parametrize(
    ("lines", "proxies", "address"),
    [
        (["192.0.2.1"], 0, ""),
        (["192.0.2.1"], 1, "192.0.2.1"),
        (["203.0.113.9, 192.0.2.1"], 1, "192.0.2.1"),  # what a client forges is further to the left
        (["203.0.113.9", "192.0.2.1 , 10.0.0.1"], 2, "192.0.2.1"),
        (["192.0.2.1"], 2, ""),  # fewer proxies than configured: not trusted
        ([], 1, ""),
    ],
)
def test_client_address_from_trusted_proxies(lines: list[str], proxies: int, address: str) -> None:
    assert client_address(lines, proxies) == address


async def test_throttled_key_shows_reason_and_manages_no_keys(harness: Harness, manager: str) -> None:
    tenants, key = harness.gateway.parts.tenants, (await harness.gateway.parts.tenants.principal(manager)).key.id
    why = Throttle(reason="many_addresses", detail="about 120 client addresses this hour", since_ms=1)
    await tenants.change_key(TenantId("acme"), key, lambda one: one.model_copy(update={"throttled": why}))
    account = await harness.client.get("/v1/account", headers=bearer(manager))
    assert account.json()["throttled"] == why.model_dump(mode="json")
    assert_problem(await own(harness, manager, "POST", name="x"), 403, "scope_missing")
    lifted = await harness.client.post(f"/admin/tenants/acme/keys/{key}/lift", headers=bearer(ADMIN_KEY))
    assert (lifted.status_code, lifted.json()["throttled"]) == (200, None)
    assert (await own(harness, manager, "POST", name="x")).status_code == 201


async def test_client_addresses_counted_behind_trusted_proxy(harness: Harness) -> None:
    key = await harness.tenant()
    harness.gateway.config = replace(harness.gateway.config, trusted_proxies=1)
    for number in range(3):
        forged = {"x-forwarded-for": f"203.0.113.{number}, 192.0.2.{number % 2}"}
        await harness.client.get("/v1/models", headers=bearer(key) | forged)
    parts = harness.gateway.parts
    address_sketches, owner = parts.address_sketches, await parts.tenants.principal(key)
    await address_sketches.flush()
    used = (owner.tenant.id, owner.key.id)
    assert await address_sketches.counts({used: [used]}) == {used: 2}
