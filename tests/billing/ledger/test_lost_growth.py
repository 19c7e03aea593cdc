"""A store that kept a hold and lost its extensions: what they paid for was delivered and is charged."""

import asyncio
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from billing.ledger.account import Funding, HoldRequest, Settlement
from billing.ledger.codec import snapshot_of
from billing.ledger.ledger import Ledger
from billing.money import Nanos
from billing.store.keys import shard_for
from billing.tenants.spend_caps import Window, cap_at
from tests.support.clock import SteppedClock
from tests.support.samples import ACME, money, request, settlement

STEPPED = request(step_tokens=4)
"""Its hold begins with 18,000."""


async def _grown(store: Redis, ledger: Ledger, asked: HoldRequest, completion: int) -> Settlement:
    """A settle whose hold was extended to all it may cost, in a store that has lost the extension."""
    shard = shard_for(ACME)
    hold = await ledger.hold(asked)
    kept = {key: await store.hgetall(key) for key in (shard.holds, shard.buckets(ACME), shard.account(ACME))}
    held = await ledger.extend(asked, Nanos(50_000), Nanos(0))
    for key, fields in kept.items():
        await store.delete(key)
        if fields:
            await store.hset(key, mapping=fields)
    return replace(settlement(asked.request_id, completion), snapshot=snapshot_of(hold, held))


@pytest.mark.parametrize(("completion", "charged"), [(2, 14_000), (15, 40_000), (500, 50_000)])
async def test_a_hold_whose_growth_is_lost_is_charged_all_that_it_was(
    store: Redis, ledger: Ledger, completion: int, charged: int
) -> None:
    await ledger.grant(money(100_000))
    ended = await _grown(store, ledger, STEPPED, completion)
    receipt = await ledger.settle(ended)
    assert receipt.record.charged_nanos == charged
    assert [draw.amount for draw in receipt.record.draws] == [charged]
    assert (await ledger.settle(ended)).record == receipt.record
    account = await ledger.account(ACME)
    assert (account.balance_nanos, account.held_nanos, account.open_holds) == (100_000 - charged, 0, 0)


async def test_lost_growth_that_others_have_drawn_is_owed(store: Redis, ledger: Ledger) -> None:
    await ledger.grant(money(50_000))
    ended = await _grown(store, ledger, STEPPED, 15)
    await ledger.hold(request("req_2", step_tokens=8))
    await ledger.settle(settlement("req_2", completion=8))
    assert (await ledger.settle(ended)).record.charged_nanos == 40_000
    assert (await ledger.account(ACME)).balance_nanos == -16_000


@pytest.mark.parametrize("credit", [0, 30_000])
async def test_lost_growth_of_postpaid_use_is_exposure(store: Redis, ledger: Ledger, credit: int) -> None:
    if credit:
        await ledger.grant(money(credit))
    ended = await _grown(store, ledger, replace(STEPPED, funding=Funding(credit_limit=Nanos(100_000))), 15)
    receipt = await ledger.settle(ended)
    assert (receipt.record.charged_nanos, receipt.record.overage_nanos) == (40_000, 40_000 - credit)
    account = await ledger.account(ACME)
    assert (account.overage_nanos, account.held_nanos, account.balance_nanos) == (40_000 - credit, 0, 0)


async def test_late_settle_of_lost_growth_charges_all_of_it(store: Redis, ledger: Ledger) -> None:
    await ledger.grant(money(100_000))
    ended = await _grown(store, ledger, replace(STEPPED, lease_ms=1), 15)
    await asyncio.sleep(0.01)
    assert await ledger.expire() == 1
    assert (await ledger.settle(ended)).record.charged_nanos == 40_000


async def test_lost_growth_counts_under_a_cap_beside_what_others_hold(
    store: Redis, ledger: Ledger, clock: SteppedClock
) -> None:
    await ledger.grant(money(100_000))
    cap = cap_at(Window.DAY, Nanos(100_000), clock.now_ms)
    await ledger.hold(request("req_2", caps=(cap,), step_tokens=4))
    ended = await _grown(store, ledger, replace(STEPPED, caps=(cap,)), 15)
    await ledger.settle(ended)
    assert await store.hget(shard_for(ACME).account(ACME), "cap:key_1:day") == f"{cap.start_ms}|40000|18000"
