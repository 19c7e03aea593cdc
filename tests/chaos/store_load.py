"""Clients that hold and settle without pause, remember what was acknowledged to them, and audit the books.

A client stops at the first call that raises StoreUnavailable; ``finish`` sends that call again, with the same id.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count, islice

from redis.asyncio import Redis

from billing.ledger.account import HoldRequest, Receipt, Settlement
from billing.ledger.codec import snapshot_of
from billing.ledger.errors import UnknownHold
from billing.ledger.ledger import Ledger
from billing.money import Nanos
from billing.store.errors import StoreUnavailable
from billing.store.keys import shard_for
from billing.usage import RequestId, TenantId, UsageRecord
from tests.chaos.table import Row
from tests.support.samples import money, request, settlement
from tests.support.waiting import until

CLIENTS = 24
TENANTS = 4
CREDIT = 10**12
STEP_TOKENS = 4
"""So few that most holds are extended once."""
PATIENCE_S = 20.0


@dataclass
class Fault:
    """What one audit found wrong."""

    lost: int = 0
    doubled: int = 0
    difference_nanos: int = 0

    def __add__(self, other: "Fault") -> "Fault":
        difference = self.difference_nanos + other.difference_nanos
        return Fault(self.lost + other.lost, self.doubled + other.doubled, difference)

    def row(self, name: str, tries: int) -> Row:
        return Row(name, tries, self.lost, self.doubled, self.difference_nanos)


@dataclass
class Load:
    """One round of load on tenants of its own, so that each round can be audited by itself."""

    name: str
    chance: random.Random
    fits: Callable[[TenantId], bool] = lambda _: True
    """Which tenants to use: in a cluster, those of one node."""
    acked: dict[RequestId, Nanos] = field(default_factory=dict)
    """The charge on each receipt."""
    expected: dict[RequestId, Nanos] = field(default_factory=dict)
    """The charge of each settle that was sent, acknowledged or not."""
    unfinished: list[HoldRequest | Settlement] = field(default_factory=list)
    is_over: bool = False
    _number: int = 0

    @cached_property
    def tenants(self) -> list[TenantId]:
        names = (TenantId(f"{self.name}_{number}") for number in count())
        return list(islice(filter(self.fits, names), TENANTS))

    async def open(self, ledger: Ledger) -> None:
        for tenant in self.tenants:
            await ledger.grant(replace(money(CREDIT, f"payment:{tenant}"), tenant=tenant))

    async def run(self, ledger: Ledger) -> None:
        """Hold and settle until every client was refused by an unavailable store, or ``is_over``."""
        await asyncio.gather(*(self._use(ledger) for _ in range(CLIENTS)))

    async def _use(self, ledger: Ledger) -> None:
        while not self.is_over:
            step: HoldRequest | Settlement = self.next_request()
            try:
                assert isinstance(step, HoldRequest)
                step = await self._hold(ledger, step)
                self._keep(await ledger.settle(step))
            except StoreUnavailable:
                self.unfinished.append(step)
                return

    async def under_way(self) -> None:
        """Wait until there are as many acknowledged settles as clients."""
        await until(lambda: len(self.acked) >= CLIENTS, PATIENCE_S)

    async def finish(self, ledger: Ledger) -> None:
        """Send again what each client sent last, as a gateway does, until it is acknowledged."""
        await asyncio.gather(*(self._finish(ledger, step) for step in self.unfinished))
        self.unfinished = []

    async def _finish(self, ledger: Ledger, step: HoldRequest | Settlement) -> None:
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while True:
            try:
                if isinstance(step, HoldRequest):
                    step = await self._hold(ledger, step)
                return self._keep(await ledger.settle(step))
            except StoreUnavailable:
                assert asyncio.get_running_loop().time() < deadline, "the store did not come back"
                await asyncio.sleep(0.05)

    async def _hold(self, ledger: Ledger, asked: HoldRequest) -> Settlement:
        hold = await ledger.hold(asked)
        ended = replace(settlement(asked.request_id, self.chance.randint(0, 20)), tenant=asked.tenant)
        held = hold.held_nanos
        if ended.list_nanos > held:
            try:
                held = await ledger.extend(asked, ended.list_nanos, ended.list_nanos)
            except UnknownHold:  # it was lost in a failover: the answer ends with what it held
                ended = replace(settlement(asked.request_id, STEP_TOKENS), tenant=asked.tenant)
        assert ended.list_nanos <= held, "a settle above its hold"
        self.expected[asked.request_id] = ended.list_nanos
        return replace(ended, snapshot=snapshot_of(hold, held))

    def _keep(self, receipt: Receipt) -> None:
        self.acked[receipt.record.request_id] = receipt.record.charged_nanos

    def next_request(self) -> HoldRequest:
        self._number += 1
        tenant = self.tenants[self._number % len(self.tenants)]
        name = f"req_{self.name}_{self._number}"
        return request(name, tenant=tenant, lease_ms=600_000, step_tokens=STEP_TOKENS)

    async def void(self, ledger: Ledger, refused: Iterable[HoldRequest]) -> None:
        """Void the holds of requests that were refused: the store may have written them all the same."""
        for asked in refused:
            with suppress(UnknownHold):
                await ledger.void(asked.request_id, asked.tenant)

    async def missing(self, redis: Redis) -> int:
        """How many acknowledged settles are not in the books now."""
        return len(self.acked.keys() - {record.request_id for record in await self._records(redis)})

    async def audit(self, redis: Redis, ledger: Ledger) -> Fault:
        """Compare receipts, records, balances and holds, to the nano. Every client has finished."""
        assert not self.unfinished, "call finish first"
        records = await self._records(redis)
        counts = Counter(record.request_id for record in records)
        booked = {record.request_id: record.charged_nanos for record in records}
        wrong = sum(abs(booked.get(i, 0) - charge) for i, charge in self.acked.items())
        wrong += sum(abs(booked[i] - self.expected.get(i, Nanos(0))) for i in booked)
        for tenant in self.tenants:
            account = await ledger.account(tenant)
            spent = sum(r.charged_nanos for r in records if r.tenant == tenant)
            wrong += abs(CREDIT - spent - account.balance_nanos) + account.held_nanos
            assert account.open_holds == 0, f"{account.open_holds} holds of {tenant} stay open"
        doubled = sum(times - 1 for times in counts.values())
        return Fault(len(self.acked.keys() - booked.keys()), doubled, wrong)

    async def _records(self, redis: Redis) -> list[UsageRecord]:
        found = []
        for shard in {shard_for(tenant) for tenant in self.tenants}:
            entries = await redis.xrange(shard.stream)
            found += [UsageRecord.from_json(e["p"]) for _, e in entries if e["k"] == "usage" and e["t"] in self.tenants]
        return found


async def until_served(ledger: Ledger, tenant: TenantId, patience_s: float = PATIENCE_S) -> float:
    """Wait until the store answers again; returns how many seconds that took."""
    started = asyncio.get_running_loop().time()
    while True:
        try:
            await ledger.account(tenant)
        except StoreUnavailable:
            waited = asyncio.get_running_loop().time() - started
            assert waited < patience_s, f"the store did not come back within {patience_s:g} s"
            await asyncio.sleep(0.02)
        else:
            return asyncio.get_running_loop().time() - started
