"""A Dodo that fails most calls in every way it can, and one that is away for a day: it ends up told everything once.

Two exporters work at the same time, in this process, with the real SDK; the calendar is moved by hand.
"""

import asyncio
import json
import random
from dataclasses import dataclass, replace
from datetime import datetime

import httpx

from billing.clock import Clock
from billing.dodo import client as dodo_client
from billing.export.outbox import Outbox
from billing.ledger.account import Funding, HoldRequest, Settlement
from billing.money import Nanos
from billing.pricing.prices import Price
from billing.usage import RequestId, Status, TenantId, Usage
from tests.chaos.house import House, house, tenant_with, world
from tests.chaos.proof import close_books
from tests.chaos.table import Row
from tests.support.clock import SteppedClock
from tests.support.world import HOUR, MINUTE, SECOND, World, is_clear

NAME = "dodo-faults"
TENANTS = tuple(TenantId(f"tenant-{number}") for number in range(12))
RATE, LEAST = 0.8, 0.6
KINDS = (
    *("status:500", "status:502", "status:503", "status:429", "status:408", "status:409"),
    *("status:401", "status:403", "status:404", "status:400", "status:413", "status:422"),
    *("status_after:500", "status_after:503", "drop_before", "drop_after", "timeout_after_commit", "garbage"),
    "latency:0.2",
)
POISON = ("status:400", "status:413", "status:422")
ROUNDS, SETTLES = 80, 40
AWAY = ("status:502", "status:503", "drop_before")
DAY_STEPS, STEP, USES = 288, 5 * MINUTE, 10
DRAIN_MINUTES = 5
CALLS_PER_MINUTE = 240
PRICE = Price.model_validate({"input_per_1m": "333.333333", "output_per_1m": "1777.777777"})
SEED = 20_261_128


@dataclass
class Watch:
    """Counts what is asked of Dodo, and events that are too old for it."""

    clock: Clock
    calls: int = 0
    stale: int = 0

    async def see(self, request: httpx.Request) -> None:
        self.calls += 1
        if request.url.path == "/events/ingest":
            events = json.loads(request.content)["events"]
            sent_at = [datetime.fromisoformat(event["timestamp"]).timestamp() * 1_000 for event in events]
            self.stale += sum(moment < self.clock() - HOUR for moment in sent_at)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(event_hooks={"request": [self.see]}, trust_env=False)


def run() -> list[Row]:
    dodo_client.TIMEOUT = httpx.Timeout(0.4)  # a call that is never answered is given up sooner than in production
    rows = []
    for scenario in (_failing, _away_for_a_day):
        clock = SteppedClock()
        with house(clock) as at:
            rows.append(asyncio.run(scenario(at, clock)))
    return rows


async def _failing(at: House, clock: SteppedClock) -> Row:
    watch, chance, receipts = Watch(clock), random.Random(SEED), dict[str, int]()
    async with world(at, clock, watch.client()) as there:
        for name in TENANTS:
            await tenant_with(there, name, 10**9)
        watch.calls = 0
        await there.fault(*KINDS, path="*", rate=RATE)
        exporters = [there.exporter(), there.exporter()]
        for number in range(ROUNDS):
            using = _use(there, number, chance, receipts)
            await asyncio.gather(using, *(exporter.flush_once(force=True) for exporter in exporters))
            clock.move(2 * MINUTE)
        failed = sum(state["hits"] for state in (await there.operator.get("/_sandbox/faults")).json())
        assert failed >= LEAST * watch.calls, f"only {failed} of {watch.calls} calls failed"
        await there.heal()
        await _use(there, ROUNDS, chance, receipts)
        await there.fault(*POISON)
        await exporters[0].flush_once(force=True)
        await there.heal()
        assert await _revive(there), "what Dodo refused for good was parked"
        books = await close_books(there)
    assert watch.stale == 0, f"{watch.stale} events were sent when they were older than an hour"
    return books.row(f"Dodo fails more than {LEAST:.0%} of calls, two actors", failed, receipts)


async def _use(there: World, number: int, chance: random.Random, receipts: dict[str, int]) -> None:
    """Real holds and settles, half of them beyond the tenant's credit."""
    for place in range(SETTLES):
        request = _request(f"req_{number}_{place}", chance)
        await there.ledger.hold(request)
        usage = Usage(request.prompt_tokens, completion_tokens=chance.randint(0, request.max_tokens))
        charge = request.price.charge(usage)
        settlement = Settlement(request.request_id, request.tenant, usage, charge, Status.COMPLETE)
        record = (await there.ledger.settle(settlement)).record
        receipts[record.record_id] = record.charged_nanos


def _request(request_id: str, chance: random.Random) -> HoldRequest:
    return HoldRequest(
        request_id=RequestId(request_id),
        tenant=chance.choice(TENANTS),
        key_id="key",
        model="pirate",
        adapter="pirate",
        adapter_class="default",
        plan="prepaid",
        price=PRICE,
        prompt_tokens=chance.randint(1, 9_000),
        max_tokens=chance.randint(1, 9_000),
        funding=Funding(credit_limit=Nanos(10**15)),
    )


async def _revive(there: World) -> int:
    """What ``farebox dodo revive --all`` does."""
    outbox = Outbox(there.redis)
    return sum([await outbox.revive(replace(letter, reason="")) for letter in await outbox.dead()])


async def _away_for_a_day(at: House, clock: SteppedClock) -> Row:
    watch, chance = Watch(clock), random.Random(SEED)
    async with world(at, clock, watch.client()) as there:
        for name in TENANTS:
            await there.tenant(name)
        await there.fault(*AWAY, rate=1)
        exporters = [there.exporter(CALLS_PER_MINUTE), there.exporter(CALLS_PER_MINUTE)]
        for _ in range(DAY_STEPS):
            for _ in range(USES):
                charged = chance.randint(1, 10**9)
                await there.use(chance.choice(TENANTS), charged, overage=chance.randint(0, charged))
            await asyncio.gather(*(exporter.flush_once() for exporter in exporters))
            clock.move(STEP)
        waiting = len(await Outbox(there.redis).events())
        await there.heal()
        returned = clock()
        while not is_clear(await Outbox(there.redis).backlog()):
            await asyncio.gather(*(exporter.flush_once() for exporter in exporters))
            clock.move(SECOND)
            assert clock() - returned <= DRAIN_MINUTES * MINUTE, "a day's backlog drains in minutes"
        told, dead = await there.exported(), (await Outbox(there.redis).sums()).dead_events
        return _row_of(waiting, there.sums, told, lost=dead + watch.stale)


def _row_of(waiting: int, sums: dict[tuple[str, str], int], told: dict[tuple[str, str], int], lost: int) -> Row:
    """``waiting`` events were sealed while Dodo was away."""
    apart = {(name, key): told[name, key] - sums[name, key] for name, key in told.keys() | sums.keys()}
    requests = [difference for (_, key), difference in apart.items() if key == "requests"]
    drift = sum(abs(difference) for (_, key), difference in apart.items() if key.endswith("_nanos"))
    missing, twice = -sum(min(0, one) for one in requests), sum(max(0, one) for one in requests)
    return Row("Dodo away for 24 h, events that waited", waiting, lost + missing, twice, drift)
