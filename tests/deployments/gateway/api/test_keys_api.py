"""Keys that a tenant manages itself, and what a key's own caps and limits do to its requests."""

import httpx
import pytest
from deployments.gateway.services import client_address

from billing.tenants.tenant import Throttle, new_key
from billing.usage import TenantId
from tests.deployments.gateway.api.test_refusals import check
from tests.support.gateway import ADMIN_KEY, House, bearer

Reply = httpx.Response


async def make(house: House, **asked: object) -> tuple[str, str]:
    """A key that the operator makes for acme: its secret and its id."""
    reply = await house.client.post("/admin/tenants/acme/keys", json=asked, headers=bearer(ADMIN_KEY))
    assert reply.status_code == 201, reply.text
    return reply.json()["api_key"], reply.json()["key"]["id"]


async def own(house: House, key: str, method: str, path: str = "", **body: object) -> Reply:
    return await house.client.request(method, f"/v1/keys{path}", headers=bearer(key), json=body or None)


@pytest.fixture
async def manager(house: House) -> str:
    await house.tenant()
    return (await make(house, manages_keys=True))[0]


async def test_a_tenant_makes_rotates_and_revokes_its_keys_itself(house: House, manager: str) -> None:
    made = (await own(house, manager, "POST", name="ci", models=["gratis"], daily_cap="1.50")).json()
    assert (await house.chat(made["api_key"], model="gratis")).status_code == 200
    check(await house.chat(made["api_key"]), 403, "model_not_allowed")
    rotated = await own(house, manager, "POST", f"/{made['key']['id']}/rotate", grace_hours=0)
    assert rotated.status_code == 201
    body = check(await house.chat(made["api_key"], model="gratis"), 401, "invalid_api_key")
    assert "expired" in str(body["detail"])
    assert (await house.chat(rotated.json()["api_key"], model="gratis")).status_code == 200
    new = rotated.json()["key"]
    assert (new["models"], new["daily_cap"], new["counts_as"]) == (["gratis"], "1.500000", made["key"]["id"])
    assert (await own(house, manager, "DELETE", f"/{new['id']}")).json()["revoked_at_ms"]
    check(await house.chat(rotated.json()["api_key"], model="gratis"), 401, "invalid_api_key")
    listed = (await own(house, manager, "GET")).json()["data"]
    assert {made["key"]["id"], new["id"]} < {key["id"] for key in listed}
    assert not any("hash" in key for key in listed)


async def test_the_old_secret_works_until_its_grace_is_over(house: House, manager: str) -> None:
    secret, key = await make(house)
    rotated = await own(house, manager, "POST", f"/{key}/rotate", grace_hours=1)
    assert (await house.chat(secret)).status_code == 200
    assert (await house.chat(rotated.json()["api_key"])).status_code == 200
    check(await own(house, manager, "POST", "/key_none/rotate", grace_hours=1), 404, "key_not_found")
    await own(house, manager, "DELETE", f"/{key}")
    check(await own(house, manager, "POST", f"/{key}/rotate", grace_hours=1), 409, "key_not_rotated")


async def test_an_ordinary_key_manages_none(house: House, manager: str) -> None:
    secret, key = await make(house)
    for method, path in (("GET", ""), ("POST", ""), ("DELETE", f"/{key}"), ("POST", f"/{key}/rotate")):
        body = check(
            await own(house, secret, method, path, **({"name": "x"} if method == "POST" and not path else {})),
            403,
            "keys_not_managed",
        )
        assert "manages_keys" in str(body["detail"])


async def test_a_tenant_reaches_no_other_s_keys(house: House, manager: str) -> None:
    await house.tenant("other")
    other, stored = new_key(TenantId("other"), 0)
    await house.services.tenants.add_key(stored)
    check(await own(house, manager, "DELETE", f"/{stored.id}"), 404, "key_not_found")
    assert (await house.chat(other)).status_code == 200


async def test_a_key_that_manages_keys_has_no_bounds_and_ends_with_what_it_makes(house: House, manager: str) -> None:
    for bound in ({"daily_cap": "1"}, {"models": ["gratis"]}, {"limits": {"concurrent_requests": 1}}):
        check(await own(house, manager, "POST", manages_keys=True, **bound), 400, "invalid_request")
    brief, _ = await make(house, manages_keys=True, expires_days=1)
    made = (await own(house, brief, "POST", expires_days=30)).json()["key"]
    assert made["expires_at_ms"] - made["created_at_ms"] <= 24 * 3_600_000


