"""A store that lost its last seconds: each movement counts once in the end; what cannot be known stays unresolved."""

import asyncio
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from redis.asyncio import Redis

from billing.ledger.account import Adjustment, Clawback, Funding, HoldRequest, Settlement
from billing.ledger.codec import pack_settlement, snapshot_of, unpack_settlement
from billing.ledger.errors import DuplicateRequest, UnknownHold, UnresolvedSettlement
from billing.ledger.ledger import Ledger
from billing.ledger.recovery import Recovery
from billing.ledger.replay import Recent, Replay
from billing.ledger.spool import Spool
from billing.money import Nanos
from billing.store.connection import connect, identity, replicated, verify
from billing.store.errors import StoreUnavailable
from billing.store.keys import shard_for
from billing.usage import RequestId, TenantId, Unit
from cluster import valkey
from tests.support.clock import SteppedClock
from tests.support.fleet import HOST, durable, wait_until
from tests.support.samples import ACME, calls, money, request, settlement

WINDOW_MS = 400
COST = 20_000
"""Of ``settlement()``; its hold is 50,000."""


async def _held(ledger: Ledger, asked: HoldRequest, completion: int = 5) -> Settlement:
    """A settle that knows its hold, as a gateway makes it."""
    hold = await ledger.hold(asked)
    return replace(settlement(asked.request_id, completion), snapshot=snapshot_of(hold, hold.held_nanos))


async def _forget(store: Redis, request_id: str = "req_1") -> None:
    """What a failover does to a hold that had not reached the replica, with all that it changed."""
    shard = shard_for(ACME)
    await store.hdel(shard.holds, request_id)
    await store.zrem(shard.leases, request_id)
    for bucket, text in (await store.hgetall(shard.buckets(ACME))).items():
        unit, remaining, held, *rest = text.split("|")
        back = "|".join([unit, str(int(remaining) + int(held)), "0", *rest])
        await store.hset(shard.buckets(ACME), bucket, back)
    await store.hset(shard.account(ACME), mapping={"open": 0, "overage_held": 0})


async def test_a_lost_hold_is_charged_once_and_never_above_what_it_was(store: Redis, ledger: Ledger) -> None:
    await ledger.grant(money(100_000))
    ended = await _held(ledger, request(), completion=500)
    await _forget(store)
    receipt = await ledger.settle(ended)
    again = await ledger.settle(ended)
    assert (receipt.record.charged_nanos, receipt.is_repeat) == (50_000, False)
    assert (again.record, again.is_repeat) == (receipt.record, True)
    account = await ledger.account(ACME)
    assert (account.balance_nanos, account.held_nanos, account.open_holds, account.seq) == (50_000, 0, 0, 2)
    with pytest.raises(DuplicateRequest):
        await ledger.hold(request())


async def test_what_others_have_drawn_meanwhile_is_owed(store: Redis, ledger: Ledger) -> None:
    await ledger.grant(money(50_000))
    ended = await _held(ledger, request())
    await _forget(store)
    await ledger.hold(request("req_2"))
    await ledger.settle(settlement("req_2", completion=20))
    assert (await ledger.settle(ended)).record.charged_nanos == COST
    assert (await ledger.account(ACME)).balance_nanos == -COST
    await ledger.grant(money(30_000, "payment:2"))
    assert (await ledger.account(ACME)).balance_nanos == 10_000


async def test_a_lost_hold_of_requests_takes_its_request(store: Redis, ledger: Ledger) -> None:
    await ledger.grant(calls(3))
    ended = await _held(ledger, request())
    await _forget(store)
    receipt = await ledger.settle(ended)
    assert (receipt.record.charged_nanos, [d.amount for d in receipt.record.draws]) == (0, [1])
    assert (await ledger.account(ACME)).buckets[0].remaining == 2


async def test_postpaid_use_of_a_lost_hold_is_exposure(store: Redis, ledger: Ledger) -> None:
    ended = await _held(ledger, request(funding=Funding(credit_limit=Nanos(60_000))))
    await _forget(store)
    assert (await ledger.settle(ended)).record.draws[0].bucket == "overage"
    assert (await ledger.account(ACME)).overage_nanos == COST


