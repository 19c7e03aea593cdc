"""Every event type that the SDK knows, signed, in random order, several at once and more than once: one final state.

What happened at Dodo is a small scene of eight customers; what must be known of each here is written down by hand.
"""

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import pytest
from dodopayments.types.webhook_event_type import WebhookEventType

from billing.catalog import publication
from billing.catalog.catalog import Catalog
from billing.commerce.inbox import Outcome
from billing.commerce.licences import ENTITLEMENT
from billing.commerce.sync import sync
from billing.notices.log import Notices
from billing.tenants.tenant import Tenant
from billing.usage import TenantId
from tests.support.purchases import AUTH, buy_as_stranger
from tests.support.world import CATALOG, HOUR, World, delivery

pytestmark = pytest.mark.slow

TYPES: tuple[str, ...] = get_args(WebhookEventType)
USD = 1_000_000_000
AT_ONCE = 8
COPIES = 2
PLANS = {
    "prepaid": {"kind": "prepaid"},
    "payg": {"kind": "pay_as_you_go", "credit_limit": "25", "grace_days": 2, "licence_key": True},
    "pro": {"kind": "subscription", "allowance": {"usd": "10"}, "credit_limit": "50", "monthly_price": "20"},
}
PACKS = {
    "small": {"price": "5", "grants": {"usd": "5"}, "expires_days": 30},
    "keyed": {"price": "5", "grants": {"usd": "5"}, "licence_key": True},
}
KEPT = {"payment.processing", "payment.cancelled", "refund.failed", "license_key.created", "made.up"} | {
    type_ for type_ in TYPES if type_.startswith(("payout.", "credit.", "abandoned_checkout."))
}
"""Nothing here depends on them."""


@dataclass(frozen=True)
class Known:
    """What must be known of one customer in the end."""

    nanos: int = 0
    plan: str = "prepaid"
    status: str = ""
    keys: int = 0
    """That would be let in."""


MODEL = {
    "acme": Known(nanos=(15 - 2 + 5 + 0) * USD),  # three packs, $2 refunded; one disputed and won; one lost
    "paying": Known(plan="payg", status="active", keys=1),
    "late": Known(plan="payg", status="past_due", keys=1),
    "held": Known(plan="pro", status="on_hold"),
    "resting": Known(plan="pro", status="paused"),
    "gone": Known(plan="prepaid", status="cancelled"),
    "stranger": Known(nanos=5 * USD, keys=1),
    "refunded": Known(),
}
NOTICES = [
    ("acme", "payment.failed"),
    ("held", "subscription.on_hold"),
    ("late", "subscription.past_due"),
    ("held", "dunning.started"),
    ("held", "dunning.recovered"),
    ("acme", "refund.succeeded"),
    ("refunded", "refund.succeeded"),
] + 2 * [("acme", f"dispute.{name}") for name in ("opened", "won", "lost", "cancelled", "accepted", "expired")]
"""Of each of two disputes there is an event of every type."""
Event = tuple[str, dict[str, object]]


