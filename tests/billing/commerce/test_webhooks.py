"""A payment is credited once, a refund taken back once, a subscription believed only from Dodo itself."""

import asyncio
import json
from dataclasses import replace
from itertools import permutations

import pytest
from redis.asyncio import Redis

from billing.commerce.inbox import Outcome
from billing.commerce.webhooks import Webhooks
from billing.store.errors import StoreUnavailable
from billing.store.keys import INBOX, PRODUCTS
from billing.usage import Unit
from tests.support.purchases import ACME, USD, balance, refund
from tests.support.world import DAY, HOUR, MINUTE, SECRET, World, delivery


async def test_paid_pack_is_credited_by_product_and_quantity(world: World) -> None:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small", quantity=3)
    done = await world.webhooks().receive(*delivery("payment.succeeded", payment))
    assert done.outcome is Outcome.APPLIED
    account = await world.ledger.account(ACME)
    (bucket,) = account.buckets
    assert (bucket.unit, bucket.remaining, bucket.granted) == (Unit.NANOS, 15 * USD, 15 * USD)
    assert bucket.id == f"payment:{payment['payment_id']}:{await world.product('pack:small')}"
    assert bucket.expires_at_ms == world.clock() + 30 * DAY


@pytest.mark.parametrize("created_at", ["2012-01-01T00:00:00Z", "2999-12-31T23:59:59Z", None])
async def test_pack_lasts_from_its_grant_whatever_time_the_payment_bears(world: World, created_at: str | None) -> None:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small") | {"created_at": created_at}
    await world.webhooks().receive(*delivery("payment.succeeded", payment))
    (bucket,) = (await world.ledger.account(ACME)).buckets
    assert bucket.expires_at_ms == world.clock() + 30 * DAY
    assert await balance(world) == 5 * USD


async def test_pack_whose_payment_arrives_after_its_days_is_not_over_already(world: World) -> None:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    world.clock.move(31 * DAY)
    webhooks = world.webhooks()
    await webhooks.receive(*delivery("payment.succeeded", payment))
    world.clock.move(DAY)
    await webhooks.receive(*delivery("payment.succeeded", payment, "msg_2"))
    (bucket,) = (await world.ledger.account(ACME)).buckets
    assert bucket.expires_at_ms == world.clock() + 29 * DAY, "and a repeat lengthens nothing"


async def test_pack_of_requests_fills_a_bucket_of_requests(world: World) -> None:
    await world.tenant("acme")
    await world.webhooks().receive(*delivery("payment.succeeded", await world.buy("acme", "pack:calls")))
    (bucket,) = (await world.ledger.account(ACME)).buckets
    assert (bucket.unit, bucket.remaining, bucket.adapters) == (Unit.REQUESTS, 1000, ("base",))


async def test_repeated_delivery_credits_once(world: World) -> None:
    await world.tenant("acme")
    signed = delivery("payment.succeeded", await world.buy("acme", "pack:small"))
    webhooks = world.webhooks()
    await asyncio.gather(*(webhooks.receive(*signed) for _ in range(5)))
    assert await balance(world) == 5 * USD


async def test_payment_under_another_webhook_id_credits_once(world: World) -> None:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    for number in range(3):
        await world.webhooks().receive(*delivery("payment.succeeded", payment, f"msg_{number}"))
    assert await balance(world) == 5 * USD


async def test_purchase_is_fixed_when_first_seen(world: World) -> None:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    await world.webhooks().receive(*delivery("payment.succeeded", payment))
    pack = world.catalog.packs["small"]
    raised = pack.model_copy(update={"grants": pack.grants.model_copy(update={"usd": 9 * USD})})
    world.catalog = world.catalog.model_copy(update={"packs": {"small": raised}})
    again = await world.webhooks().receive(*delivery("payment.succeeded", payment, "msg_2"))
    assert again.outcome is Outcome.APPLIED
    assert await balance(world) == 5 * USD