async def test_recovery_leaves_a_hold_alone_that_the_store_has(ledger: Ledger) -> None:
    await ledger.grant(money(100_000))
    ended = await _held(ledger, request())
    assert await ledger.recovery.settle(ended) is None
    await ledger.settle(ended)
    assert await ledger.recovery.settle(ended) is None
    account = await ledger.account(ACME)
    assert (account.balance_nanos, account.held_nanos, account.seq) == (100_000 - COST, 0, 2)


async def test_a_settle_that_does_not_know_its_hold_is_not_guessed(store: Redis, ledger: Ledger) -> None:
    await ledger.grant(money(100_000))
    await _held(ledger, request())
    await _forget(store)
    with pytest.raises(UnknownHold):
        await ledger.settle(settlement())


async def test_lost_hold_whose_credit_is_lost_too_stays_unresolved(store: Redis, ledger: Ledger) -> None:
    await ledger.grant(money(100_000))
    ended = await _held(ledger, request())
    await store.flushall()
    for _ in range(2):
        with pytest.raises(UnresolvedSettlement):
            await ledger.settle(ended)
    recovery = Recovery(store, SteppedClock(0), 3_600_000)
    (kept,) = await recovery.kept()
    assert (kept.settlement, "credit" in kept.reason) == (ended, True)
    with pytest.raises(UnresolvedSettlement):
        await recovery.charge(RequestId("req_1"))
    await ledger.grant(money(100_000))
    assert (await recovery.charge(RequestId("req_1"))).record.charged_nanos == COST
    assert await recovery.kept() == []
    with pytest.raises(UnknownHold):
        await recovery.drop(RequestId("req_1"))


async def test_lost_hold_is_charged_while_its_mark_would_be_remembered(store: Redis, clock: SteppedClock) -> None:
    """Both sides of the boundary: at no age may a settled request be taken for one that never was."""
    ledger = Ledger(store, clock, WINDOW_MS)
    await ledger.grant(money(1_000_000))
    charged = await _held(ledger, request("req_settled"))
    lost = await _held(ledger, request("req_lost"))
    await ledger.settle(charged)
    started, fates = time.monotonic(), set[str]()
    while time.monotonic() - started < 4.5 * WINDOW_MS / 1000:
        fates.add(await _fate(ledger, charged))
        await asyncio.sleep(WINDOW_MS / 20_000)
    assert fates == {"repeat", "kept"}
    assert await _fate(ledger, lost) == "settled", "an open hold is charged at any age"
    assert (await ledger.account(ACME)).balance_nanos == 1_000_000 - 2 * COST


async def _fate(ledger: Ledger, ended: Settlement) -> str:
    try:
        receipt = await ledger.settle(ended)
    except UnresolvedSettlement:
        return "kept"
    return "repeat" if receipt.is_repeat else "settled"


@pytest.mark.parametrize(("age", "fate"), [(0.0, "settled"), (1.9, "settled"), (2.0, "kept"), (2.1, "kept")])
async def test_age_of_a_lost_hold_decides(store: Redis, clock: SteppedClock, age: float, fate: str) -> None:
    window_ms = 60_000
    ledger = Ledger(store, clock, window_ms)
    await ledger.grant(money(1_000_000))
    ended = await _held(ledger, request())
    assert ended.snapshot is not None
    await _forget(store)
    older = replace(ended.snapshot, held_at_ms=ended.snapshot.held_at_ms - int(age * window_ms))
    assert await _fate(ledger, replace(ended, snapshot=older)) == fate


async def test_a_marker_of_a_clock_that_was_ahead_is_found(store: Redis, clock: SteppedClock) -> None:
    window_ms = 3_600_000
    ledger = Ledger(store, clock, window_ms)
    await ledger.grant(money(1_000_000))
    ended = await _held(ledger, request())
    await ledger.settle(ended)
    ring, now_ms = shard_for(ACME).settled, (await store.time())[0] * 1000
    here = now_ms // window_ms
    await store.rename(ring[here % 4], ring[(here + 1) % 4])
    assert (await ledger.settle(ended)).is_repeat


