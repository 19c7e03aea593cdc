"""A gateway's open requests: renewed while it lives, billed by their last checkpoint when it does not."""

import asyncio
import contextlib
from collections.abc import Sequence
from unittest.mock import AsyncMock

import pytest
from redis.asyncio import Redis

from billing.ledger.account import Progress
from billing.ledger.leases import Leases
from billing.ledger.ledger import Ledger
from billing.store.keys import shard_for
from billing.usage import RequestId, Status, UsageRecord
from tests.support.clock import SteppedClock
from tests.support.samples import ACME, money, records, request, settlement


def progress(request_id: str = "req_1", completion: int = 5) -> Progress:
    done = settlement(request_id, completion)
    return Progress(done.request_id, done.tenant, done.usage, done.list_nanos)


class Lost:
    def __init__(self) -> None:
        self.ids: set[RequestId] = set()

    def __call__(self, ids: frozenset[RequestId]) -> None:
        self.ids |= ids


async def running_for(leases: Leases, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await leases.run()


async def test_a_lease_lasts_as_long_as_its_gateway(ledger: Ledger, store: Redis) -> None:
    await ledger.grant(money(100_000))
    await ledger.hold(request(lease_ms=600))
    lost = Lost()
    leases = Leases(ledger, lost, checkpoint_s=0.1, expire_s=0.1)
    leases.update(progress())
    await running_for(leases, 1.2)
    assert (lost.ids, (await ledger.account(ACME)).open_holds) == (set(), 1)
    leases.drop(RequestId("req_1"))
    await running_for(leases, 1.5)
    ((_, entry),) = await store.xrevrange(shard_for(ACME).stream, count=1)
    record = UsageRecord.from_json(entry["p"])
    assert (record.status, record.usage.completion_tokens) == (Status.EXPIRED, 5)


async def test_a_lost_lease_is_reported_once(ledger: Ledger) -> None:
    await ledger.grant(money(100_000))
    await ledger.hold(request(lease_ms=1))
    lost = Lost()
    leases = Leases(ledger, lost)
    leases.update(progress())
    await asyncio.sleep(0.01)
    await ledger.expire()
    assert await leases.renew_once() == {"req_1"}
    assert (lost.ids, len(leases)) == ({"req_1"}, 0)
    assert await leases.renew_once() == frozenset()


async def test_what_was_settled_meanwhile_is_not_lost(ledger: Ledger) -> None:
    await ledger.grant(money(100_000))
    await ledger.hold(request())
    lost = Lost()
    leases = Leases(ledger, lost)
    leases.update(progress())
    await ledger.settle(settlement())
    renewing = asyncio.create_task(leases.renew_once())
    await asyncio.sleep(0)
    leases.drop(RequestId("req_1"))
    assert await renewing == frozenset()
    assert lost.ids == set()


async def test_leases_of_many_tenants_travel_together(ledger: Ledger) -> None:
    leases = Leases(ledger, Lost())
    await ledger.grant(money(10_000_000))
    for n in range(100):
        await ledger.hold(request(f"req_{n}"))
        leases.update(progress(f"req_{n}"))
    assert await leases.renew_once() == frozenset()
    assert len(leases) == 100


class Buggy(Ledger):
    """A ledger whose first calls meet a bug."""

    bugs = 2

    async def checkpoint(self, progress: Sequence[Progress]) -> frozenset[RequestId]:
        self._meet()
        return await super().checkpoint(progress)

    async def expire(self, limit: int = 100) -> int:
        self._meet()
        return await super().expire(limit)

    def _meet(self) -> None:
        if self.bugs:
            self.bugs -= 1
            raise RuntimeError("unforeseen")


async def test_a_bug_stops_neither_renewal_nor_expiry(ledger: Ledger, store: Redis, clock: SteppedClock) -> None:
    await ledger.grant(money(200_000))
    await ledger.hold(request("req_mine", lease_ms=600))
    await ledger.hold(request("req_left", lease_ms=1))
    leases = Leases(Buggy(store, clock), Lost(), checkpoint_s=0.1, expire_s=0.1)
    leases.update(progress("req_mine"))
    await running_for(leases, 1.2)
    (expired,) = await records(store)
    assert (expired.request_id, expired.status) == ("req_left", Status.EXPIRED)
    assert (await ledger.account(ACME)).open_holds == 1


async def test_unexpected_errors_are_counted_and_end_nothing(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renewal and expiry go on, each error counted for the gateway's metric."""
    await ledger.grant(money(100_000))
    await ledger.hold(request())
    monkeypatch.setattr(ledger, "checkpoint", AsyncMock(side_effect=[ValueError("of ours"), frozenset(["req_1"])]))
    monkeypatch.setattr(ledger, "expire", AsyncMock(side_effect=ValueError("of ours")))
    lost = Lost()
    leases = Leases(ledger, lost, checkpoint_s=0.01, expire_s=10)
    leases.update(progress())
    await running_for(leases, 0.2)
    assert (leases.failures, lost.ids) == (1, {"req_1"})
    expiring = Leases(ledger, lost, checkpoint_s=10, expire_s=0.01)
    await running_for(expiring, 0.2)
    assert expiring.failures > 1
