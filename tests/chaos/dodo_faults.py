"""Dodo fails most calls in every way it can, or is down for a day: in the end it has every event once.

Two exporters work at the same time, in this process, with the real SDK; the clock is moved by the scenario.
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
from tests.chaos.proof import close_books
from tests.chaos.rig import Rig, open_rig, open_world, tenant_with
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
DOWN = ("status:502", "status:503", "drop_before")
DAY_STEPS, STEP, USES = 288, 5 * MINUTE, 10
DRAIN_MINUTES = 5
CALLS_PER_MINUTE = 240
PRICE = Price.model_validate({"input_per_1m": "333.333333", "output_per_1m": "1777.777777"})
SEED = 20_261_128


@dataclass
class Watch:
    """Counts the calls to Dodo, and the events in them that are too old for it."""

    clock: Clock
    calls: int = 0
    stale: int = 0

    async def count(self, request: httpx.Request) -> None:
        self.calls += 1
        if request.url.path == "/events/ingest":
            events = json.loads(request.content)["events"]
            sent_at = [datetime.fromisoformat(event["timestamp"]).timestamp() * 1_000 for event in events]
            self.stale += sum(moment < self.clock() - HOUR for moment in sent_at)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(event_hooks={"request": [self.count]}, trust_env=False)


def run() -> list[Row]:
    dodo_client.TIMEOUT = httpx.Timeout(0.4)  # time out sooner than in production
    rows = []
    for scenario in (_failing, _down_for_a_day):
        clock = SteppedClock()
        with open_rig(clock) as rig:
            rows.append(asyncio.run(scenario(rig, clock)))
    return rows


async def _failing(rig: Rig, clock: SteppedClock) -> Row:
    watch, chance, receipts = Watch(clock), random.Random(SEED), dict[str, int]()
    async with open_world(rig, clock, watch.client()) as world:
        for name in TENANTS:
            await tenant_with(world, name, 10**9)
        watch.calls = 0
        await world.fault(*KINDS, path="*", rate=RATE)
        exporters = [world.exporter(), world.exporter()]
        for number in range(ROUNDS):
            using = _use(world, number, chance, receipts)
            await asyncio.gather(using, *(exporter.flush_once(force=True) for exporter in exporters))
            clock.move(2 * MINUTE)
        failed = sum(state["hits"] for state in (await world.operator.get("/_sandbox/faults")).json())
        assert failed >= LEAST * watch.calls, f"only {failed} of {watch.calls} calls failed"
        await world.heal()
        await _use(world, ROUNDS, chance, receipts)
        await world.fault(*POISON)
        await exporters[0].flush_once(force=True)
        await world.heal()
        assert await _revive(world), "what Dodo refused for good was parked"
        books = await close_books(world)
    assert watch.stale == 0, f"{watch.stale} events were sent when they were older than an hour"
    return books.row(f"Dodo fails more than {LEAST:.0%} of calls, two actors", failed, receipts)


async def _use(world: World, number: int, chance: random.Random, receipts: dict[str, int]) -> None:
    """Hold and settle for real, half of it beyond the tenant's credit."""
    for place in range(SETTLES):
        request = _request(f"req_{number}_{place}", chance)
        await world.ledger.hold(request)
        usage = Usage(request.prompt_tokens, completion_tokens=chance.randint(0, request.max_tokens))
        charge = request.price.charge(usage)
        settlement = Settlement(request.request_id, request.tenant, usage, charge, Status.COMPLETE)
        record = (await world.ledger.settle(settlement)).record
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


async def _revive(world: World) -> int:
    """Revive every dead letter, as ``farebox dodo revive --all`` does."""
    outbox = Outbox(world.redis)
    return sum([await outbox.revive(replace(letter, reason="")) for letter in await outbox.dead()])


async def _down_for_a_day(rig: Rig, clock: SteppedClock) -> Row:
    watch, chance = Watch(clock), random.Random(SEED)
    async with open_world(rig, clock, watch.client()) as world:
        for name in TENANTS:
            await world.tenant(name)
        await world.fault(*DOWN, rate=1)
        exporters = [world.exporter(CALLS_PER_MINUTE), world.exporter(CALLS_PER_MINUTE)]
        for _ in range(DAY_STEPS):
            for _ in range(USES):
                charged = chance.randint(1, 10**9)
                await world.use(chance.choice(TENANTS), charged, overage=chance.randint(0, charged))
            await asyncio.gather(*(exporter.flush_once() for exporter in exporters))
            clock.move(STEP)
        waiting = len(await Outbox(world.redis).events())
        await world.heal()
        returned = clock()
        while not is_clear(await Outbox(world.redis).backlog()):
            await asyncio.gather(*(exporter.flush_once() for exporter in exporters))
            clock.move(SECOND)
            assert clock() - returned <= DRAIN_MINUTES * MINUTE, "a day's backlog drains in minutes"
        exported, dead = await world.exported(), (await Outbox(world.redis).sums()).dead_events
        return _row_of(waiting, world.sums, exported, lost=dead + watch.stale)


def _row_of(waiting: int, sums: dict[tuple[str, str], int], exported: dict[tuple[str, str], int], lost: int) -> Row:
    """``waiting`` events were sealed while Dodo was down."""
    differences = {(name, key): exported[name, key] - sums[name, key] for name, key in exported.keys() | sums.keys()}
    requests = [difference for (_, key), difference in differences.items() if key == "requests"]
    difference = sum(abs(difference) for (_, key), difference in differences.items() if key.endswith("_nanos"))
    missing, twice = -sum(min(0, one) for one in requests), sum(max(0, one) for one in requests)
    return Row("Dodo down for 24 h, events that waited", waiting, lost + missing, twice, difference)