async def test_spool_hands_on_a_lost_hold_and_keeps_nothing_of_it(store: Redis, ledger: Ledger, tmp_path: Path) -> None:
    await ledger.grant(money(100_000))
    ended = await _held(ledger, request())
    assert unpack_settlement(pack_settlement(ended)) == ended
    spool = Spool(tmp_path)
    spool.append(ended)
    await store.flushall()
    assert await spool.replay(ledger) == 1
    assert (spool.pending, spool.refused, len(await Recovery(store, SteppedClock(0), 1).kept())) == (0, 0, 1)
    spool.close()


async def test_a_store_that_came_back_without_its_last_seconds_gets_them_again(tmp_path: Path) -> None:
    """Grants, holds and settles of the window are gone; the log before them is there."""
    server = valkey.start(tmp_path / "a")
    redis, recent = await connect(server.url), Recent()
    ledger = Ledger(redis, on_done=recent.note)
    replay = Replay(ledger, recent, partial(identity, redis), partial(verify, redis))
    await ledger.grant(money(1_000_000))
    assert await replay.watch_once() == 0
    await redis.bgrewriteaof()
    await asyncio.sleep(0.3)
    server.kill()
    saved = tmp_path / "saved"
    await asyncio.to_thread(_copy, tmp_path / "a", saved)
    server = valkey.start(tmp_path / "a")
    assert await replay.watch_once() == 1, "started again: the grant was sent again and counted once"
    for number in range(10):
        await ledger.settle(await _held(ledger, request(f"req_{number}")))
    await ledger.grant(money(1_000, "payment:2"))
    server.kill()
    with pytest.raises(StoreUnavailable):
        await replay.watch_once()
    await asyncio.to_thread(_copy, saved, tmp_path / "a")
    server = valkey.start(tmp_path / "a")
    assert (await ledger.account(ACME)).balance_nanos == 1_000_000
    assert await replay.watch_once() == 12
    account = await ledger.account(ACME)
    assert (account.balance_nanos, account.seq, account.open_holds) == (1_001_000 - 10 * COST, 12, 0)
    assert await replay.watch_once() == 0
    await redis.aclose()
    server.kill()


def _copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("s.sock", "lock"))


async def test_every_kind_of_movement_is_sent_again(store: Redis) -> None:
    recent = Recent()
    ledger = Ledger(store, on_done=recent.note)
    stores = iter([frozenset({"first"}), frozenset({"second"})])

    async def identify() -> frozenset[str]:
        return next(stores)

    replay = Replay(ledger, recent, identify, partial(verify, store))
    await replay.watch_once()
    await ledger.grant(money(100_000))
    await ledger.claw_back(Clawback("refund:1", ACME, "payment:1", 30_000))
    await ledger.restore(Clawback("refund:1", ACME, "payment:1", 30_000))
    await ledger.claw_back(Clawback("refund:2", ACME, "payment:1", 20_000))
    await ledger.adjust(Adjustment("adjustment:1", ACME, Unit.NANOS, -70_000, "a mistake"))
    postpaid = request(funding=Funding(credit_limit=Nanos(100_000)))
    await ledger.settle(await _held(ledger, postpaid))
    await ledger.repay_overage("payment:2", ACME, 5_000)
    before = await ledger.account(ACME)
    await store.flushall()
    assert await replay.watch_once() == 7
    after = await ledger.account(ACME)
    assert (after.balance_nanos, after.overage_nanos, after.seq) == (0, 5_000, 7)
    assert (before.balance_nanos, before.overage_nanos) == (0, 5_000)


