"""Cash, what was earned and what is owed add up to what Dodo says it paid out, to the cent."""

import pytest

from billing.catalog import publication
from billing.catalog.catalog import Catalog
from billing.commerce.cash import CashBook, Kind
from billing.commerce.decisions import Booking, Decisions
from billing.commerce.inbox import Inbox
from billing.commerce.plan_changes import PlanChanges
from billing.commerce.sync import sync
from billing.dodo.fields import to_iso
from billing.ledger.account import Settlement
from billing.ledger.admission import funding_for, plan_of
from billing.money import Nanos
from billing.pricing.prices import Price
from billing.reports.statement import Month, Statement, read_statement
from billing.reports.worth import Worth
from billing.usage import RequestId, Status, TenantId, Unit, Usage
from tests.support.purchases import AUTH, items, refund
from tests.support.samples import request
from tests.support.world import CATALOG, DAY, World, delivery

A_DOLLAR_A_TOKEN = Price.model_validate({"output_per_1m": "1000000"})
CENTS = 10_000_000
FEES = {
    "tax_bps": 1900,
    "payment_fee_bps": 400,
    "payment_fee_cents": 40,
    "dispute_fee_cents": 100,
    "payout_fee_cents": 30,
}


async def spend(world: World, name: str, dollars: int) -> None:
    tenant = await world.tenants.get(TenantId(name))
    id_ = RequestId(f"req_{name}_{dollars}")
    asked = request(id_, tenant=tenant.id, price=A_DOLLAR_A_TOKEN, prompt_tokens=0, max_tokens=dollars)
    funding = funding_for(tenant, plan_of(tenant, world.catalog), world.clock())
    await world.ledger.hold(request(id_, **{**_fields(asked), "funding": funding}))
    usage = Usage(completion_tokens=dollars)
    settled = Settlement(id_, tenant.id, usage, A_DOLLAR_A_TOKEN.charge(usage), Status.COMPLETE)
    await world.ledger.settle(settled)


def _fields(asked: object) -> dict[str, object]:
    names = ("tenant", "price", "prompt_tokens", "max_tokens")
    return {name: getattr(asked, name) for name in names}


async def hear(world: World, kind: str, data: dict[str, object]) -> None:
    done = await world.webhooks().receive(*delivery(kind, data, f"msg_{kind}_{len(data)}_{next(world._numbers)}"))
    assert done.outcome == "applied", done.reason


async def control(world: World, path: str, **body: object) -> dict[str, object]:
    answer = await world.operator.post(f"/_sandbox/{path}", json=body)
    answer.raise_for_status()
    found: dict[str, object] = answer.json()
    return found


async def statement_of(world: World, end_ms: int) -> Statement:
    catalogs = await publication.in_force_ever(world.redis)
    assert catalogs is not None
    return await read_statement(world.redis, Worth(catalogs, await Inbox(world.redis).names()), None, end_ms)


def summed(months: list[Month], name: str) -> int:
    return sum(getattr(month, name) for month in months)


async def play(world: World) -> None:
    """Packs with a refund, a lost and a won dispute; a subscription with overage, a renewal and a refunded fee."""
    await control(world, "settings", **FEES)
    for name in ("acme", "zeta"):
        await world.tenant(name)
    packs = [await world.buy("acme", "pack:small", quantity) for quantity in (2, 1, 1)]
    for one in packs:
        await hear(world, "payment.succeeded", one)
    await spend(world, "acme", 3)
    await hear(world, "refund.succeeded", await refund(world, packs[0], 238))
    lost, won = [await control(world, f"disputes/{one['payment_id']}") for one in packs[1:]]
    for one in (lost, won):
        await hear(world, "dispute.opened", one)
    for one, ending in ((lost, "lost"), (won, "won")):
        await hear(world, f"dispute.{ending}", await control(world, f"disputes/{one['dispute_id']}/{ending}"))
    fee = await world.buy("zeta", "plan:pro")
    await hear(world, "payment.succeeded", fee)
    await spend(world, "zeta", 12)
    await world.exporter().flush_once()
    world.clock.move(32 * DAY)
    await control(world, "clock", advance_s=0)
    payments = (await world.operator.get("/payments", headers=AUTH)).json()["items"]
    [renewal] = [one for one in payments if one["charge_type"] == "renewal"]
    await hear(world, "payment.succeeded", renewal)
    await hear(world, "refund.succeeded", await refund(world, fee))


