"""A scripted year of one tenant: free, packs, a failing card, subscriptions, dunning, disputes, pauses, the end.

Knows what the customer, its bank and Dodo do, and when; what it costs is billing's to say. After each step the
books are read as everybody sees them: the balance, the gate's answer, and Dodo's own figures.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from billing.catalog.catalog import Catalog
from billing.commerce.auto_refill.refill import Refill
from billing.money import NANOS_PER_CENT, format_usd
from billing.reconcile.reconciler import Report
from billing.tenants.tenant import Principal
from billing.usage import Usage
from cluster.demo.stage import Calls, Stage, stage

MODEL = "adapter"
CALL = Usage(prompt_tokens=25_000, completion_tokens=250)
"""At the catalog's rates: 25 cents for what is read and 25 for what is written."""
CATALOG = {
    "models": [{"id": MODEL, "price": {"input_per_1m": "10", "output_per_1m": "1000"}}],
    "plans": {
        "free": {"kind": "free", "allowance": {"usd": "2"}},
        "pro": {"kind": "subscription", "monthly_price": "20", "allowance": {"usd": "25"}, "credit_limit": "10"},
        "team": {
            "kind": "subscription",
            "monthly_price": "50",
            "allowance": {"usd": "70"},
            "credit_limit": "30",
            "grace_days": 3,
        },
    },
    "packs": {"ten": {"price": "10", "grants": {"usd": "10"}, "expires_days": 365}},
    "default_plan": "free",
}
RECOVERY = {"dunning": True, "payment_retries": True, "past_due_grace_days": 7}
"""How the owner has set up Dodo."""


@dataclass(frozen=True, slots=True)
class Row:
    """The books after a step; money in dollars."""

    day: str
    what: str
    status: str
    """The subscription's, in Dodo's words."""
    admitted: int
    refused: int
    why: str
    balance: str
    owed: str
    """Used beyond what was paid for, and not yet paid."""
    told_charge: str
    """What Dodo's meter was told to invoice, from the first day on."""
    told_covered: str
    """What Dodo was told of usage that was paid before or is free."""
    invoiced: str
    """All payments at Dodo that succeeded."""
    refunded: str


@dataclass(frozen=True, slots=True)
class Year:
    rows: tuple[Row, ...]
    notices: tuple[str, ...]
    """What the owner was told, the oldest first."""
    report: Report
    """Of all books, Dodo's included, at the end."""


class Customer:
    """One tenant's life, a method for each thing that it, its bank or its card does."""

    def __init__(self, there: Stage, who: Principal) -> None:
        self.there, self.who = there, who
        self._payments: dict[str, str] = {}
        self._dispute = ""

    async def nothing(self) -> None:
        """Time passes."""

    async def buy_pack(self) -> None:
        self._payments["pack"] = await self.there.buy(self.who, "pack:ten")

    async def want_refills(self) -> None:
        refill = Refill(pack="ten", threshold_nanos=200 * NANOS_PER_CENT, monthly_cap_cents=3_000)
        await self.there.refills.put(self.who.tenant.id, refill)

    async def lose_card(self) -> None:
        await self.there.set_card(self.who, declines=True)

    async def mend_card(self) -> None:
        await self.there.set_card(self.who, declines=False)

    async def subscribe(self) -> None:
        await self.mend_card()
        await self.there.buy(self.who, "plan:pro")

    async def upgrade(self) -> None:
        await self._change_to("plan:team")

    async def downgrade(self) -> None:
        await self._change_to("plan:pro")

    async def pause(self) -> None:
        await self._patch(status="paused")

    async def resume(self) -> None:
        await self._patch(status="active")

    async def cancel(self) -> None:
        await self._patch(cancel_at_next_billing_date=True)

    async def be_refunded(self) -> None:
        """Four dollars of the last pack."""
        payment_id = self._payments["pack"]
        lines = await self.there.read(f"/payments/{payment_id}/line-items")
        item = {"item_id": lines["items"][0]["items_id"], "amount": 400}
        await self.there.ask("POST", "/refunds", payment_id=payment_id, items=[item])

    async def dispute_refill(self) -> None:
        """The bank asks for January's auto-refill back."""
        refill = await self.there.refills.get(self.who.tenant.id)
        assert refill is not None, "the story had it switched on"
        await self._open_dispute(refill.attempts[0].payment_id)

    async def win_dispute(self) -> None:
        await self.there.order(f"disputes/{self._dispute}/won")

    async def lose_dispute(self) -> None:
        """Another one, about the pack that was partly refunded."""
        await self._open_dispute(self._payments["pack"])
        await self.there.order(f"disputes/{self._dispute}/lost")

    async def _open_dispute(self, payment_id: str) -> None:
        self._dispute = str((await self.there.order(f"disputes/{payment_id}"))["dispute_id"])

    async def _change_to(self, plan: str) -> None:
        change = {"product_id": await self.there.product(plan), "quantity": 1}
        path = f"/subscriptions/{await self._subscription()}/change-plan"
        await self.there.ask("POST", path, **change, proration_billing_mode="prorated_immediately")

    async def _patch(self, **change: object) -> None:
        await self.there.ask("PATCH", f"/subscriptions/{await self._subscription()}", **change)

    async def _subscription(self) -> str:
        tenant = await self.there.tenants.get(self.who.tenant.id)
        assert tenant.subscription is not None, "the story has subscribed by now"
        return tenant.subscription.id


