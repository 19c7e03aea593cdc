"""``python -m tests.bench.ledger``: time hold and settle, and a bare durable write, on the embedded Valkey.

There are two stores, with 10 and with 100,000 tenants, that sync their log at every write. They take turns.
"""

import argparse
import asyncio
import itertools
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import uvloop
from redis.asyncio import Redis

from billing.catalog.plans import Limits
from billing.ledger.account import Funding, Grant, HoldRequest, Settlement
from billing.ledger.ledger import Ledger
from billing.pricing.prices import Price
from billing.store.connection import connect
from billing.usage import RequestId, Status, TenantId, Unit, Usage
from cluster import valkey
from deployments.gateway.edge import new_request_id
from tests.bench import figures
from tests.bench.figures import Latency, Row
from tests.bench.retries import with_retries
from tests.bench.weights import Weights, weigh

FEW, MANY = 10, 100_000
CLIENTS = 32
GRANT = 1_000_000_000_000
PRICE = Price.model_validate({"input_per_1m": "1.00", "output_per_1m": "2.00"})
ADAPTER = "pirate@54a6a3d4ff45"


@dataclass
class Side:
    """One store and its tenants."""

    redis: Redis
    ledger: Ledger
    tenants: int
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    def next_request(self) -> HoldRequest:
        tenant = name_of(next(self.numbers) * 7919 % self.tenants)
        return HoldRequest(
            request_id=RequestId(new_request_id()),
            tenant=tenant,
            key_id="key_0123456789abcdef",
            model="pirate",
            adapter=ADAPTER,
            adapter_class="default",
            plan="prepaid",
            price=PRICE,
            prompt_tokens=200,
            max_tokens=256,
            funding=Funding(),
            limits=Limits(requests_per_minute=100_000_000),
        )


@dataclass
class Timed:
    """Seconds that each call took, by kind of call, and the totals of one run."""

    write: list[float] = field(default_factory=list)
    hold: list[float] = field(default_factory=list)
    settle: list[float] = field(default_factory=list)
    pairs_s: float = 0.0
    client_cpu_s: float = 0.0
    server_cpu_s: float = 0.0


def name_of(number: int) -> TenantId:
    return TenantId(f"tenant-{number:06d}")


def settlement_of(request: HoldRequest) -> Settlement:
    usage = Usage(prompt_tokens=200, completion_tokens=120, compute_ms=37)
    return Settlement(request.request_id, request.tenant, usage, PRICE.charge(usage), Status.COMPLETE)


async def timed(into: list[float], call: Callable[[], Awaitable[object]]) -> None:
    started = time.perf_counter()
    await with_retries(call)
    into.append(time.perf_counter() - started)


async def write(side: Side, into: Timed) -> None:
    """The base of comparison: one ``SET``, durable when it is answered."""
    number = next(side.numbers)
    await timed(into.write, lambda: side.redis.set(f"bench:{number % 1000}", f"{number:0200d}"))


async def pair(side: Side, into: Timed) -> None:
    request = side.next_request()
    await timed(into.hold, lambda: side.ledger.hold(request))
    await timed(into.settle, lambda: side.ledger.settle(settlement_of(request)))


async def alone(side: Side, calls: int) -> Timed:
    """Run one client that waits for each reply: write, hold, settle, write, hold, settle ..."""
    found = Timed()
    for _ in range(calls):
        await write(side, found)
        await pair(side, found)
    return found


async def together(side: Side, act: Callable[[Side, Timed], Awaitable[None]], calls: int, server: int) -> Timed:
    """Run ``CLIENTS`` clients at once, each of which waits for its own replies."""
    found, left = Timed(), iter(range(calls))

    async def client() -> None:
        for _ in left:
            await act(side, found)

    started, own, theirs = time.perf_counter(), time.process_time(), figures.cpu_s(server)
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    found.pairs_s = time.perf_counter() - started
    found.client_cpu_s = time.process_time() - own
    found.server_cpu_s = figures.cpu_s(server) - theirs
    return found


async def open_accounts(side: Side) -> None:
    for start in range(0, side.tenants, 500):
        group = range(start, min(start + 500, side.tenants))
        await asyncio.gather(*(with_retries(partial(side.ledger.grant, _grant(number))) for number in group))


def _grant(number: int) -> Grant:
    return Grant("payment:pay_V8FWulo5Z2OviRQ1NMIz:pdt_lGCcW0St2oLngAK2qz2U", name_of(number), Unit.NANOS, GRANT)