async def test_cash_earned_and_deferred_add_up_to_what_dodo_paid_out(world: World) -> None:
    """Twenty dollars of packs, two fees of twenty and two dollars of overage, each with 19 % tax."""
    await play(world)
    paid_out = await control(world, "payouts")
    book = CashBook(world.redis)
    assert await book.book_lines(world.dodo) == 9
    assert await book.book_lines(world.dodo) == 0, "each line is booked once"
    end = world.clock() + 1_000 * DAY
    now = await statement_of(world, world.clock())
    months = now.months(0, world.clock() + DAY)
    sums = {name: summed(months, name) for name in ("paid", "tax", "refunds", "disputes", "fees", "paid_out")}
    assert {name: nanos / CENTS for name, nanos in sums.items()} == {
        "paid": 7378,
        "tax": 665,
        "refunds": 2618,
        "disputes": 595,
        "fees": 726,
        "paid_out": 2774,
    }
    assert summed(months, "net") == int(str(paid_out["amount"])) * CENTS, "what came in and stayed is what was paid out"
    earned = {name: summed(months, name) / CENTS for name in ("prepaid", "allowance", "postpaid", "differences")}
    assert earned == {"prepaid": 300, "allowance": 2000, "postpaid": 200, "differences": 0}
    assert months[-1].unpaid == 0
    came_in = sums["paid"] - sums["tax"] - sums["refunds"] - sums["disputes"]
    assert came_in == summed(months, "earned") + months[-1].deferred == 3500 * CENTS
    for name in ("acme", "zeta"):
        assert name in {entry.tenant for entry in await book.until(end)}
    last = (await statement_of(world, end)).months(0, end)
    assert (summed(last, "earned"), last[-1].deferred) == (came_in, 0), "in the end all of it is earned"


async def test_cash_book_has_each_payment_once_with_what_it_was_for(world: World) -> None:
    await play(world)
    booked = await CashBook(world.redis).until(world.clock() + DAY)
    payments = [(one.what, one.settled, one.settled_tax, one.parts) for one in booked if one.kind is Kind.PAYMENT]
    dollars = 100 * CENTS
    assert payments == [
        ("pack", 1190, 190, {"pack": 10 * dollars}),
        ("pack", 595, 95, {"pack": 5 * dollars}),
        ("pack", 595, 95, {"pack": 5 * dollars}),
        ("fee", 2380, 380, {"fee": 20 * dollars}),
        ("fee+usage", 2618, 418, {"fee": 20 * dollars, "usage": 2 * dollars}),
    ]
    others = [(one.kind, one.settled, one.settled_tax) for one in booked if one.kind is not Kind.PAYMENT]
    assert others == [
        (Kind.REFUND, -238, -38),
        (Kind.DISPUTE_OPENED, -595, -95),
        (Kind.DISPUTE_OPENED, -595, -95),
        (Kind.DISPUTE_LOST, 0, 0),
        (Kind.DISPUTE_WON, 595, 95),
        (Kind.REFUND, -2380, -380),
    ]
    assert all(one.booked_at_ms > 0 for one in booked)


async def test_delivery_that_comes_again_is_booked_once(world: World) -> None:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    for _ in range(3):
        await hear(world, "payment.succeeded", payment)
    [entry] = await CashBook(world.redis).until(world.clock() + DAY)
    assert (entry.id, entry.amount, entry.net_nanos) == (f"payment:{payment['payment_id']}", 500, Nanos(500 * CENTS))


async def test_payment_whose_webhook_comes_late_stands_where_it_was_booked(world: World) -> None:
    """A month that is over gets no more cash."""
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    await hear(world, "payment.succeeded", payment | {"created_at": "2020-01-31T12:00:00.000Z"})
    [entry] = await CashBook(world.redis).until(world.clock() + DAY)
    store_s, _ = await world.redis.time()
    assert to_iso(entry.at_ms) == "2020-01-31T12:00:00.000Z"
    assert abs(entry.booked_at_ms - store_s * 1_000) < DAY