Act = Callable[[Customer], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Step:
    """At a moment, something is done, and then so many calls are made."""

    at: datetime
    what: str
    act: Act = Customer.nothing
    calls: int = 0
    then: Act = Customer.nothing
    """Done after the calls."""


def _at(month: int, day: int, hour: int = 0) -> datetime:
    return datetime(2027, month, day, hour, tzinfo=UTC)


SCRIPT = (
    Step(_at(1, 1), "joins on the free plan", calls=6),
    Step(_at(1, 5), "buys a pack", Customer.buy_pack),
    Step(_at(1, 20), "switches auto-refill on", Customer.want_refills, 17),
    Step(_at(2, 3), "its card fails at the next refill", Customer.lose_card, 23),
    Step(_at(2, 5), "uses up what is left", calls=6),
    Step(_at(2, 10), "subscribes to pro with a new card", Customer.subscribe, 20),
    Step(_at(3, 5), "uses pro's overage up to its cap", calls=52),
    Step(_at(3, 10), "pro renews", calls=10),
    Step(_at(3, 20), "goes into overage again", calls=44),
    Step(_at(3, 25, 12), "upgrades to team in mid-period", Customer.upgrade, 20),
    Step(_at(4, 20), "goes into team's overage; the card is lost", calls=150, then=Customer.lose_card),
    Step(_at(4, 25, 12), "the renewal fails: past due, dunning", calls=10),
    Step(_at(4, 29, 12), "our grace is over", calls=2),
    Step(_at(5, 2, 12), "Dodo's grace is over: on hold; a new card", calls=2, then=Customer.mend_card),
    Step(_at(5, 6), "the fifth retry succeeds: recovered", calls=20),
    Step(_at(5, 25, 12), "team renews", calls=10),
    Step(_at(6, 1), "buys a pack", Customer.buy_pack),
    Step(_at(6, 5), "$4 of it are refunded", Customer.be_refunded),
    Step(_at(6, 10), "January's refill is disputed", Customer.dispute_refill, 2),
    Step(_at(6, 12), "that dispute is won", Customer.win_dispute),
    Step(_at(6, 14), "a dispute of the rest of the pack is lost", Customer.lose_dispute),
    Step(_at(6, 25, 12), "team renews once more", calls=20),
    Step(_at(7, 8), "goes into overage", calls=146),
    Step(_at(7, 10, 12), "downgrades to pro in mid-period", Customer.downgrade, 10),
    Step(_at(8, 5), "goes into pro's overage", calls=44),
    Step(_at(8, 10, 12), "pro renews, less what the downgrade left over", calls=10),
    Step(_at(8, 18), "goes into overage", calls=46),
    Step(_at(8, 20, 12), "pauses: what it owes is invoiced", Customer.pause, 2),
    Step(_at(8, 25), "buys a pack and lives on it", Customer.buy_pack, 4),
    Step(_at(9, 20, 12), "goes on after 31 days; uses the pack up, then overage", Customer.resume, 20),
    Step(_at(10, 11, 12), "pro renews 31 days later", calls=10),
    Step(_at(11, 1), "pauses with some of its allowance left", Customer.pause, 2),
    Step(_at(11, 14), "goes on after the old end of the period", Customer.resume, 20),
    Step(_at(11, 16), "cancels; goes into overage a last time", Customer.cancel, 24),
    Step(_at(11, 24, 12), "the subscription ends with a last invoice", calls=6),
    Step(_at(12, 31), "is still there, on the free plan", calls=6),
)


async def play(folder: Path, show: Callable[[Row], None] = lambda _: None) -> Year:
    """Play the year on a store and a sandbox of its own in ``folder``; ``show`` sees each row as it is known.

    Raises:
        StoreError: no store can be started here.
        StoryStuck: Dodo's news did not come through.
    """
    rows: list[Row] = []
    async with stage(folder, Catalog.model_validate(CATALOG), SCRIPT[0].at) as there:
        await there.order("settings", **RECOVERY)
        customer = Customer(there, await there.join("acme", "free"))
        for step in SCRIPT:
            rows.append(await _played(there, customer, step))
            show(rows[-1])
        notices = tuple(one.kind.value for one in reversed(await there.notices.newest()))
        return Year(tuple(rows), notices, await there.reconcile())


async def _played(there: Stage, customer: Customer, step: Step) -> Row:
    await there.go_to(step.at)
    await step.act(customer)
    await there.settle_down()
    calls = await there.call(customer.who, MODEL, CALL, step.calls) if step.calls else Calls()
    await step.then(customer)
    await there.settle_down()
    return await _row(there, customer.who, step, calls)


async def _row(there: Stage, who: Principal, step: Step, calls: Calls) -> Row:
    account, told = await there.ledger.account(who.tenant.id), await there.told(who)
    subscription = (await there.tenants.get(who.tenant.id)).subscription
    return Row(
        day=f"{step.at:%b %d}",
        what=step.what,
        status=subscription.status.value if subscription else "",
        admitted=calls.admitted,
        refused=calls.refused,
        why=calls.why,
        balance=format_usd(account.balance_nanos, 2),
        owed=format_usd(account.overage_nanos, 2),
        told_charge=format_usd(told.charge_nanos, 2),
        told_covered=format_usd(told.covered_nanos, 2),
        invoiced=format_usd(told.invoiced_cents * NANOS_PER_CENT, 2),
        refunded=format_usd(told.refunded_cents * NANOS_PER_CENT, 2),
    )
