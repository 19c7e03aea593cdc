"""A licence key that Dodo hands out is an API key here until Dodo revokes it; a buyer becomes a tenant."""

import random

import httpx
import pytest

from billing.catalog.catalog import Catalog
from billing.commerce.inbox import Outcome
from billing.commerce.licences import ENTITLEMENT, ROTATION_GRACE_MS
from billing.commerce.signups import tenant_id_for
from billing.commerce.sync import sync
from billing.dodo.wire import LicenceGrant
from billing.tenants.directory import Tenants
from billing.tenants.errors import InvalidKey
from billing.tenants.tenant import BUYER_SCOPES, ApiKey
from billing.usage import TenantId
from tests.support.purchases import AUTH, buy_as_stranger
from tests.support.sandbox_world import ONCE
from tests.support.world import CATALOG, World, delivery

USD = 1_000_000_000
WITH_KEYS = CATALOG | {
    "plans": {name: plan | {"licence_key": plan["kind"] != "prepaid"} for name, plan in CATALOG["plans"].items()},  # type: ignore[attr-defined]
    "packs": {"keyed": {"price": "5", "grants": {"usd": "5"}, "licence_key": True}},
}


@pytest.fixture
async def keyed(world: World) -> World:
    """A shop whose products hand out licence keys."""
    world.catalog = Catalog.model_validate(WITH_KEYS)
    await world.redis.flushall()
    for product in (await world.operator.get("/products?page_size=100", headers=AUTH)).json()["items"]:
        (await world.operator.delete(f"/products/{product['product_id']}", headers=AUTH)).raise_for_status()
    await sync(world.dodo, world.redis, world.catalog)
    return world


async def grants(world: World) -> list[dict[str, object]]:
    """Every grant as Dodo has it now, the oldest first."""
    entitlement = await world.product(ENTITLEMENT)
    listed = await world.operator.get(f"/entitlements/{entitlement}/grants?page_size=100", headers=AUTH)
    found: list[dict[str, object]] = listed.json()["items"]
    return found[::-1]


async def apply(world: World, grant: dict[str, object], kind: str = "delivered", number: int = 0) -> Outcome:
    signed = delivery(f"entitlement_grant.{kind}", grant, f"msg_{grant['id']}_{kind}_{number}")
    return (await world.webhooks().receive(*signed)).outcome


async def opens(world: World, grant: dict[str, object]) -> bool:
    """Would this key be let in? Asked without what a process remembers."""
    secret = str(grant["license_key"]["key"])  # type: ignore[index]
    try:
        return bool(await Tenants(world.redis, world.clock).principal(secret))
    except InvalidKey:
        return False


async def test_buyer_becomes_a_tenant_with_credit_and_key(keyed: World) -> None:
    payment = await buy_as_stranger(keyed, "pack:keyed")
    await keyed.webhooks().receive(*delivery("payment.succeeded", payment))
    (grant,) = await grants(keyed)
    assert await apply(keyed, grant) is Outcome.APPLIED
    assert await opens(keyed, grant)
    (tenant,) = await keyed.tenants.list()
    assert tenant.id == tenant_id_for("Ada.L@example.com", str(grant["customer_id"]))
    assert (tenant.email, tenant.plan, tenant.id[:6]) == ("Ada.L@example.com", "prepaid", "ada-l-")
    (key,) = await keyed.tenants.keys(tenant.id)
    assert (key.made_by, key.scopes) == ("dodo", BUYER_SCOPES), "its only key can buy again"
    assert (await keyed.ledger.account(tenant.id)).balance_nanos == 5 * USD


async def test_buyers_name_is_cleaned_of_control_characters(keyed: World) -> None:
    cart = [{"product_id": await keyed.product("pack:keyed"), "quantity": 1}]
    asked = {"product_cart": cart, "customer": {"email": "ada@example.com", "name": "Ada\r\nL.\x1b[31m"}}
    session = (await keyed.operator.post("/checkouts", json=asked, headers=AUTH)).json()
    paid = (await keyed.operator.post(f"/_sandbox/pay/{session['session_id']}")).json()
    await keyed.webhooks().receive(*delivery("payment.succeeded", paid))
    assert [tenant.name for tenant in await keyed.tenants.list()] == ["Ada L. [31m"]