@dataclass
class Rounds:
    """The measurements of all rounds."""

    alone: list[Timed] = field(default_factory=list)
    writes: list[Timed] = field(default_factory=list)
    pairs: list[Timed] = field(default_factory=list)
    calls: int = 0

    def latency(self, rounds: Sequence[Timed], name: str) -> Latency:
        return figures.middle([figures.latency(getattr(one, name)) for one in rounds])

    @property
    def pairs_per_s(self) -> float:
        return median(self.calls / one.pairs_s for one in self.pairs)

    def cpu_us(self, name: str) -> float:
        seconds: list[float] = [getattr(one, name) for one in self.pairs]
        return median(seconds) / self.calls * 1e6


async def one_round(side: Side, server: int, into: Rounds, calls: int) -> None:
    into.alone.append(await alone(side, calls // 8))
    into.writes.append(await together(side, write, calls, server))
    into.pairs.append(await together(side, pair, calls, server))
    into.calls = calls


async def run(folder: Path, rounds: int, calls: int) -> tuple[Rounds, Rounds, Weights]:
    """Measure the memory of an account in a store of its own, then time the two stores in turns."""
    stores = [valkey.start(folder / name) for name in ("few", "many", "weigh")]
    sides: list[Side] = []
    try:
        for store, tenants in zip(stores, (FEW, MANY, FEW), strict=True):
            redis = await connect(store.url)
            sides.append(Side(redis, Ledger(redis), tenants))
        weights = await weigh(sides[2].redis)
        found = Rounds(), Rounds()
        for side, store in zip(sides[:2], stores, strict=False):
            await open_accounts(side)
            await one_round(side, store.pid, Rounds(), 400)
        for number in range(rounds):
            order = (0, 1) if number % 2 == 0 else (1, 0)
            for which in order:
                await one_round(sides[which], stores[which].pid, found[which], calls)
        return (*found, weights)
    finally:
        for side in sides:
            await side.redis.aclose()
        for store in stores:
            store.stop()


def latencies(found: Rounds) -> str:
    lines = []
    for label, rounds, writes in (
        ("alone", found.alone, found.alone),
        (f"{CLIENTS} clients", found.pairs, found.writes),
    ):
        bare = found.latency(writes, "write")
        for name in ("write", "hold", "settle"):
            took = bare if name == "write" else found.latency(rounds, name)
            shown = [f"{took.p50:.3f}", f"{took.p99:.3f}", f"{took.p50 / bare.p50:.2f}", f"{took.p99 / bare.p99:.2f}"]
            lines.append([label, {"write": "bare `SET`"}.get(name, name), *shown])
    heads = ("", "call", "p50 ms", "p99 ms", "p50 / bare", "p99 / bare")
    return figures.table(heads, lines)


def rows(few: Rounds, many: Rounds, weights: Weights) -> list[Row]:
    found: list[Row] = []
    for label, rounds, writes in (("alone", many.alone, many.alone), (f"{CLIENTS} clients", many.pairs, many.writes)):
        bare = many.latency(writes, "write")
        for name in ("hold", "settle"):
            took = many.latency(rounds, name)
            worst = max(took.p50 / bare.p50, took.p99 / bare.p99)
            found.append(figures.at_most(f"{name}, {label}: the worse of p50 and p99 over a bare write", worst, 2))
    flat = few.pairs_per_s / many.pairs_per_s
    return [
        *found,
        figures.at_least("pairs of hold and settle, one process", many.pairs_per_s, 3000, "/s"),
        figures.at_most(f"cost of a pair with {MANY:,} tenants over {FEW}", flat, 1.1),
        figures.at_most("memory of a tenant: account, bucket, grant and its marker", weights.tenant, 400, "B"),
        figures.at_most("memory of a usage record in the stream", weights.record, 130, "B"),
        Row("memory of a settled id, remembered 2 to 3 hours", f"{figures.plain(weights.marker)} B"),
        Row("memory of a tenant's name, key and their indexes", f"{figures.plain(weights.identity)} B"),
        Row("CPU of a pair: this process", f"{figures.plain(many.cpu_us('client_cpu_s'))} us"),
        Row("CPU of a pair: the store", f"{figures.plain(many.cpu_us('server_cpu_s'))} us"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=4_000, help="pairs in each round at 32 clients")
    parser.add_argument("--dry", action="store_true", help="print only; leave BENCHMARKS.md as it is")
    asked = parser.parse_args()
    where = figures.machine()
    with (
        tempfile.TemporaryDirectory(prefix="fbx-", dir="/var/tmp") as folder,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop,  # the loop that Ray gives a gateway
    ):
        few, many, weights = loop.run(run(Path(folder), asked.rounds, asked.calls))
    text = f"{where}; medians of {asked.rounds} rounds.\n\n{figures.verdicts(rows(few, many, weights))}\n\n"
    text += f"With {MANY:,} tenants:\n\n{latencies(many)}"
    print(text)
    if not asked.dry:
        figures.put("ledger", text)


if __name__ == "__main__":
    main()