async def test_pack_is_sold_for_what_was_paid_for_it(world: World) -> None:
    """A discount of a fifth, and 19 % tax: packs of five and seven dollars for four and 5.60."""
    tenant = await world.tenant("acme")
    small, calls = [await world.product(name) for name in ("pack:small", "pack:calls")]
    payment = await pay_cart(world, tenant.dodo_customer_id, small, calls)
    paid = {"total_amount": 1142, "settlement_amount": 1142, "tax": 182, "settlement_tax": 182}
    await hear(world, "payment.succeeded", payment | paid)
    await spend(world, "acme", 2)
    months = (await statement_of(world, world.clock() + DAY)).months(0, world.clock() + DAY)
    names = ("prepaid", "expired", "differences")
    assert {name: summed(months, name) / CENTS for name in names} == {"prepaid": 160, "expired": 0, "differences": 0}
    assert max(month.deferred for month in months) == 800 * CENTS
    world.clock.move(31 * DAY)
    last = (await statement_of(world, world.clock())).months(0, world.clock() + DAY)
    assert summed(last, "earned") / CENTS == 400, "what is left of the small pack has expired"
    [entry] = await CashBook(world.redis).until(world.clock())
    assert entry.parts == {"pack": 960 * CENTS}


async def test_pack_that_was_free_is_worth_no_more_than_a_nano(world: World) -> None:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    free = {"total_amount": 0, "settlement_amount": 0, "tax": None, "settlement_tax": None}
    await hear(world, "payment.succeeded", payment | free)
    months = (await statement_of(world, world.clock() + DAY)).months(0, world.clock() + DAY)
    assert [max(getattr(month, name) for month in months) for name in ("paid", "deferred", "differences")] == [0, 1, 0]


async def test_pack_keeps_its_list_price_where_what_was_paid_for_it_is_not_known(world: World) -> None:
    """In another currency than dollars, and in a cart with something else."""
    tenant = await world.tenant("acme")
    euros = await world.buy("acme", "pack:small")
    await hear(world, "payment.succeeded", euros | {"settlement_currency": "EUR", "settlement_amount": 400})
    mixed = await pay_cart(
        world, tenant.dodo_customer_id, await foreign_product(world), await world.product("pack:calls")
    )
    await hear(world, "payment.succeeded", mixed | {"total_amount": 1000, "settlement_amount": 1000})
    months = (await statement_of(world, world.clock() + DAY)).months(0, world.clock() + DAY)
    assert max(month.deferred for month in months) == (500 + 700) * CENTS


@pytest.mark.parametrize("is_late", [False, True])
async def test_fee_of_a_plan_that_was_left_within_the_hour_is_earned_once(world: World, is_late: bool) -> None:
    """Dodo may send the first fee's payment after that of the change."""
    plans = {"prepaid": {"kind": "prepaid"}} | {
        name: {"kind": "subscription", "monthly_price": price, "allowance": {"usd": "10"}}
        for name, price in (("pro", "20"), ("team", "50"))
    }
    world.catalog = Catalog.model_validate(CATALOG | {"plans": plans})
    await sync(world.dodo, world.redis, world.catalog)
    await publication.publish(world.redis, world.catalog, "for a test", world.clock())
    tenant = await world.tenant("acme")
    first = await world.buy("acme", "plan:pro")
    await hear(world, "subscription.active", {"subscription_id": first["subscription_id"]})
    if not is_late:
        await hear(world, "payment.succeeded", first)
    await spend(world, "acme", 6)
    world.clock.move(30 * 60_000)
    made = await PlanChanges(world.commerce()).change(await world.tenants.get(tenant.id), "team")
    second = (await world.operator.get(f"/payments/{made.payment_id}", headers=AUTH)).json()
    await hear(world, "payment.succeeded", second)
    if is_late:
        await hear(world, "payment.succeeded", first)
    await spend(world, "acme", 4)
    end_ms = world.clock() + 70 * DAY
    months = (await statement_of(world, end_ms)).months(world.clock() - 40 * DAY, end_ms)
    paid = (int(str(first["total_amount"])) + int(second["total_amount"])) * CENTS
    assert (summed(months, "paid"), summed(months, "earned"), summed(months, "differences")) == (paid, paid, 0)