async def test_a_key_at_its_cap_is_told_when_it_may_go_on(house: House) -> None:
    rich = await house.tenant()
    secret, _ = await make(house, monthly_cap="100", daily_cap="0.007")
    reply = await house.chat(secret, max_tokens=1)
    assert reply.status_code == 200
    assert reply.json()["receipt"]["cost_usd"] == "0.007000"
    refused = await house.chat(secret, max_tokens=1)
    body = check(refused, 402, "spend_cap_reached")
    assert (body["cap"], body["spent"], body["limit_source"]) == ("0.007000", "0.007000", "key_day")
    assert str(body["resets_at"]) in str(body["detail"])
    assert 1 <= int(refused.headers["retry-after"]) <= 86_400
    assert (await house.chat(rich)).status_code == 200, "the tenant's other keys go on"


async def test_an_answer_ends_where_its_key_s_cap_does(house: House) -> None:
    await house.tenant()
    secret, _ = await make(house, daily_cap="0.009")
    reply = (await house.chat(secret, max_tokens=5)).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["incomplete_details"]["reason"] == "spend_cap_reached"
    assert reply["receipt"]["cost_usd"] == "0.009000"


async def test_a_key_s_own_limits_count_where_they_are_lower(house: House) -> None:
    await house.tenant(plan="free", usd="0")
    secret, _ = await make(house, limits={"requests_per_minute": 600, "burst": 1, "concurrent_requests": 5})
    reply = await house.chat(secret)
    assert reply.headers["x-ratelimit-limit-requests"] == "3"
    assert reply.headers["ratelimit-policy"] == '"requests";q=1;w=20;qu="requests"'
    check(await house.chat(secret), 429, "rate_limit_exceeded")


@pytest.mark.parametrize(
    ("lines", "proxies", "address"),
    [
        (["192.0.2.1"], 0, ""),
        (["192.0.2.1"], 1, "192.0.2.1"),
        (["203.0.113.9, 192.0.2.1"], 1, "192.0.2.1"),  # what a client forges stands further left
        (["203.0.113.9", "192.0.2.1 , 10.0.0.1"], 2, "192.0.2.1"),
        (["192.0.2.1"], 2, ""),  # who came past a proxy is not known
        ([], 1, ""),
    ],
)
def test_a_client_s_address_is_what_the_outermost_of_our_proxies_saw(
    lines: list[str], proxies: int, address: str
) -> None:
    assert client_address(lines, proxies) == address


async def test_a_key_in_quarantine_sees_why_and_may_manage_no_keys_until_it_is_lifted(
    house: House, manager: str
) -> None:
    tenants, key = house.services.tenants, (await house.services.tenants.principal(manager)).key.id
    why = Throttle(reason="many_addresses", detail="about 120 client addresses this hour", since_ms=1)
    await tenants.change_key(TenantId("acme"), key, lambda one: one.model_copy(update={"throttled": why}))
    account = await house.client.get("/v1/account", headers=bearer(manager))
    assert account.json()["throttled"] == why.model_dump(mode="json")
    check(await own(house, manager, "POST", name="x"), 403, "keys_not_managed")
    lifted = await house.client.post(f"/admin/tenants/acme/keys/{key}/lift", headers=bearer(ADMIN_KEY))
    assert (lifted.status_code, lifted.json()["throttled"]) == (200, None)
    assert (await own(house, manager, "POST", name="x")).status_code == 201


async def test_addresses_are_counted_where_a_proxy_is_trusted(house: House) -> None:
    key = await house.tenant()
    services = house.services
    object.__setattr__(services, "trusted_proxies", 1)
    for number in range(3):
        forged = {"x-forwarded-for": f"203.0.113.{number}, 192.0.2.{number % 2}"}
        await house.client.get("/v1/models", headers=bearer(key) | forged)
    address_sketches, owner = services.gateway.address_sketches, await services.tenants.principal(key)
    await address_sketches.flush()
    used = (owner.tenant.id, owner.key.id)
    assert await address_sketches.counts([used]) == {used: 2}
