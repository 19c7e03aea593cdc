"""Every route asks for a scope of the caller's key, and a key without it is refused by name."""

from pathlib import Path

import httpx
import pytest

from billing.commerce.auto_refill.store import Refills
from billing.tenants.tenant import BILLING, Scope, Throttle
from billing.usage import TenantId
from deployments.gateway.api.application import make_routes
from deployments.gateway.api.document import document_of
from deployments.gateway.api.scopes import SCOPES
from tests.support.gateway import ADMIN_KEY, Harness, assert_problem, bearer

OPEN = {("GET", "/healthz"), ("GET", "/readyz"), ("POST", "/webhooks/dodo")}
OPEN |= {("GET", "/top-up/{link}"), ("POST", "/top-up/{link}"), ("GET", "/paid/{link}")}
"""Routes without a key: probes, the webhook, which is signed, and pages whose link is a right of its own."""
ROUTES = [
    (method.upper(), path, operation)
    for path, operations in document_of(make_routes())["paths"].items()
    for method, operation in operations.items()
]
REFILL = {"pack": "small", "threshold_usd": "1.00", "monthly_cap_usd": "20"}


@pytest.mark.parametrize(("method", "path", "operation"), ROUTES, ids=[f"{m} {p}" for m, p, _ in ROUTES])
def test_route_declares_its_scope(method: str, path: str, operation: dict[str, object]) -> None:
    if (method, path) in OPEN:
        assert "security" not in operation
    elif path.startswith("/admin/"):
        assert operation["security"] == [{"AdminKey": []}]
    else:
        assert operation["security"] == [{"ApiKey": [SCOPES[method, path].value]}]


def test_table_of_scopes_names_every_route() -> None:
    table = (Path(__file__).parents[4] / "docs" / "api.md").read_text().partition("## Scopes")[2].partition("## ")[0]
    rows = {scope: next(row for row in table.splitlines() if row.startswith(f"| `{scope}` | ")) for scope in Scope}
    for (method, path), scope in SCOPES.items():
        written = path.replace("{model_id}", "{id}").replace("{key_id}", "{id}")
        assert f"{written}`" in rows[scope], path
        assert method in rows[scope], path


@pytest.mark.parametrize(("route", "scope"), SCOPES.items(), ids=[" ".join(route) for route in SCOPES])
async def test_route_refused_to_key_without_its_scope(harness: Harness, route: tuple[str, str], scope: Scope) -> None:
    key = await harness.tenant(scopes=tuple(one for one in Scope if one is not scope))
    method, path = route
    reply = await harness.client.request(method, path.format(model_id="pirate", key_id="key_1"), headers=bearer(key))
    body = assert_problem(reply, 403, "scope_missing")
    assert f"`{scope.value}`" in str(body["detail"])
    assert "operator" in str(body["detail"])


@pytest.mark.parametrize(("route", "scope"), SCOPES.items(), ids=[" ".join(route) for route in SCOPES])
async def test_route_open_to_key_with_its_scope_alone(harness: Harness, route: tuple[str, str], scope: Scope) -> None:
    key = await harness.tenant(scopes=(scope,))
    method, path = route
    reply = await harness.client.request(method, path.format(model_id="pirate", key_id="key_1"), headers=bearer(key))
    assert reply.status_code not in (401, 403, 500), reply.text


async def buying(harness: Harness, key: str) -> list[httpx.Response]:
    """What charges a card or changes what is paid for."""
    return [
        await harness.client.put("/v1/account/auto-refill", json=REFILL, headers=bearer(key)),
        await harness.client.delete("/v1/account/auto-refill", headers=bearer(key)),
        await harness.client.get("/v1/account/auto-refill", headers=bearer(key)),
        await harness.client.get("/v1/invoices", headers=bearer(key)),
        await harness.post(key, "/v1/portal"),
        await harness.post(key, "/v1/checkout", pack="small"),
    ]


async def test_capped_key_charges_no_card(harness: Harness) -> None:
    await harness.tenant()
    asked = {"models": ["pirate"], "daily_cap": "0.01"}
    made = await harness.client.post("/admin/tenants/acme/keys", json=asked, headers=bearer(ADMIN_KEY))
    for reply in await buying(harness, made.json()["api_key"]):
        assert_problem(reply, 403, "scope_missing")
    assert await Refills(harness.gateway.parts.redis).get(TenantId("acme")) is None


async def test_throttle_suspends_billing_until_lifted(harness: Harness) -> None:
    secret = await harness.tenant()
    tenants = harness.gateway.parts.tenants
    key = (await tenants.principal(secret)).key
    why = Throttle(reason="many_addresses", detail="about 120 client addresses this hour", since_ms=1)
    await tenants.change_key(key.tenant, key.id, lambda one: one.model_copy(update={"throttled": why}))
    for reply in await buying(harness, secret):
        body = assert_problem(reply, 403, "scope_missing")
        assert "throttled" in str(body["detail"])
    account = await harness.client.get("/v1/account", headers=bearer(secret))
    assert account.json()["throttled"]["reason"] == why.reason
    assert (await harness.chat(secret)).status_code == 200
    await tenants.lift_key(key.tenant, key.id)
    assert (await buying(harness, secret))[0].status_code == 200


async def test_changed_scopes_are_in_force(harness: Harness) -> None:
    secret = await harness.tenant()
    key = (await harness.gateway.parts.tenants.principal(secret)).key
    for scopes, status in ((["inference"], 403), ([*BILLING], 200)):
        changed = await harness.client.patch(
            f"/admin/tenants/acme/keys/{key.id}", json={"scopes": scopes}, headers=bearer(ADMIN_KEY)
        )
        assert changed.json()["scopes"] == scopes
        assert (await buying(harness, secret))[0].status_code == status
