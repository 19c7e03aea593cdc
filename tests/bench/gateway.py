"""``python -m tests.bench.gateway``: what billing costs a request on real Serve, and the LiteLLM proxy beside it.

The same two deployments with the ledger and without it share one cluster and take turns under one client.
"""

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import uvloop
from redis.asyncio import Redis

from billing.store.connection import connect
from tests.bench import figures, litellm
from tests.bench.arms import ARMS, BothArms, both_arms
from tests.bench.figures import Latency, Row
from tests.bench.load import Target, Window, drive

CLIENTS = 32
STREAM_TOKENS = 64
WRITES = 400
MESSAGES = [{"role": "user", "content": "the quick brown fox jumps over the lazy dog"}]
MODES = {"haproxy": "behind HAProxy, throughput mode", "default": "Serve's default mode"}


@dataclass(frozen=True)
class Arm:
    """One thing to be measured, and how its CPU time is read."""

    target: Target
    cpu_s: Callable[[], float]


@dataclass
class Seen:
    """The windows of one arm under one load."""

    windows: list[Window] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    """For each request, by window."""

    @property
    def latency(self) -> Latency:
        return figures.middle([one.latency for one in self.windows])

    @property
    def per_s(self) -> float:
        return median(one.per_s for one in self.windows)

    @property
    def cpu(self) -> float:
        return median(self.cpu_ms)


Load = tuple[str, str]
"""``json`` or ``stream`` with ``alone`` or ``many``, and an arm."""


@dataclass
class Found:
    """The measurements of one mode."""

    seen: dict[Load, Seen] = field(default_factory=lambda: defaultdict(Seen))
    write_p50_ms: list[float] = field(default_factory=list)

    @property
    def write(self) -> float:
        return median(self.write_p50_ms)


def body(is_stream: bool) -> bytes:
    asked: dict[str, object] = {"model": "pirate", "messages": MESSAGES, "max_tokens": 1}
    if is_stream:
        asked |= {"max_tokens": STREAM_TOKENS, "stream": True}
    return json.dumps(asked).encode()


async def window(arm: Arm, clients: int, seconds: float, into: Seen) -> None:
    before = arm.cpu_s()
    found = await drive(arm.target, clients, seconds)
    into.windows.append(found)
    into.cpu_ms.append((arm.cpu_s() - before) * 1000 / len(found.seconds))


async def bare_writes(redis: Redis) -> float:
    """The yardstick: the median of single durable writes, in milliseconds."""
    took = []
    for number in range(WRITES):
        started = time.perf_counter()
        await redis.set(f"bench:{number}", "x" * 200)
        took.append(time.perf_counter() - started)
    return figures.latency(took).p50


async def measure(made: BothArms, peer: litellm.Proxy | None, rounds: int, seconds: float) -> Found:
    def of(arm: str, is_stream: bool) -> Arm:
        target = Target(made.url(arm), made.cluster.key, body(is_stream), is_stream)
        return Arm(target, lambda: made.cpu_s(arm))

    plain = {arm: of(arm, False) for arm in ARMS}
    if peer:
        plain["litellm"] = Arm(Target(peer.url, litellm.KEY, body(False)), peer.cpu_s)
    streams = {arm: of(arm, True) for arm in ARMS}
    found = Found()
    redis = await connect(made.store.url)
    try:
        for one in (*plain.values(), *streams.values()):
            await drive(one.target, CLIENTS, 1.0)
        for number in range(rounds):
            order = list(plain) if number % 2 == 0 else list(reversed(plain))
            found.write_p50_ms.append(await bare_writes(redis))
            for clients, load in ((1, "json alone"), (CLIENTS, "json many")):
                for arm in order:
                    await window(plain[arm], clients, seconds, found.seen[load, arm])
            for arm in (one for one in order if one in streams):
                await window(streams[arm], CLIENTS, seconds, found.seen["stream many", arm])
    finally:
        await redis.aclose()
    return found


def rows(found: Found) -> list[Row]:
    def seen(load: str, arm: str) -> Seen:
        return found.seen[load, arm]

    billed, unbilled = seen("json many", "billed"), seen("json many", "unbilled")
    added = (billed.cpu / unbilled.cpu - 1) * 100
    added_ms = seen("json alone", "billed").latency.p50 - seen("json alone", "unbilled").latency.p50
    room = 2 * found.write + 0.5
    shown = [
        figures.at_most(f"CPU that billing adds to a request, {CLIENTS} clients", added, 25, "%"),
        figures.at_most(
            "p50 that billing adds, one client", added_ms, room, "ms", f"<= {room:.2f} ms (two bare writes + 0.5 ms)"
        ),
    ]
    if (load := ("json many", "litellm")) in found.seen:
        shown.append(figures.at_least("requests/s over LiteLLM's", billed.per_s / found.seen[load].per_s, 5))
    return shown


def windows(found: Found) -> str:
    names = {"json alone": "JSON, 1 client", "json many": f"JSON, {CLIENTS} clients"}
    names["stream many"] = f"SSE of {STREAM_TOKENS} tokens, {CLIENTS} clients"
    arms = {"billed": "billed", "unbilled": "no billing", "litellm": f"LiteLLM {litellm.VERSION}"}
    lines = [
        [names[load], arms[arm], *map(figures.plain, (s.per_s, s.latency.p50, s.latency.p99, s.cpu))]
        for (load, arm), s in sorted(found.seen.items())
    ]
    return figures.table(("load", "arm", "requests/s", "p50 ms", "p99 ms", "CPU-ms a request"), lines)


def run(mode: str, folder: Path, rounds: int, seconds: float) -> str:
    with ExitStack() as open_:
        peer = open_.enter_context(litellm.proxy(folder / "litellm")) if mode == "haproxy" else None
        made = open_.enter_context(both_arms(folder / "s", haproxy=mode == "haproxy"))
        loop = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        found = open_.enter_context(loop).run(measure(made, peer, rounds, seconds))
    text = f"### {MODES[mode][0].upper()}{MODES[mode][1:]}\n\n"
    text += f"A bare durable write took {found.write:.3f} ms (p50, one client).\n\n"
    return text + f"{figures.verdicts(rows(found))}\n\n{windows(found)}\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=[*MODES, "both"], default="both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a window")
    parser.add_argument("--dry", action="store_true", help="print only; leave BENCHMARKS.md as it is")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended early"))  # what was started is ended too
    text = f"{figures.machine()}; medians of {asked.rounds} windows of {asked.seconds:g} s.\n\n"
    litellm.install()
    for mode in MODES if asked.mode == "both" else (asked.mode,):
        with tempfile.TemporaryDirectory(prefix="fbx-", dir="/var/tmp", ignore_cleanup_errors=True) as folder:
            found = run(mode, Path(folder), asked.rounds, asked.seconds)
        print(found, flush=True)
        text += found
    if not asked.dry and asked.mode == "both":
        figures.put("gateway", text)


if __name__ == "__main__":
    main()
