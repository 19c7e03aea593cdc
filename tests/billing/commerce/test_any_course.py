"""Whatever tenant, owner and bank do with subscriptions, and in whatever order Dodo tells of it: what must hold."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from billing.catalog.catalog import Catalog
from billing.commerce.doubles import DOUBLED
from billing.commerce.plan_changes import PlanChangeRefused, PlanChanges
from billing.commerce.sync import sync
from billing.dodo.errors import DodoRefused
from billing.ledger.errors import InsufficientCredits
from billing.notices.log import Notices
from billing.notices.notice import NoticeKind
from tests.support.purchases import ACME, account, items, patch_subscription, reconcile, refund, spend
from tests.support.world import CATALOG, DAY, HOUR, World, delivery

pytestmark = pytest.mark.slow

PLANS = {
    "prepaid": {"kind": "prepaid"},
    "payg": {"kind": "pay_as_you_go", "credit_limit": "25"},
    "pro": {"kind": "subscription", "monthly_price": "20", "allowance": {"usd": "10"}, "credit_limit": "50"},
    "team": {"kind": "subscription", "monthly_price": "50", "allowance": {"usd": "30"}, "credit_limit": "90"},
}
STEPS = 30
Event = tuple[str, dict[str, object]]


class Course:
    """Random steps of one seed. Two gateways receive webhooks: some at once, some much later, all several times."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.chance = world, random.Random(seed)
        self.gateways = [world.webhooks(), world.webhooks()]
        self.disputed: list[str] = []

    async def run(self) -> None:
        acts: list[Callable[[], Awaitable[None]]] = [
            self.subscribe, self.subscribe, self.change, self.change, self.spend, self.spend, self.refund,
            self.dispute, self.decide, self.cancel, self.wait, self.hear, self.hear, self.hear,
        ]  # fmt: skip
        for _ in range(STEPS):
            await self.chance.choice(acts)()

    async def subscribe(self) -> None:
        await self.world.buy("acme", f"plan:{self.chance.choice(('payg', 'pro', 'team'))}")

    async def change(self) -> None:
        changes = PlanChanges(self.world.commerce())
        try:
            await changes.change(await self.world.tenants.get(ACME), self.chance.choice(("payg", "pro", "team")))
        except (PlanChangeRefused, DodoRefused):
            return

    async def spend(self) -> None:
        try:
            await spend(self.world, str(self.chance.randint(1, 12)))
        except InsufficientCredits:
            return

    async def refund(self) -> None:
        left = [one for one in await self.payments() if one["total_amount"] and one["refund_status"] is None]
        if left:
            await refund(self.world, self.chance.choice(left), self.chance.choice((None, 100, 700)))

    async def dispute(self) -> None:
        paid = [one for one in await self.payments() if one["total_amount"]]
        if paid:
            path = f"/_sandbox/disputes/{self.chance.choice(paid)['payment_id']}"
            self.disputed.append(str((await self.world.operator.post(path)).json()["dispute_id"]))

    async def decide(self) -> None:
        if self.disputed:
            one = self.disputed.pop(self.chance.randrange(len(self.disputed)))
            await self.world.operator.post(
                f"/_sandbox/disputes/{one}/{self.chance.choice(('won', 'lost', 'cancelled'))}"
            )

    async def cancel(self) -> None:
        if running := [one for one in await items(self.world, "/subscriptions") if one["status"] == "active"]:
            await patch_subscription(
                self.world, str(self.chance.choice(running)["subscription_id"]), status="cancelled"
            )

    async def wait(self) -> None:
        self.world.clock.move(self.chance.choice((HOUR, DAY, 12 * DAY)))
        await self.world.operator.post("/_sandbox/clock", json={"advance_s": 0})

    async def hear(self) -> None:
        events = await self.events()
        await self.deliver(self.chance.sample(events, min(6, len(events))))

    async def hear_everything(self) -> None:
        events = await self.events() * 2
        self.chance.shuffle(events)
        for start in range(0, len(events), 6):
            await self.deliver(events[start : start + 6])
        while await self.gateways[0].inbox.parked_count():
            self.world.clock.move(HOUR)
            assert await self.gateways[0].replay(self.world.sweep()), await self.gateways[0].inbox.parked()

    async def deliver(self, events: list[Event]) -> None:
        signed = [delivery(*event, f"msg_{self.chance.getrandbits(64)}") for event in events]
        await asyncio.gather(*(self.gateways[n % 2].receive(*one) for n, one in enumerate(signed)))

    async def payments(self) -> list[dict[str, object]]:
        return [one for one in await items(self.world, "/payments") if one["status"] == "succeeded"]

    async def events(self) -> list[Event]:
        kinds = (
            ("payment.succeeded", await self.payments()),
            ("subscription.updated", await items(self.world, "/subscriptions")),
            ("refund.succeeded", await items(self.world, "/refunds")),
            ("dispute.opened", await items(self.world, "/disputes")),
        )
        return [(kind, data) for kind, found in kinds for data in found]


@pytest.mark.parametrize("seed", range(8))
async def test_invariants_of_subscriptions_hold_after_any_course(world: World, seed: int) -> None:
    world.catalog = Catalog.model_validate(CATALOG | {"plans": PLANS})
    await sync(world.dodo, world.redis, world.catalog)
    await world.tenant("acme")
    course = Course(world, seed)
    await course.run()
    await course.hear_everything()

    subscriptions = await items(world, "/subscriptions")
    active = [one["subscription_id"] for one in subscriptions if one["status"] == "active"]
    tenant = await world.tenants.get(ACME)
    assert len(active) <= 1
    if active:
        assert tenant.subscription is not None
        assert [tenant.subscription.id] == active

    doubled = {one["subscription_id"]: one for one in subscriptions if DOUBLED in one["metadata"]}  # type: ignore[operator]
    for one in doubled.values():
        assert one["status"] == "cancelled"
    refunds = [one for one in await items(world, "/refunds") if str(one["reason"]).startswith("subscription ")]
    assert len({one["payment_id"] for one in refunds}) == len(refunds), "each payment once"
    for payment in await course.payments():
        if payment["subscription_id"] in doubled and payment["charge_type"] == "new" and payment["total_amount"]:
            assert payment["refund_status"] == "full"
    told = [
        one.facts["ended"] for one in await Notices(world.redis).newest() if one.kind is NoticeKind.SUBSCRIPTION_DOUBLED
    ]
    assert sorted(told) == sorted(doubled)

    now = await account(world)
    if now.allowance is not None:
        sold = tenant.subscription.sold if tenant.subscription is not None else None
        assert sold is not None
        assert sold.grants is not None
        assert now.allowance.granted <= sold.grants.amount
    report = await reconcile(world)
    assert report.is_clean, report.faults

    await course.hear_everything()
    assert await world.tenants.get(ACME) == tenant
    again = await account(world)
    assert (again.balance_nanos, again.overage_nanos) == (now.balance_nanos, now.overage_nanos)
