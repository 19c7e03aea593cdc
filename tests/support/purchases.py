"""Short ways to buy, subscribe and refund at the offline Dodo, and to look at what the ledger made of it."""

from dataclasses import replace
from uuid import uuid4

from billing.commerce.webhooks import Webhooks
from billing.dodo.call_budget import CallBudget
from billing.ledger.account import Account, Funding
from billing.ledger.admission import funding_for, plan_of
from billing.pricing.prices import Price
from billing.reconcile.reconciler import Reconciler, Report
from billing.usage import TenantId, Usage
from tests.support.samples import request, settlement
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


async def funding(world: World, tenant: TenantId = ACME) -> Funding:
    """What plan and subscription give the tenant now."""
    stored = await world.tenants.get(tenant)
    return funding_for(stored, plan_of(stored, world.catalog), world.clock())


async def account(world: World, tenant: TenantId = ACME) -> Account:
    """The account as a request would find it now."""
    return await world.ledger.account(tenant, await funding(world, tenant))


async def spend(world: World, usd: str, tenant: TenantId = ACME) -> None:
    """One request that costs so many dollars, from hold to settle. Raises what refuses it."""
    id_, price = f"req_{uuid4().hex}", Price.model_validate({"per_request": usd})
    asked = request(id_, tenant=tenant, price=price, funding=await funding(world, tenant))
    await world.ledger.hold(asked)
    usage = Usage(prompt_tokens=10, completion_tokens=5)
    await world.ledger.settle(replace(settlement(id_), tenant=tenant, usage=usage, list_nanos=price.charge(usage)))


async def reconcile(world: World) -> Report:
    """Entries, credit, holds and exposure compared, without asking Dodo."""
    return await Reconciler(world.redis, None, None, CallBudget(100_000, world.clock), world.clock, True).run()