async def test_amount_and_metadata_grant_nothing(world: World) -> None:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    lies = {"total_amount": 9_999_999, "metadata": {"credits": "1000000", "farebox_tenant": "other"}}
    await world.webhooks().receive(*delivery("payment.succeeded", payment | lies))
    assert await balance(world) == 5 * USD


@pytest.mark.parametrize("kind", ["payment.cancelled", "payment.processing", "credit.added", "made.up"])
async def test_other_type_is_kept_and_moves_nothing(world: World, kind: str) -> None:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    kept = await world.webhooks().receive(*delivery(kind, payment))
    assert kept.outcome is Outcome.KEPT
    assert await balance(world) == 0
    assert json.loads(str(await world.redis.hget(INBOX, "msg_1")))["type"] == kind


async def test_payment_without_cart_is_looked_up(world: World) -> None:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    await world.webhooks().receive(*delivery("payment.succeeded", payment | {"product_cart": None}))
    assert await balance(world) == 5 * USD


async def test_odd_numbers_nulls_and_unknown_fields_are_read(world: World) -> None:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    cart = [{"product_id": await world.product("pack:small"), "quantity": "2", "novel": {"a": [1]}}]
    odd = {"product_cart": cart, "total_amount": "1000", "tax": None, "payment_method": None, "card_last_four": None}
    odd |= {"created_at": None, "subscription_ids": None, "service_periods": None, "refunds": None, "novel": []}
    done = await world.webhooks().receive(*delivery("payment.succeeded", payment | odd))
    assert done.outcome is Outcome.APPLIED
    assert await balance(world) == 10 * USD


async def test_payment_of_unknown_customer_is_parked(world: World) -> None:
    tenant = await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    webhooks = world.webhooks()
    unknown = payment | {"customer": {"customer_id": "cus_later", "email": "a@example.com", "name": "A"}}
    parked = await webhooks.receive(*delivery("payment.succeeded", unknown))
    assert (parked.outcome, await balance(world)) == (Outcome.WAITING, 0)
    assert "cus_later" in parked.reason
    assert await webhooks.replay(world.sweep()) == 0, "not due yet"
    await world.tenants.set_customer(tenant.id, "cus_later")
    world.clock.move(HOUR)
    assert await webhooks.replay(world.sweep()) == 1
    assert (await balance(world), await webhooks.inbox.parked_count()) == (5 * USD, 0)


async def test_payment_for_unknown_product_is_parked(world: World) -> None:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    product = await world.product("pack:small")
    terms = await world.redis.hget(PRODUCTS, product)
    await world.redis.hdel(PRODUCTS, product)
    webhooks = world.webhooks()
    parked = await webhooks.receive(*delivery("payment.succeeded", payment))
    assert (parked.outcome, await balance(world)) == (Outcome.WAITING, 0)
    await world.redis.hset(PRODUCTS, product, str(terms))
    world.clock.move(HOUR)
    assert await webhooks.replay(world.sweep()) == 1
    assert await balance(world) == 5 * USD


async def test_delivery_is_parked_while_dodo_is_unavailable(world: World) -> None:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    await world.fault("status:500", path="/payments")
    webhooks = world.webhooks()
    parked = await webhooks.receive(*delivery("payment.succeeded", payment | {"product_cart": None}))
    assert parked.reason.startswith("DodoUnavailable")
    await world.heal()
    world.clock.move(HOUR)
    assert await webhooks.replay(world.sweep()) == 1
    assert await balance(world) == 5 * USD


async def test_unavailable_store_raises(world: World) -> None:
    away = Redis.from_url("unix:///nowhere/s.sock", decode_responses=True)
    webhooks = Webhooks(replace(world.commerce(), redis=away, catalog=_no_catalog), SECRET)
    with pytest.raises(StoreUnavailable):
        await webhooks.receive(*delivery("payment.succeeded", {}))
    await away.aclose()


