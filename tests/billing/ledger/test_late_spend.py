"""What is charged late, or without the hold that the store has lost, counts like all that is charged."""

import asyncio
from dataclasses import replace

from redis.asyncio import Redis

from billing.ledger.account import Settlement
from billing.ledger.codec import pack_settlement, snapshot_of, unpack_settlement
from billing.ledger.ledger import Ledger
from billing.money import Nanos
from billing.store.keys import shard_for
from billing.tenants.spend_caps import Window, cap_at
from tests.support.clock import SteppedClock
from tests.support.samples import ACME, money, request, settlement

MONTH = 1_793_491_200_000
COST = 20_000


async def _held(ledger: Ledger, clock: SteppedClock) -> Settlement:
    """An ended request whose cost two counts depend on: its key's cap, and the month's volume."""
    cap = cap_at(Window.DAY, Nanos(100_000), clock.now_ms)
    hold = await ledger.hold(request(caps=(cap,), month_start_ms=MONTH, lease_ms=1))
    ended = replace(settlement(), snapshot=snapshot_of(hold, hold.held_nanos))
    assert unpack_settlement(pack_settlement(ended)) == ended
    return ended


async def _spent(store: Redis, ledger: Ledger) -> tuple[int, int]:
    """What the month and the cap have counted."""
    capped = await store.hget(shard_for(ACME).account(ACME), "cap:key_1:day")
    return await ledger.spent(ACME, MONTH), int(str(capped).split("|")[1])


async def test_a_settle_after_its_lease_counts(store: Redis, ledger: Ledger, clock: SteppedClock) -> None:
    await ledger.grant(money(100_000))
    ended = await _held(ledger, clock)
    await asyncio.sleep(0.01)
    assert await ledger.expire() == 1
    assert await _spent(store, ledger) == (0, 0)
    await ledger.settle(ended)
    await ledger.settle(ended)
    assert await _spent(store, ledger) == (COST, COST)


async def test_a_settle_whose_hold_is_lost_counts(store: Redis, ledger: Ledger, clock: SteppedClock) -> None:
    await ledger.grant(money(100_000))
    ended = await _held(ledger, clock)
    await store.flushall()
    await ledger.grant(money(100_000))
    await ledger.settle(ended)
    await ledger.settle(ended)
    assert await _spent(store, ledger) == (COST, COST)