class Scene:
    """What happens at Dodo, and the events of it. Nothing is delivered yet."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.payments: list[str] = []
        self.subscriptions: dict[str, str] = {}
        self.disputes: list[dict[str, object]] = []
        self.refunds: list[dict[str, object]] = []
        self.failed: dict[str, object] = {}

    async def play(self) -> None:
        for name in ("acme", "paying", "late", "held", "resting", "gone"):
            await self.world.tenant(name)
        await self._packs()
        await self._subscriptions()
        self.payments.append(
            str((await buy_as_stranger(self.world, "pack:keyed", "stranger@example.com"))["payment_id"])
        )
        given_back = str((await buy_as_stranger(self.world, "pack:keyed", "refunded@example.com"))["payment_id"])
        self.payments.append(given_back)
        self.refunds.append(await self.post("/refunds", payment_id=given_back))

    async def _packs(self) -> None:
        bought = [await self.world.buy("acme", "pack:small", quantity) for quantity in (3, 1, 1)]
        first, won, lost = (str(payment["payment_id"]) for payment in bought)
        self.payments += [first, won, lost]
        lines = (await self.get(f"/payments/{first}/line-items"))["items"]
        item = {"item_id": lines[0]["items_id"], "amount": 200}  # type: ignore[index]
        self.refunds.append(await self.post("/refunds", payment_id=first, items=[item]))
        for payment_id, ending in ((won, "won"), (lost, "lost")):
            opened = await self.post(f"/_sandbox/disputes/{payment_id}")
            self.disputes.append(await self.post(f"/_sandbox/disputes/{opened['dispute_id']}/{ending}"))
        await self._card("acme", declines=True)
        tenant = await self.world.tenants.get(TenantId("acme"))
        url = await self.world.dodo.checkout(tenant, await self.world.product("pack:small"), {}, "http://127.0.0.1/")
        self.failed = await self.post(f"/_sandbox/pay/{url.rpartition('/')[2]}")

    async def _subscriptions(self) -> None:
        plans = {"paying": "payg", "late": "payg", "held": "pro", "resting": "pro", "gone": "pro"}
        for name, plan in plans.items():
            payment = await self.world.buy(name, f"plan:{plan}")
            self.payments.append(str(payment["payment_id"]))
            self.subscriptions[name] = str(payment["subscription_id"])
        for name, grace_days in (("late", 7), ("held", 0)):
            await self.post("/_sandbox/settings", past_due_grace_days=grace_days)
            await self._card(name, declines=True)
            await self.post(f"/_sandbox/subscriptions/{self.subscriptions[name]}/renew")
        await self._patch("resting", status="paused")
        await self._patch("gone", status="cancelled")

    async def _card(self, name: str, declines: bool) -> None:
        customer = (await self.world.tenants.get(TenantId(name))).dodo_customer_id
        await self.post(f"/_sandbox/customers/{customer}/card", declines=declines)

    async def _patch(self, name: str, **change: object) -> None:
        path = f"/subscriptions/{self.subscriptions[name]}"
        (await self.world.operator.patch(path, json=change, headers=AUTH)).raise_for_status()

    async def get(self, path: str) -> dict[str, object]:
        found: dict[str, object] = (await self.world.operator.get(path, headers=AUTH)).raise_for_status().json()
        return found

    async def post(self, path: str, **body: object) -> dict[str, object]:
        answer = await self.world.operator.post(path, json=body, headers=AUTH)
        made: dict[str, object] = answer.raise_for_status().json()
        return made

    async def events(self) -> list[Event]:
        """At least one of every type, each with the object as Dodo has it now: payloads are the latest."""
        payments = [await self.get(f"/payments/{one}") for one in self.payments]
        subscriptions = {name: await self.get(f"/subscriptions/{id_}") for name, id_ in self.subscriptions.items()}
        entitlement = await self.world.product(ENTITLEMENT)
        grants = (await self.get(f"/entitlements/{entitlement}/grants?page_size=100"))["items"]
        held = subscriptions["held"]
        dunning = {"customer_id": held["customer"]["customer_id"], "subscription_id": self.subscriptions["held"]}  # type: ignore[index]
        about: dict[str, list[dict[str, object]]] = {
            "payment.succeeded": payments,
            "payment.failed": [self.failed],
            "subscription.on_hold": [held],
            "subscription.past_due": [subscriptions["late"]],
            "refund.succeeded": self.refunds,
            "subscription.": list(subscriptions.values()),
            "dispute.": self.disputes,
            "entitlement_grant.": list(grants),  # type: ignore[call-overload]
            "dunning.": [dunning | {"trigger_state": "on_hold", "created_at": "2026-11-26T00:00:00Z"}],
            "": [payments[0] | {"status": "processing"}],
        }
        return [(type_, data) for type_ in (*TYPES, "made.up") for data in _about(type_, about)]


def _about(type_: str, about: dict[str, list[dict[str, object]]]) -> Iterator[dict[str, object]]:
    """The objects of the longest name that the type begins with."""
    yield from about[max((name for name in about if type_.startswith(name)), key=len)]


@pytest.fixture
async def shop(world: World) -> World:
    world.catalog = Catalog.model_validate(CATALOG | {"plans": PLANS, "packs": PACKS})
    await world.redis.flushall()
    for product in (await world.operator.get("/products?page_size=100", headers=AUTH)).json()["items"]:
        (await world.operator.delete(f"/products/{product['product_id']}", headers=AUTH)).raise_for_status()
    await publication.publish(world.redis, world.catalog, "gateway-1", world.clock())
    await sync(world.dodo, world.redis, world.catalog)
    return world


async def deliver(world: World, events: list[Event], chance: random.Random) -> None:
    """Each event more than once, several at the same time, on two gateways; then what waits is tried again."""
    signed = [delivery(type_, data, f"msg_{number}") for number, (type_, data) in enumerate(events)] * COPIES
    chance.shuffle(signed)
    gateways = [world.webhooks(), world.webhooks()]
    for start in range(0, len(signed), AT_ONCE):
        some = enumerate(signed[start : start + AT_ONCE])
        await asyncio.gather(*(gateways[number % 2].receive(*one) for number, one in some))
    while await gateways[0].inbox.parked_count():
        world.clock.move(HOUR)
        assert await gateways[0].replay(world.sweep()), [one.reason for one in await gateways[0].inbox.parked()]


async def known(world: World, tenant: Tenant) -> Known:
    keys = [key for key in await world.tenants.keys(tenant.id) if key.is_usable(world.clock())]
    status = tenant.subscription.status.value if tenant.subscription else ""
    return Known((await world.ledger.account(tenant.id)).balance_nanos, tenant.plan, status, len(keys))


@pytest.mark.parametrize("seed", range(4))
async def test_every_type_in_any_order_reaches_the_same_state(shop: World, seed: int) -> None:
    scene = Scene(shop)
    await scene.play()
    events = await scene.events()
    assert {type_ for type_, _ in events} == {*TYPES, "made.up"}
    await deliver(shop, events, random.Random(seed))
    tenants = await shop.tenants.list()
    assert {tenant.email.partition("@")[0]: await known(shop, tenant) for tenant in tenants} == MODEL
    names = {tenant.id: tenant.email.partition("@")[0] for tenant in tenants}
    found = [(names[notice.tenant], notice.kind.value) for notice in await Notices(shop.redis).newest()]
    assert sorted(found) == sorted(NOTICES)
    for number, (type_, _) in enumerate(events):
        kept = await shop.webhooks().inbox.get(f"msg_{number}")
        assert kept is not None
        assert kept.outcome is (Outcome.KEPT if type_ in KEPT else Outcome.APPLIED), (type_, kept.reason)
