"""A simulated year of one tenant: free plan, packs, a declined card, subscriptions, dunning, disputes, pauses, a price
change, a double checkout.

The script says what the customer, its bank and Dodo do, and when. After each step a row holds the balance, how many
requests were admitted, and Dodo's own figures.
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
from cluster.demo.simulation import Calls, Simulation, simulation

MODEL = "adapter"
CALL = Usage(prompt_tokens=25_000, completion_tokens=250)
"""$0.50 at the rates below: $0.25 for the prompt and $0.25 for the completion."""
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
NEW_PRICES = CATALOG | {"packs": {"ten": {"price": "12", "grants": {"usd": "15"}, "expires_days": 365}}}
RECOVERY = {"dunning": True, "payment_retries": True, "past_due_grace_days": 7}
"""The settings of the Dodo account."""


@dataclass(frozen=True, slots=True)
class Row:
    """The figures after a step; money in dollars."""

    day: str
    what: str
    status: str
    """Of the subscription at Dodo; empty without one."""
    admitted: int
    refused: int
    refusal: str
    balance: str
    """What the tenant can draw on now."""
    exposure: str
    """Used on credit, and not yet paid."""
    exported_charge: str
    """Usage that was exported to Dodo to be invoiced, since the first day."""
    exported_covered: str
    """Usage that was exported to Dodo as free or paid in advance."""
    invoiced: str
    """All successful payments at Dodo."""
    refunded: str


@dataclass(frozen=True, slots=True)
class Year:
    rows: tuple[Row, ...]
    notices: tuple[str, ...]
    """The kinds of all notices, the oldest first."""
    report: Report
    """The reconciliation at the end."""


class Customer:
    """What one tenant, its bank and its card do."""

    def __init__(self, farebox: Simulation, who: Principal) -> None:
        self.farebox, self.who = farebox, who
        self._payments: dict[str, str] = {}
        self._dispute = self._checkout = self._change = ""

    async def wait(self) -> None:
        """Do nothing."""

    async def buy_pack(self) -> None:
        self._payments["pack"] = await self.farebox.buy(self.who, "pack:ten")

    async def open_checkout(self) -> None:
        self._checkout = await self.farebox.checkout(self.who, "pack:ten")

    async def pay_open_checkout(self) -> None:
        await self.farebox.pay(self._checkout)

    async def see_prices_change(self) -> None:
        """The owner deploys another price, while the checkout is open."""
        await self.farebox.deploy(Catalog.model_validate(NEW_PRICES))

    async def switch_refills_on(self) -> None:
        refill = Refill(pack="ten", threshold_nanos=200 * NANOS_PER_CENT, monthly_cap_cents=3_000)
        await self.farebox.refills.put(self.who.tenant.id, refill)

    async def break_card(self) -> None:
        await self.farebox.set_card(self.who, declines=True)

    async def replace_card(self) -> None:
        await self.farebox.set_card(self.who, declines=False)

    async def subscribe(self) -> None:
        await self.replace_card()
        await self.farebox.buy(self.who, "plan:pro")

    async def subscribe_twice(self) -> None:
        """Two checkouts are open at once, and both are paid."""
        for url in [await self.farebox.checkout(self.who, "plan:pro") for _ in range(2)]:
            await self.farebox.pay(url)

    async def change_plan(self) -> None:
        self._change = await self.farebox.change_plan(self.who, "team")

    async def get_change_refunded(self) -> None:
        await self.farebox.request("POST", "/refunds", payment_id=self._change)

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

    async def get_refund(self) -> None:
        """Four dollars of the last pack are refunded."""
        payment_id = self._payments["pack"]
        lines = await self.farebox.read(f"/payments/{payment_id}/line-items")
        item = {"item_id": lines["items"][0]["items_id"], "amount": 400}
        await self.farebox.request("POST", "/refunds", payment_id=payment_id, items=[item])

    async def dispute_refill(self) -> None:
        """The bank disputes January's auto-refill."""
        refill = await self.farebox.refills.get(self.who.tenant.id)
        assert refill is not None, "auto-refill was switched on"
        await self._open_dispute(refill.attempts[0].payment_id)

    async def win_dispute(self) -> None:
        await self.farebox.control(f"disputes/{self._dispute}/won")

    async def lose_dispute(self) -> None:
        """The bank disputes the last pack, and wins."""
        await self._open_dispute(self._payments["pack"])
        await self.farebox.control(f"disputes/{self._dispute}/lost")

    async def _open_dispute(self, payment_id: str) -> None:
        self._dispute = str((await self.farebox.control(f"disputes/{payment_id}"))["dispute_id"])

    async def _change_to(self, plan: str) -> None:
        change = {"product_id": await self.farebox.product_id(plan), "quantity": 1}
        path = f"/subscriptions/{await self._subscription()}/change-plan"
        await self.farebox.request("POST", path, **change, proration_billing_mode="prorated_immediately")

    async def _patch(self, **change: object) -> None:
        await self.farebox.request("PATCH", f"/subscriptions/{await self._subscription()}", **change)

    async def _subscription(self) -> str:
        tenant = await self.farebox.tenants.get(self.who.tenant.id)
        assert tenant.subscription is not None, "the tenant has subscribed"
        return tenant.subscription.id