async def test_key_may_come_before_the_payment(keyed: World) -> None:
    payment = await buy_as_stranger(keyed, "pack:keyed")
    (grant,) = await grants(keyed)
    for number in range(3):
        await apply(keyed, grant, "created", number)
        await apply(keyed, grant, "delivered", number)
    await keyed.webhooks().receive(*delivery("payment.succeeded", payment))
    (tenant,) = await keyed.tenants.list()
    assert len(await keyed.tenants.keys(tenant.id)) == 1
    assert (await keyed.ledger.account(tenant.id)).balance_nanos == 5 * USD


async def test_refund_expires_the_key(keyed: World) -> None:
    payment = await buy_as_stranger(keyed, "pack:keyed")
    (grant,) = await grants(keyed)
    await apply(keyed, grant)
    await keyed.operator.post(f"/_sandbox/refund/{payment['payment_id']}")
    (revoked,) = await grants(keyed)
    assert await apply(keyed, revoked, "revoked") is Outcome.APPLIED
    assert not await opens(keyed, grant)


async def test_revocation_before_delivery_leaves_no_key(keyed: World) -> None:
    payment = await buy_as_stranger(keyed, "pack:keyed")
    (grant,) = await grants(keyed)
    await keyed.operator.post(f"/_sandbox/refund/{payment['payment_id']}")
    await apply(keyed, grant, "revoked")
    await apply(keyed, grant, "delivered", 2)  # what it says is stale: Dodo is asked
    assert not await opens(keyed, grant)


async def subscribe(world: World) -> dict[str, object]:
    await world.tenant("acme")
    await world.buy("acme", "plan:pro")
    (grant,) = await grants(world)
    await apply(world, grant)
    assert await opens(world, grant)
    return grant


async def test_replaced_key_works_for_the_grace(keyed: World) -> None:
    old = await subscribe(keyed)
    change = {"product_id": await keyed.product("plan:payg"), "quantity": 1}
    change |= {"proration_billing_mode": "full_immediately"}
    path = f"/subscriptions/{old['subscription_id']}/change-plan"
    (await keyed.operator.post(path, json=change, headers=AUTH)).raise_for_status()
    messages = [(grant, kind) for grant in await grants(keyed) for kind in ("revoked", "delivered")]
    random.Random(5).shuffle(messages)
    for number, (grant, kind) in enumerate(messages):
        await apply(keyed, grant, kind, number)
    _, new = await grants(keyed)
    assert (await opens(keyed, old), await opens(keyed, new)) == (True, True)
    keyed.clock.move(ROTATION_GRACE_MS)
    assert (await opens(keyed, old), await opens(keyed, new)) == (False, True)


async def test_cancelled_subscription_expires_its_key(keyed: World) -> None:
    grant = await subscribe(keyed)
    path = f"/subscriptions/{grant['subscription_id']}"
    await keyed.operator.patch(path, json={"status": "cancelled"}, headers=AUTH)
    await apply(keyed, grant, "revoked", 9)
    assert not await opens(keyed, grant)


async def set_status(world: World, grant: dict[str, object], status: str) -> None:
    path = f"/subscriptions/{grant['subscription_id']}"
    (await world.operator.patch(path, json={"status": status}, headers=AUTH)).raise_for_status()


async def test_key_pauses_with_its_subscription(keyed: World) -> None:
    grant = await subscribe(keyed)
    for number in range(2):
        await set_status(keyed, grant, "paused")
        await apply(keyed, grant, "revoked", number)
        assert not await opens(keyed, grant)
        keyed.clock.move(3_600_000)
        await set_status(keyed, grant, "active")
        await apply(keyed, grant, "delivered", 10 + number)
        assert await opens(keyed, grant)


async def test_revoked_key_stays_revoked(keyed: World) -> None:
    grant = await subscribe(keyed)
    (key,) = await keyed.tenants.keys(TenantId("acme"))
    await keyed.tenants.revoke_key(TenantId("acme"), key.id)
    await set_status(keyed, grant, "paused")
    await apply(keyed, grant, "revoked", 1)
    await set_status(keyed, grant, "active")
    await apply(keyed, grant, "delivered", 2)
    assert not await opens(keyed, grant)


