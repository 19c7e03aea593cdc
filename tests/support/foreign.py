"""What the merchant sells at the offline Dodo besides farebox, how it is bought, and webhooks about it."""

from billing.commerce.inbox import Delivery
from tests.support.purchases import AUTH
from tests.support.world import World, delivery

ONE_TIME = {"type": "one_time_price", "price": 900, "currency": "USD", "discount": 0, "purchasing_power_parity": False}
MONTHLY = {
    "type": "recurring_price",
    "payment_frequency_count": 1,
    "payment_frequency_interval": "Month",
    "subscription_period_count": 1,
    "subscription_period_interval": "Year",
}


async def product(world: World, name: str = "My e-book", tag: str = "", **price: object) -> str:
    """A product at Dodo that our own sync did not make; its id."""
    asked = {
        "name": name,
        "price": {**ONE_TIME, **price},
        "tax_category": "saas",
        "metadata": {"farebox": tag} if tag else {},
    }
    made = await world.operator.post("/products", json=asked, headers=AUTH)
    return str(made.raise_for_status().json()["product_id"])


async def pay(world: World, cart: dict[str, int], customer: str = "") -> dict[str, object]:
    """A checkout that no farebox began, paid; the payment as Dodo has it."""
    buyer = {"customer_id": customer} if customer else {"email": "reader@example.com", "name": "R"}
    items = [{"product_id": id_, "quantity": quantity} for id_, quantity in cart.items()]
    session = await world.operator.post("/checkouts", json={"product_cart": items, "customer": buyer}, headers=AUTH)
    paid = await world.operator.post(f"/_sandbox/pay/{session.raise_for_status().json()['session_id']}")
    payment: dict[str, object] = paid.raise_for_status().json()
    return payment


async def receive(world: World, type_: str, data: dict[str, object], webhook_id: str = "msg_1") -> Delivery:
    return await world.webhooks().receive(*delivery(type_, data, webhook_id))
