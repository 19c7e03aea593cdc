"""Holds whose gateway is gone: billed by the last checkpoint, and the rest when a settle comes late."""

import asyncio

import pytest
from redis.asyncio import Redis

from billing.ledger.account import Clawback, Funding, Progress
from billing.ledger.ledger import Ledger
from billing.money import Nanos
from billing.store.keys import shard_for
from billing.usage import NOTHING, Status, Usage
from tests.support.clock import SteppedClock
from tests.support.samples import ACME, MAX_COST, allowance, calls, money, records, request, settlement


class TestLeases:
    SHORT_MS = 60

    async def _held(self, ledger: Ledger, **changes: object) -> None:
        await ledger.grant(money(100_000))
        await ledger.hold(request(lease_ms=self.SHORT_MS, **changes))

    def _progress(self, completion: int) -> Progress:
        done = settlement(completion=completion)
        return Progress(done.request_id, done.tenant, done.usage, done.list_nanos)

    async def test_the_last_checkpoint_is_billed_when_the_lease_ends(self, ledger: Ledger, store: Redis) -> None:
        await self._held(ledger)
        assert await ledger.checkpoint([self._progress(5)]) == frozenset()
        await asyncio.sleep(2 * self.SHORT_MS / 1000)
        assert [await ledger.expire(), await ledger.expire()] == [1, 0]
        (record,) = await records(store)
        assert (record.status, record.charged_nanos, record.usage.completion_tokens) == (Status.EXPIRED, 20_000, 5)
        assert (await ledger.account(ACME)).open_holds == 0

    async def test_without_a_checkpoint_nothing_is_billed(self, ledger: Ledger, store: Redis) -> None:
        await self._held(ledger)
        await asyncio.sleep(2 * self.SHORT_MS / 1000)
        await ledger.expire()
        (record,) = await records(store)
        assert (record.charged_nanos, record.usage) == (0, NOTHING)

    async def test_checkpoint_renews_leases_and_names_those_gone(self, ledger: Ledger) -> None:
        await ledger.grant(money(100_000))
        await ledger.hold(request(lease_ms=600))
        for _ in range(4):
            await asyncio.sleep(0.2)
            assert await ledger.checkpoint([self._progress(1)]) == frozenset()
            assert await ledger.expire() == 0
        await ledger.settle(settlement())
        assert await ledger.checkpoint([self._progress(2)]) == {"req_1"}

    async def test_a_checkpoint_that_arrives_late_takes_nothing_back(self, ledger: Ledger, store: Redis) -> None:
        await self._held(ledger)
        await ledger.checkpoint([self._progress(5)])
        await ledger.checkpoint([self._progress(3)])
        await asyncio.sleep(2 * self.SHORT_MS / 1000)
        await ledger.expire()
        assert (await records(store))[0].usage.completion_tokens == 5

    async def test_a_late_settle_tops_up_what_the_checkpoint_missed(self, ledger: Ledger, store: Redis) -> None:
        await self._held(ledger)
        await ledger.checkpoint([self._progress(5)])
        await asyncio.sleep(2 * self.SHORT_MS / 1000)
        await ledger.expire()
        late = (await ledger.settle(settlement(completion=8))).record
        assert (late.record_id, late.charged_nanos, late.list_nanos) == ("rec_req_1_late", 6_000, 6_000)
        assert late.usage == Usage(completion_tokens=3, requests=0)
        again = await ledger.settle(settlement(completion=8))
        assert (again.is_repeat, again.record) == (True, late)
        assert sum(r.charged_nanos for r in await records(store)) == settlement(completion=8).list_nanos

    async def test_a_late_settle_takes_no_more_than_is_there(self, ledger: Ledger) -> None:
        await self._held(ledger)
        await asyncio.sleep(2 * self.SHORT_MS / 1000)
        await ledger.expire()
        await ledger.hold(request("req_2", max_tokens=42))  # leaves 6,000 of 100,000
        record = (await ledger.settle(settlement(completion=8))).record
        assert (record.charged_nanos, record.list_nanos, record.balance_nanos) == (6_000, 26_000, 0)

    async def test_a_late_settle_leaves_what_pays_a_debt(self, ledger: Ledger, clock: SteppedClock) -> None:
        await ledger.grant(money(MAX_COST))
        await ledger.hold(request("req_0"))
        await ledger.settle(settlement("req_0", completion=20))
        await ledger.claw_back(Clawback("refund:1", ACME, "payment:1", MAX_COST))
        funding = Funding(allowance("allowance:1", MAX_COST + 30_000, clock.now_ms + 1_000))
        await ledger.hold(request(lease_ms=self.SHORT_MS, funding=funding))
        await asyncio.sleep(2 * self.SHORT_MS / 1000)
        await ledger.expire()
        await ledger.hold(request("req_2", funding=funding, max_tokens=5))
        record = (await ledger.settle(settlement(completion=20))).record
        assert (record.charged_nanos, record.balance_nanos) == (10_000, 0)

    async def test_a_hold_renewed_between_being_found_and_billed_is_left_alone(
        self, ledger: Ledger, store: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await ledger.grant(money(100_000))
        await ledger.hold(request())

        async def overdue(_: int) -> list[object]:
            return [(shard_for(ACME), "req_1", ACME)]

        monkeypatch.setattr(ledger, "_overdue", overdue)
        assert await ledger.expire() == 0
        assert (await ledger.account(ACME)).open_holds == 1

    async def test_a_late_settle_of_a_covered_request_takes_its_call(self, ledger: Ledger) -> None:
        await ledger.grant(calls(1, "payment:2"))
        await self._held(ledger)
        await asyncio.sleep(2 * self.SHORT_MS / 1000)
        await ledger.expire()
        record = (await ledger.settle(settlement())).record
        assert [(d.bucket, d.amount) for d in record.draws] == [("payment:2", 1)]
        assert record.charged_nanos == 0

    async def test_a_late_settle_of_postpaid_use_stays_under_its_cap(self, ledger: Ledger) -> None:
        funding = Funding(credit_limit=Nanos(MAX_COST))
        await ledger.hold(request(lease_ms=self.SHORT_MS, funding=funding))
        await asyncio.sleep(2 * self.SHORT_MS / 1000)
        await ledger.expire()
        await ledger.hold(request("req_2", funding=funding, max_tokens=18))
        record = (await ledger.settle(settlement(completion=20))).record
        assert (record.charged_nanos, record.overage_nanos) == (4_000, 4_000)

    async def test_leases_without_holds_are_removed(self, ledger: Ledger, store: Redis) -> None:
        leases = shard_for(ACME).leases
        await self._held(ledger)
        await store.zadd(leases, {f"req_gone_{n}": n for n in range(5)})
        await asyncio.sleep(2 * self.SHORT_MS / 1000)
        assert [await ledger.expire(limit=4) for _ in range(3)] == [0, 1, 0]
        assert await store.zcard(leases) == 0

    async def test_hold_past_its_lease_settles_as_usual_until_expired(self, ledger: Ledger) -> None:
        await self._held(ledger)
        await asyncio.sleep(2 * self.SHORT_MS / 1000)
        assert (await ledger.settle(settlement())).record.record_id == "rec_req_1"