async def test_late_delivery_does_not_undo_a_revocation(keyed: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two deliveries of a new key at once; it is revoked between the read and the write of the slower one."""
    await keyed.tenant("acme")
    await keyed.buy("acme", "plan:pro")
    (grant,) = await grants(keyed)
    add = Tenants.add_key

    async def slowly(tenants: Tenants, key: ApiKey) -> None:
        monkeypatch.setattr(Tenants, "add_key", add)
        await apply(keyed, grant, "created")
        await tenants.revoke_key(key.tenant, key.id)
        await add(tenants, key)

    monkeypatch.setattr(Tenants, "add_key", slowly)
    await apply(keyed, grant)
    assert not await opens(keyed, grant)


@pytest.mark.parametrize("newest", ["paused", "active"])
async def test_older_answer_does_not_replace_a_newer_one(
    keyed: World, monkeypatch: pytest.MonkeyPatch, newest: str
) -> None:
    grant = await subscribe(keyed)
    if newest == "paused":
        await set_status(keyed, grant, "paused")
        await apply(keyed, grant, "revoked")
        await set_status(keyed, grant, "active")
    else:
        await set_status(keyed, grant, "paused")
    ask, asked = keyed.dodo.licence_grants, list[str]()

    async def overtaken(entitlement_id: str, customer_id: str) -> list[LicenceGrant]:
        answer = await ask(entitlement_id, customer_id)
        asked.append(customer_id)
        if len(asked) == 1:
            await set_status(keyed, grant, newest)
            await apply(keyed, grant, "revoked", 7)
        return answer

    monkeypatch.setattr(keyed.dodo, "licence_grants", overtaken)
    await apply(keyed, grant, "delivered", 8)
    assert await opens(keyed, grant) == (newest == "active")


async def test_key_revoked_by_the_merchant_expires(keyed: World) -> None:
    grant = await subscribe(keyed)
    await keyed.operator.delete(f"/entitlements/{grant['entitlement_id']}/grants/{grant['id']}", headers=AUTH)
    await apply(keyed, grant, "revoked", 9)
    assert not await opens(keyed, grant)


async def test_grant_of_another_entitlement_is_kept(world: World) -> None:
    grant = {"id": "entg_1", "entitlement_id": "ent_other", "customer_id": "cus_1", "status": "Delivered"}
    grant["license_key"] = {"id": "lic_1", "key": "K" * 32, "status": "active", "activations_used": 0}  # type: ignore[assignment]
    assert await apply(world, grant) is Outcome.KEPT
    assert not await opens(world, grant)


async def test_customer_without_our_products_is_no_tenant(world: World) -> None:
    price = ONCE | {"price": 500}
    made = {"name": "a mug", "price": price, "tax_category": "saas"}
    mug = (await world.operator.post("/products", json=made, headers=AUTH)).json()
    cart = [{"product_id": mug["product_id"], "quantity": 1}]
    asked = {"product_cart": cart, "customer": {"email": "b@example.com", "name": "B"}}
    session = (await world.operator.post("/checkouts", json=asked, headers=AUTH)).json()
    payment = (await world.operator.post(f"/_sandbox/pay/{session['session_id']}")).json()
    done = await world.webhooks().receive(*delivery("payment.succeeded", payment))
    assert done.outcome is Outcome.SET_ASIDE
    assert await world.tenants.list() == []


@pytest.mark.parametrize(
    ("email", "start"),
    [("a@x.io", "a-"), ("Ünï Code@x.io", "n-code-"), ("@x.io", "buyer-"), ("a" * 99 + "@x", "a" * 40 + "-")],
)
def test_id_of_a_signup_is_readable_and_stable(email: str, start: str) -> None:
    made = tenant_id_for(email, "cus_1")
    assert made == tenant_id_for(email, "cus_1") != tenant_id_for(email, "cus_2")
    assert made.startswith(start)
    assert isinstance(made, str)
    assert TenantId(made)


async def test_public_licence_routes_ask_for_no_api_key(keyed: World) -> None:
    grant = await subscribe(keyed)
    key = grant["license_key"]["key"]  # type: ignore[index]
    async with httpx.AsyncClient(base_url=str(keyed.operator.base_url), trust_env=False) as public:
        made = await public.post("/licenses/activate", json={"license_key": key, "name": "laptop"})
        assert (made.status_code, made.json()["customer"]["customer_id"]) == (201, grant["customer_id"])
        named = {"license_key": key, "license_key_instance_id": made.json()["id"]}
        assert (await public.post("/licenses/validate", json=named)).json() == {"valid": True}
        assert (await public.post("/licenses/deactivate", json=named)).status_code == 200
        assert (await public.post("/licenses/validate", json=named)).json() == {"valid": False}
        unknown = await public.post("/licenses/activate", json={"license_key": "nope", "name": "x"})
        assert (unknown.status_code, unknown.json()["code"]) == (404, "LICENSE_KEY_NOT_FOUND")