async def foreign_product(world: World) -> str:
    """Something else for nine dollars, sold under the same account."""
    price = {"type": "one_time_price", "price": 900, "currency": "USD", "discount": 0, "purchasing_power_parity": False}
    asked = {"name": "My e-book", "price": price, "tax_category": "saas"}
    made = await world.operator.post("/products", json=asked, headers=AUTH)
    return str(made.raise_for_status().json()["product_id"])


async def pay_cart(world: World, customer: str, *products: str) -> dict[str, object]:
    cart = [{"product_id": one, "quantity": 1} for one in products]
    asked = {"product_cart": cart, "customer": {"customer_id": customer}}
    session = (await world.operator.post("/checkouts", json=asked, headers=AUTH)).raise_for_status().json()
    return await control(world, f"pay/{session['session_id']}")


async def test_payment_for_something_else_is_cash_and_no_credit(world: World) -> None:
    tenant = await world.tenant("acme")
    ebook, small = await foreign_product(world), await world.product("pack:small")
    mixed = await pay_cart(world, tenant.dodo_customer_id, ebook, small)
    await hear(world, "payment.succeeded", mixed)
    alone = await pay_cart(world, tenant.dodo_customer_id, ebook)
    await world.webhooks().receive(*delivery("payment.succeeded", alone, "msg_alone"))
    back = await refund(world, alone)
    await world.webhooks().receive(*delivery("refund.succeeded", back, "msg_back"))
    booked = await CashBook(world.redis).until(world.clock() + DAY)
    dollars = 100 * CENTS
    assert [(one.kind, one.what, one.settled, one.parts) for one in booked] == [
        (Kind.PAYMENT, "pack+foreign", 1400, {"pack": 5 * dollars, "foreign": 9 * dollars}),
        (Kind.PAYMENT, "foreign", 900, {"foreign": 9 * dollars}),
        (Kind.REFUND, "", -900, None),
    ]
    months = (await statement_of(world, world.clock() + DAY)).months(0, world.clock() + DAY)
    assert (months[-1].deferred, summed(months, "differences")) == (5 * dollars, 9 * dollars)


async def test_payment_that_a_person_books_is_sold_for_what_was_paid(world: World) -> None:
    tenant = await world.tenant("acme")
    alone = await pay_cart(world, tenant.dodo_customer_id, await foreign_product(world))
    await world.webhooks().receive(*delivery("payment.succeeded", alone, "msg_alone"))
    await Decisions(world.redis, world.clock).book("msg_alone", Booking(tenant.id, Unit.NANOS, 700 * CENTS))
    await world.webhooks().replay(world.sweep())
    world.clock.move(DAY)
    await world.webhooks().replay(world.sweep())
    months = (await statement_of(world, world.clock() + DAY)).months(0, world.clock() + DAY)
    assert (months[-1].deferred, summed(months, "differences")) == (900 * CENTS, 0)


async def test_ledger_that_dodo_does_not_show_leaves_fees_unknown(world: World) -> None:
    await world.fault("status:403", path="/balances/ledger")
    assert await CashBook(world.redis).book_lines(world.dodo) == 0
    await world.heal()


@pytest.mark.parametrize("is_refund_first", [False, True])
async def test_doubled_subscription_is_neither_deferred_nor_a_difference(world: World, is_refund_first: bool) -> None:
    """Two fees of twenty dollars, one of them given back; its refund may be heard of before its payment is booked."""
    await world.tenant("acme")
    kept, doubled = [await world.buy("acme", "plan:pro") for _ in range(2)]
    await hear(world, "payment.succeeded", kept)
    if is_refund_first:
        await hear(world, "subscription.active", {"subscription_id": doubled["subscription_id"]})
    else:
        await hear(world, "payment.succeeded", doubled)
    [back] = await items(world, "/refunds")
    await hear(world, "refund.succeeded", back)
    if is_refund_first:
        await hear(world, "payment.succeeded", doubled)
    months = (await statement_of(world, world.clock() + DAY)).months(0, world.clock() + DAY)
    sums = {name: summed(months, name) / CENTS for name in ("paid", "refunds", "earned", "differences")}
    assert sums == {"paid": 4000, "refunds": 2000, "earned": 0, "differences": 0}
    assert max(month.deferred for month in months) == 2000 * CENTS