Act = Callable[[Customer], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Step:
    """At a moment: an action, a number of requests, and an action after them."""

    at: datetime
    what: str
    act: Act = Customer.wait
    calls: int = 0
    then: Act = Customer.wait


def _at(month: int, day: int, hour: int = 0) -> datetime:
    return datetime(2027, month, day, hour, tzinfo=UTC)


SCRIPT = (
    Step(_at(1, 1), "joins on the free plan", calls=6),
    Step(_at(1, 5), "buys a pack", Customer.buy_pack),
    Step(_at(1, 20), "switches auto-refill on", Customer.switch_refills_on, 17),
    Step(_at(2, 3), "its card fails at the next refill", Customer.break_card, 23),
    Step(_at(2, 5), "uses up what is left", calls=6),
    Step(_at(2, 10), "subscribes to pro with a new card", Customer.subscribe, 20),
    Step(_at(3, 5), "uses pro's credit up to its limit", calls=52),
    Step(_at(3, 10), "pro renews", calls=10),
    Step(_at(3, 20), "uses credit again", calls=44),
    Step(_at(3, 25, 12), "upgrades to team in mid-period", Customer.upgrade, 20),
    Step(_at(4, 20), "uses team's credit; then the card fails", calls=125, then=Customer.break_card),
    Step(_at(4, 25, 12), "the renewal fails: past due, dunning", calls=10),
    Step(_at(4, 29, 12), "farebox's grace period is over", calls=2),
    Step(_at(5, 2, 12), "Dodo's grace period is over: on hold; a new card", calls=2, then=Customer.replace_card),
    Step(_at(5, 6), "the fifth retry succeeds: recovered", calls=20),
    Step(_at(5, 25, 12), "team renews", calls=10),
    Step(_at(6, 1), "buys a pack", Customer.buy_pack),
    Step(_at(6, 5), "$4 of it are refunded", Customer.get_refund),
    Step(_at(6, 10), "January's refill is disputed", Customer.dispute_refill, 2),
    Step(_at(6, 12), "that dispute is won", Customer.win_dispute),
    Step(_at(6, 14), "a dispute of the rest of the pack is lost", Customer.lose_dispute),
    Step(_at(6, 25, 12), "team renews once more", calls=20),
    Step(_at(7, 8), "uses half of its allowance", calls=50),
    Step(_at(7, 10, 12), "downgrades to pro in mid-period", Customer.downgrade, 10),
    Step(_at(8, 5), "uses pro's credit", calls=44),
    Step(_at(8, 10, 12), "pro renews, less what the downgrade left", calls=10),
    Step(_at(8, 18), "uses credit", calls=46),
    Step(_at(8, 20, 12), "pauses: its exposure is invoiced", Customer.pause, 2),
    Step(_at(8, 25), "buys a pack and uses it", Customer.buy_pack, 4),
    Step(_at(9, 20, 12), "resumes after 31 days; uses the pack up, then credit", Customer.resume, 20),
    Step(_at(10, 11, 12), "pro renews 31 days later", calls=10),
    Step(_at(11, 1), "pauses with some of its allowance left", Customer.pause, 2),
    Step(_at(11, 14), "resumes after the old end of the period", Customer.resume, 20),
    Step(_at(11, 16), "cancels; uses credit a last time", Customer.cancel, 24),
    Step(_at(11, 24, 12), "the subscription ends with a last invoice", calls=6),
    Step(
        _at(12, 1),
        "has a checkout open while the price changes",
        Customer.open_checkout,
        then=Customer.see_prices_change,
    ),
    Step(_at(12, 2), "pays it: the old price for the old credit", Customer.pay_open_checkout),
    Step(_at(12, 3), "buys a pack at its new price", Customer.buy_pack),
    Step(_at(12, 5), "subscribes twice by a double click", Customer.subscribe_twice, 10),
    Step(_at(12, 20, 12), "changes to team through farebox", Customer.change_plan, 20),
    Step(_at(12, 22), "that fee is refunded; it had used some of it", Customer.get_change_refunded, 4),
    Step(_at(12, 26), "a dispute of the last pack is lost", Customer.lose_dispute, 2),
    Step(_at(12, 31), "buys a pack, which pays its debt", Customer.buy_pack, 4),
)


async def run_year(folder: Path, show: Callable[[Row], None] = lambda _: None) -> Year:
    """Run the script on a temporary store and sandbox in ``folder``; ``show`` is called with each row.

    Raises:
        StoreError: no store can be started here.
        SimulationError: a webhook could not be applied.
    """
    rows: list[Row] = []
    async with simulation(folder, Catalog.model_validate(CATALOG), SCRIPT[0].at) as farebox:
        await farebox.control("settings", **RECOVERY)
        customer = Customer(farebox, await farebox.create_tenant("acme", "free"))
        for step in SCRIPT:
            rows.append(await _run(farebox, customer, step))
            show(rows[-1])
        notices = tuple(one.kind.value for one in reversed(await farebox.notices.newest()))
        return Year(tuple(rows), notices, await farebox.reconcile())


async def _run(farebox: Simulation, customer: Customer, step: Step) -> Row:
    await farebox.go_to(step.at)
    await step.act(customer)
    await farebox.run_periodic_tasks()
    calls = await farebox.call(customer.who, MODEL, CALL, step.calls) if step.calls else Calls()
    await step.then(customer)
    await farebox.run_periodic_tasks()
    return await _row(farebox, customer.who, step, calls)


async def _row(farebox: Simulation, who: Principal, step: Step, calls: Calls) -> Row:
    tenant = await farebox.tenants.get(who.tenant.id)
    account, at_dodo, subscription = await farebox.account(tenant), await farebox.dodo_totals(who), tenant.subscription
    return Row(
        day=f"{step.at:%b %d}",
        what=step.what,
        status=subscription.status.value if subscription else "",
        admitted=calls.admitted,
        refused=calls.refused,
        refusal=calls.refusal,
        balance=format_usd(account.balance_nanos, 2),
        exposure=format_usd(account.overage_nanos, 2),
        exported_charge=format_usd(at_dodo.charge_nanos, 2),
        exported_covered=format_usd(at_dodo.covered_nanos, 2),
        invoiced=format_usd(at_dodo.invoiced_cents * NANOS_PER_CENT, 2),
        refunded=format_usd(at_dodo.refunded_cents * NANOS_PER_CENT, 2),
    )
