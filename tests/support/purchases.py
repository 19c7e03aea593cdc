"""Short ways to buy, subscribe and refund at the offline Dodo, and to look at what the ledger made of it."""

from billing.commerce.webhooks import Webhooks
from billing.usage import TenantId
from tests.support.world import API_KEY, World, delivery

ACME = TenantId("acme")
USD = 1_000_000_000
AUTH = {"Authorization": f"Bearer {API_KEY}"}


async def balance(world: World, tenant: TenantId = ACME) -> int:
    return (await world.ledger.account(tenant)).balance_nanos


async def refund(world: World, payment: dict[str, object], cents: int | None = None) -> dict[str, object]:
    """Refund a payment at Dodo, all of it or so many cents; the refund as Dodo has it."""
    items = None
    if cents is not None:
        lines = (await world.operator.get(f"/payments/{payment['payment_id']}/line-items", headers=AUTH)).json()
        items = [{"item_id": lines["items"][0]["items_id"], "amount": cents}]
    asked = {"payment_id": payment["payment_id"], "items": items}
    made = await world.operator.post("/refunds", json=asked, headers=AUTH)
    made.raise_for_status()
    value: dict[str, object] = made.json()
    return value


async def buy_as_stranger(world: World, name: str, email: str = "Ada.L@example.com") -> dict[str, object]:
    """What a hosted payment link does: a cart and an email, no customer of ours."""
    cart = [{"product_id": await world.product(name), "quantity": 1}]
    asked = {"product_cart": cart, "customer": {"email": email, "name": "Ada"}}
    session = (await world.operator.post("/checkouts", json=asked, headers=AUTH)).json()
    paid: dict[str, object] = (await world.operator.post(f"/_sandbox/pay/{session['session_id']}")).json()
    return paid


async def subscribe(world: World, plan: str, tenant: str = "acme") -> str:
    """Subscribe at Dodo, without any webhook; the subscription's id."""
    payment = await world.buy(tenant, f"plan:{plan}")
    assert payment["status"] == "succeeded"
    return str(payment["subscription_id"])


async def pause(world: World, webhooks: Webhooks, tenant: str = "acme") -> str:
    """A new subscription of this tenant that is paused, as its webhook says; the subscription's id."""
    started = await subscribe(world, "payg", tenant)
    await world.operator.patch(f"/subscriptions/{started}", json={"status": "paused"}, headers=AUTH)
    await webhooks.receive(*delivery("subscription.paused", {"subscription_id": started}, f"msg_{started}"))
    return started


async def items(world: World, path: str) -> list[dict[str, object]]:
    """What Dodo lists under a path, the newest first."""
    found: list[dict[str, object]] = (await world.operator.get(f"{path}?page_size=100", headers=AUTH)).json()["items"]
    return found


async def patch_subscription(world: World, subscription_id: str, **change: object) -> None:
    """Change a subscription at Dodo, without any webhook."""
    (await world.operator.patch(f"/subscriptions/{subscription_id}", json=change, headers=AUTH)).raise_for_status()