async def _no_catalog() -> None:
    return None


async def test_delivery_is_tried_again_after_a_crash(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.tenant("acme")
    signed = delivery("payment.succeeded", await world.buy("acme", "pack:small"))

    async def dies(*_: object) -> None:
        raise asyncio.CancelledError

    webhooks = world.webhooks()
    monkeypatch.setattr(webhooks.inbox, "finish", dies)
    with pytest.raises(asyncio.CancelledError):
        await webhooks.receive(*signed)
    world.clock.move(MINUTE)
    assert await world.webhooks().replay(world.sweep()) == 1
    assert (await world.webhooks().receive(*signed)).outcome is Outcome.APPLIED
    assert await balance(world) == 5 * USD


async def test_refunds_claw_back_at_most_what_was_granted(world: World) -> None:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    webhooks = world.webhooks()
    await webhooks.receive(*delivery("payment.succeeded", payment))
    for number, (cents, left) in enumerate([(167, 3_330_000_000), (167, 1_660_000_000), (166, 0)]):
        made = await refund(world, payment, cents)
        for copy in range(2):
            await webhooks.receive(*delivery("refund.succeeded", made, f"msg_r{number}_{copy}"))
        assert await balance(world) == left


async def test_refund_before_its_payment_counts(world: World) -> None:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    webhooks = world.webhooks()
    await webhooks.receive(*delivery("refund.succeeded", await refund(world, payment), "msg_2"))
    assert await balance(world) == 0
    await webhooks.receive(*delivery("payment.succeeded", payment, "msg_1"))
    assert await balance(world) == 0


async def test_refund_grants_nothing(world: World) -> None:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    webhooks = world.webhooks()
    made = await refund(world, payment, 250)
    for copy in range(2):
        await webhooks.receive(*delivery("refund.succeeded", made, f"msg_{copy}"))
        assert (await world.ledger.account(ACME)).buckets == (), "only a payment that succeeded grants"
    await webhooks.receive(*delivery("payment.succeeded", payment, "msg_2"))
    assert await balance(world) == 2_500_000_000


async def test_refund_is_shared_between_lines(world: World) -> None:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    both = [{"product_id": await world.product(f"pack:{name}"), "quantity": 1} for name in ("small", "calls")]
    webhooks = world.webhooks()
    await webhooks.receive(*delivery("payment.succeeded", payment | {"product_cart": both}))
    await webhooks.receive(*delivery("refund.succeeded", await refund(world, payment, 250), "msg_2"))
    left = {bucket.unit: bucket.remaining for bucket in (await world.ledger.account(ACME)).buckets}
    assert left == {Unit.NANOS: 2_500_000_000, Unit.REQUESTS: 500}


@pytest.mark.parametrize("order", list(permutations(range(3))))
async def test_balance_is_the_same_in_any_order(world: World, order: tuple[int, ...]) -> None:
    await world.tenant("acme")
    first, second = await world.buy("acme", "pack:small"), await world.buy("acme", "pack:small", quantity=2)
    signed = [
        delivery("payment.succeeded", first, "msg_a"),
        delivery("payment.succeeded", second, "msg_b"),
        delivery("refund.succeeded", await refund(world, second, 500), "msg_c"),
    ]
    for index in order:
        await world.webhooks().receive(*signed[index])
    assert await balance(world) == 10 * USD


async def test_prune_deletes_finished_deliveries_only(world: World) -> None:
    await world.tenant("acme")
    webhooks = world.webhooks()
    await webhooks.receive(*delivery("made.up", {}, "msg_1"))
    await webhooks.receive(*delivery("payment.succeeded", {"payment_id": "pay_1"}, "msg_2"))
    assert await webhooks.prune() == 0
    world.clock.move(31 * DAY)
    assert await webhooks.prune() == 1
    assert await webhooks.inbox.get("msg_2") is not None