async def test_movement_that_meets_an_unreadable_account_keeps_no_other_from_being_sent_again(store: Redis) -> None:
    recent, who = Recent(), [frozenset({"a"})]

    async def identify() -> frozenset[str]:
        return who[-1]

    ledger = Ledger(store, on_done=recent.note)
    replay = Replay(ledger, recent, identify, partial(verify, store))
    await replay.watch_once()
    bad = TenantId("aaa")
    for tenant in (bad, ACME):
        await ledger.grant(replace(money(100_000), tenant=tenant))
    await store.flushall()
    await store.set(shard_for(bad).account(bad), "no hash")
    who.append(frozenset({"b"}))
    assert await replay.watch_once() == 2
    assert (await ledger.account(ACME)).balance_nanos == 100_000
    assert await replay.watch_once() == 0, "and the next time there is nothing more to do"


async def test_a_store_that_took_over_and_is_not_durable_is_refused_until_it_is(store: Redis) -> None:
    recent, who = Recent(), [frozenset({"a"})]

    async def identify() -> frozenset[str]:
        return who[-1]

    replay = Replay(Ledger(store), recent, identify, partial(verify, store))
    await replay.watch_once()
    await store.config_set("appendfsync", "everysec")
    try:
        await replay.watch_once()
        replay.check()
        who.append(frozenset({"b"}))
        await replay.watch_once()
        with pytest.raises(StoreUnavailable, match="not on disk"):
            replay.check()
    finally:
        await store.config_set("appendfsync", "always")
    await replay.watch_once()
    replay.check()


async def test_what_was_acknowledged_long_before_is_not_sent_again(store: Redis) -> None:
    recent, who = Recent(), [frozenset({"a"})]

    async def identify() -> frozenset[str]:
        return who[-1]

    ledger = Ledger(store, on_done=recent.note)
    replay = Replay(ledger, recent, identify, partial(verify, store), window_s=0.1)
    await ledger.grant(money(100_000))
    assert (await replay.watch_once(), len(recent)) == (0, 1)
    await asyncio.sleep(0.15)
    assert (await replay.watch_once(), len(recent)) == (0, 0)
    who.append(frozenset({"b"}))
    assert await replay.watch_once() == 0


async def test_the_window_is_counted_from_when_the_store_was_last_the_same(store: Redis) -> None:
    """An outage longer than the window forgets nothing."""
    recent, is_away = Recent(), False

    async def identify() -> frozenset[str]:
        if is_away:
            raise StoreUnavailable
        return frozenset({f"{time.monotonic()}" if len(recent) else "a"})

    ledger = Ledger(store, on_done=recent.note)
    replay = Replay(ledger, recent, identify, partial(verify, store), window_s=0.1)
    await replay.watch_once()
    await ledger.grant(money(100_000))
    is_away = True
    for _ in range(3):
        await asyncio.sleep(0.1)
        with pytest.raises(StoreUnavailable):
            await replay.watch_once()
    is_away = False
    assert await replay.watch_once() == 1


async def test_what_is_kept_to_be_sent_again_is_bounded() -> None:
    recent = Recent(most=3)
    for number in range(5):
        recent.note(settlement(f"req_{number}"))
    recent.note(money(1))
    assert [getattr(m, "request_id", "grant") for m in recent.take()] == ["grant", "req_3", "req_4"]


async def test_a_settle_that_too_few_replicas_have_is_not_acknowledged(tmp_path: Path) -> None:
    primary = durable(tmp_path / "a").start().await_answer()
    replica = durable(tmp_path / "b", replicaof=f"{HOST} {primary.port}").start().await_answer()
    try:
        wait_until(lambda: replica.client.info()["master_link_status"] == "up", "a replica in step")
        redis = await connect(f"redis://{HOST}:{primary.port}", min_replicas_acked=1)
        ledger = Ledger(redis)
        await ledger.grant(money(100_000))
        ended = await _held(ledger, request())
        replica.kill()
        with pytest.raises(StoreUnavailable, match="0 of 1 replicas"):
            await ledger.settle(ended)
        replica.start()
        wait_until(lambda: replica.client.info()["master_link_status"] == "up", "a replica in step")
        await asyncio.to_thread(wait_until, lambda: primary.client.wait(1, 100) == 1, "an acknowledgement")
        assert (await ledger.settle(ended)).is_repeat
        await replicated(redis, shard_for(ACME).pulse)
        await redis.aclose()
    finally:
        primary.kill()
        replica.kill()
