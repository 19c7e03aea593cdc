"""Each draw says what its credit was sold for, whatever happens to the bucket meanwhile."""

import json
from dataclasses import replace

from redis.asyncio import Redis

from billing.ledger.account import Bucket, Clawback, Funding, Grant, Progress
from billing.ledger.codec import snapshot_of
from billing.ledger.ledger import Ledger
from billing.money import Nanos
from billing.store.keys import shard_for
from billing.usage import OVERAGE, BucketId, RequestId, Unit, UsageRecord
from tests.support.clock import SteppedClock
from tests.support.samples import ACME, MAX_COST, allowance, money, records, request, settlement

PRICE = 5_000_000_000_000_000_001
"""More nanos than Lua's numbers can tell apart."""


def sold(amount: int, price: int = PRICE, unit: Unit = Unit.NANOS, source: str = "payment:1") -> Grant:
    return Grant(source, ACME, unit, amount, price=price)


def allowance_sold(bucket_id: str, amount: int, ends_at_ms: int, price: int = 20) -> Bucket:
    return replace(allowance(bucket_id, amount, ends_at_ms), price=price)


def sales(record: UsageRecord) -> list[tuple[BucketId, int, int]]:
    return [(draw.bucket, draw.price, draw.sold) for draw in record.draws]


async def served(ledger: Ledger, request_id: str = "req_1", tokens: int = 20, **changes: object) -> UsageRecord:
    await ledger.hold(request(request_id, **changes))
    return (await ledger.settle(settlement(request_id, completion=tokens))).record


async def test_draw_of_a_pack_says_what_the_pack_was_sold_for(ledger: Ledger) -> None:
    await ledger.grant(sold(MAX_COST))
    assert sales(await served(ledger)) == [("payment:1", PRICE, MAX_COST)]


async def test_draw_of_calls_says_what_they_were_sold_for(ledger: Ledger) -> None:
    await ledger.grant(sold(3, 7, Unit.REQUESTS))
    assert sales(await served(ledger)) == [("payment:1", 7, 3)]


async def test_draw_of_an_allowance_says_what_the_period_was_sold_for(ledger: Ledger, clock: SteppedClock) -> None:
    paid = Funding(allowance_sold("allowance:sub_1:0:pro", 30_000, clock.now_ms + 1_000), Nanos(40_000))
    assert sales(await served(ledger, funding=paid)) == [("allowance:sub_1:0:pro", 20, 30_000), (OVERAGE, 0, 0)]


async def test_gift_has_no_price_in_record_bucket_or_entry(ledger: Ledger, store: Redis) -> None:
    await ledger.grant(money(2 * MAX_COST))
    assert sales(await served(ledger)) == [("payment:1", 0, 0)]
    entries = [fields["p"] for _, fields in await store.xrange(shard_for(ACME).stream)]
    buckets = await store.hgetall(shard_for(ACME).buckets(ACME))
    assert not any("price" in json.loads(entry) | json.loads(entry).get("draws", [{}])[0] for entry in entries)
    assert [text.count("|") for text in buckets.values()] == [6]


async def test_refund_of_a_part_leaves_the_rest_at_its_price(ledger: Ledger) -> None:
    """A third is taken back: of what is left each unit is still worth a hundred-thousandth of the price."""
    await ledger.grant(sold(150_000))
    refund = Clawback("refund:1", ACME, "payment:1", 50_000)
    await ledger.claw_back(refund)
    assert sales(await served(ledger)) == [("payment:1", PRICE, 150_000)]
    await ledger.restore(refund)
    assert sales(await served(ledger, "req_2")) == [("payment:1", PRICE, 150_000)]
    [bucket] = (await ledger.account(ACME)).buckets
    assert (bucket.price, bucket.sold, bucket.granted, bucket.remaining) == (PRICE, 150_000, 150_000, 50_000)


async def test_price_is_kept_by_extension_expiry_and_late_settle(ledger: Ledger, store: Redis) -> None:
    await ledger.grant(sold(2 * MAX_COST))
    await ledger.hold(request(step_tokens=1))
    await ledger.extend(request(), Nanos(30_000), Nanos(30_000))
    so_far = settlement(completion=2)
    await ledger.checkpoint([Progress(so_far.request_id, ACME, so_far.usage, so_far.list_nanos)])
    await store.zadd(shard_for(ACME).leases, {"req_1": 1})
    assert await ledger.expire() == 1
    await ledger.settle(settlement(completion=5))
    assert [sales(one) for one in await records(store)] == 2 * [[("payment:1", PRICE, 2 * MAX_COST)]]


async def test_price_is_kept_by_recovery_of_a_lost_hold(ledger: Ledger, store: Redis, clock: SteppedClock) -> None:
    """Also that of an allowance which the store has lost with it."""
    await ledger.grant(sold(MAX_COST))
    funding = Funding(allowance_sold("allowance:sub_1:0:pro", 30_000, clock.now_ms + 1_000))
    hold = await ledger.hold(request(funding=funding))
    shard = shard_for(ACME)
    await store.delete(shard.holds, shard.leases)
    await store.hdel(shard.buckets(ACME), "allowance:sub_1:0:pro")
    lost = settlement(completion=20)
    receipt = await ledger.settle(replace(lost, snapshot=snapshot_of(hold, hold.held_nanos)))
    assert sales(receipt.record) == [("allowance:sub_1:0:pro", 20, 30_000), ("payment:1", PRICE, MAX_COST)]
    assert receipt.record.request_id == RequestId("req_1")


async def test_bucket_without_a_price_is_read_as_before(ledger: Ledger, store: Redis) -> None:
    await store.hset(shard_for(ACME).buckets(ACME), "payment:1", "n|100000|0|100000|0|0|")
    assert sales(await served(ledger)) == [("payment:1", 0, 0)]


async def test_entry_of_a_grant_says_price_and_expiry(ledger: Ledger, store: Redis, clock: SteppedClock) -> None:
    await ledger.grant(Grant("payment:1", ACME, Unit.NANOS, 5, clock.now_ms + 1, price=7))
    [(_, entry)] = await store.xrange(shard_for(ACME).stream)
    moved = json.loads(entry["p"])
    assert (moved["price"], moved["expires_at_ms"]) == (7, clock.now_ms + 1)
