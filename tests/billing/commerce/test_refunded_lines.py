"""A refund of one line of a payment takes back what that line bought, and of nothing else."""

import pytest

from billing.commerce.inbox import Outcome
from billing.store.keys import shard_for
from tests.support.foreign import pay, product, receive
from tests.support.purchases import ACME, AUTH, USD, account, balance, items, reconcile
from tests.support.world import DAY, World


async def refund_line(
    world: World, payment: dict[str, object], name: str, cents: int | None = None
) -> dict[str, object]:
    """Refund one line at Dodo, all of it or so many cents; the refund as Dodo has it."""
    found = (await world.operator.get(f"/payments/{payment['payment_id']}/line-items", headers=AUTH)).json()["items"]
    (line,) = [one for one in found if one["name"].startswith(name)]
    asked = {"payment_id": payment["payment_id"], "items": [{"item_id": line["items_id"], "amount": cents}]}
    made: dict[str, object] = (await world.operator.post("/refunds", json=asked, headers=AUTH)).json()
    return made


async def hear(world: World, refund: dict[str, object], copy: int = 0) -> None:
    done = await receive(world, "refund.succeeded", refund, f"msg_{refund['refund_id']}_{copy}")
    assert done.outcome is Outcome.APPLIED, done.reason


@pytest.fixture(params=[0, 1900])
async def cart(world: World, request: pytest.FixtureRequest) -> dict[str, object]:
    """An e-book of $95 and a pack of $5, paid together, with tax or without."""
    await world.operator.post("/_sandbox/settings", json={"tax_bps": request.param}, headers=AUTH)
    tenant = await world.tenant("acme")
    ebook, small = await product(world, price=9_500), await world.product("pack:small")
    payment = await pay(world, {ebook: 1, small: 1}, tenant.dodo_customer_id)
    await receive(world, "payment.succeeded", payment)
    return payment


async def small_pack(world: World) -> str:
    return (await world.dodo.retrieve_product(await world.product("pack:small"))).name


async def test_refund_of_a_foreign_line_takes_nothing(world: World, cart: dict[str, object]) -> None:
    await hear(world, await refund_line(world, cart, "My e-book"))
    assert await balance(world) == 5 * USD


@pytest.mark.parametrize("is_pack_first", [True, False])
async def test_refund_of_each_line_takes_what_it_bought_once(
    world: World, cart: dict[str, object], is_pack_first: bool
) -> None:
    names = ["My e-book", await small_pack(world)]
    refunds = [await refund_line(world, cart, name) for name in (names[::-1] if is_pack_first else names)]
    for copy in range(2):
        for one in refunds:
            await hear(world, one, copy)
    assert await balance(world) == 0
    assert (await reconcile(world)).is_clean


async def test_refund_that_comes_again_after_a_later_one_takes_nothing_more(world: World) -> None:
    tenant = await world.tenant("acme")
    small = await world.product("pack:small")
    payment = await pay(world, {await product(world): 1, small: 1}, tenant.dodo_customer_id)
    await receive(world, "payment.succeeded", payment)
    first = await refund_line(world, payment, await small_pack(world), 100)
    await hear(world, first)
    await hear(world, await refund_line(world, payment, await small_pack(world), 150))
    await hear(world, first, copy=1)
    assert await balance(world) == 2_500_000_000


@pytest.mark.parametrize(("line", "left"), [("fee", 0), ("usage", 10 * USD)])
async def test_refund_of_a_renewal_goes_by_its_line(world: World, line: str, left: int) -> None:
    """A fee of $20, which bought an allowance of $10, and usage of $20 in one payment."""
    await world.tenant("acme")
    await receive(world, "payment.succeeded", await world.buy("acme", "plan:pro"))
    await world.use("acme", charged=20 * USD, overage=20 * USD)
    await world.redis.hset(shard_for(ACME).account(ACME), "overage", str(20 * USD))
    await world.exporter().flush_once()
    world.clock.move(32 * DAY)
    await world.operator.post("/_sandbox/clock", json={"advance_s": 0})
    renewal = next(one for one in await items(world, "/payments") if one["charge_type"] == "renewal")
    await receive(world, "payment.succeeded", renewal, "msg_2")
    found = (await world.operator.get(f"/payments/{renewal['payment_id']}/line-items", headers=AUTH)).json()["items"]
    stored = (await world.tenants.get(ACME)).subscription
    assert stored is not None
    fee = (await world.dodo.retrieve_subscription(stored.id)).product_name
    name = next(one["name"] for one in found if (one["name"] == fee) == (line == "fee"))
    await hear(world, await refund_line(world, renewal, name))
    assert (await account(world)).balance_nanos == left
