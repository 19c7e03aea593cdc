"""One fairness key floods the engine; how long do three requests of another key take, compared with an idle engine?"""

import threading
import time
from collections.abc import Sequence

from deployments.inference.request import GenerateRequest, OutputDelta
from tests.bench import engine_fixture, figures
from tests.bench.engine_fixture import Fixture
from tests.bench.engine_peers import Ours, Vllm, sampling
from tests.bench.figures import Row

FLOOD, FEW, PROMPT, OUT = 300, 3, 32, 32


class Race:
    """Records when each request ended."""

    def __init__(self, ours: Ours) -> None:
        self._ours = ours
        self._ended: list[tuple[str, float]] = []
        self._done = threading.Semaphore(0)
        self._submitted: list[str] = []

    def submit(self, names: Sequence[str], key: str, adapter: int) -> None:
        for name, prompt in zip(names, engine_fixture.prompts(len(names), PROMPT, seed=adapter), strict=True):
            self._submitted.append(name)
            request = GenerateRequest(name, prompt, sampling(OUT), self._ours.refs[adapter], key, time_to_live_s=600)
            self._ours.engine.submit(request, lambda delta, name=name: self._receive(name, delta))

    def finish(self) -> list[tuple[str, float]]:
        for _ in self._submitted:
            self._done.acquire()
        return self._ended

    def _receive(self, name: str, delta: OutputDelta) -> None:
        if delta.finish_reason is not None:
            self._ended.append((name, time.perf_counter()))
            self._done.release()


def run(ours: Ours, flood: int, key: str) -> tuple[float, list[int], float]:
    """Seconds until the few are done, their ranks among all, and seconds until all are."""
    race = Race(ours)
    race.submit([f"flood{i}" for i in range(flood)], "flood", 0)
    time.sleep(0.5 if flood else 0)
    few = [f"few{i}" for i in range(FEW)]
    started = time.perf_counter()
    race.submit(few, key, 1)
    ended = race.finish()
    ranks = [rank for rank, (name, _) in enumerate(ended, start=1) if name in few]
    last = max(moment for name, moment in ended if name in few)
    return last - started, ranks, max(moment for _, moment in ended) - started


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def table(fixture: Fixture, vllm: Vllm | None, rounds: int) -> str:
    ours = Ours(fixture, max_queued=2 * FLOOD)
    ours.run(engine_fixture.prompts(16, PROMPT), [i % 2 for i in range(16)], 4)
    lines = []
    alone_s = run(ours, 0, "few")[0]
    lines.append(["alone", f"{alone_s:.2f} s", "1 to 3", ""])
    fair_s, ranks, all_s = run(ours, FLOOD, "few")
    lines.append([f"behind {FLOOD} of another key", f"{fair_s:.2f} s", ", ".join(map(str, ranks)), f"{all_s:.1f} s"])
    queued_s, queued, all_s = run(ours, FLOOD, "flood")
    lines.append(
        [f"behind {FLOOD} of their own key", f"{queued_s:.2f} s", ", ".join(map(str, queued)), f"{all_s:.1f} s"]
    )
    ours.engine.stop()
    slowest = ours.engine.settings.max_running + FEW
    rows = [
        figures.at_most("rank of the last of the three", ranks[-1], 2 * slowest, "", f"<= {2 * slowest}, two batches"),
        Row("time over alone; a full batch alone is slower than three rows", f"{fair_s / alone_s:.1f} x"),
        Row("time over waiting in line", f"{fair_s / queued_s:.2f} x"),
    ]
    heads = ["three requests", "until the last is done", "their ranks", "until all are done"]
    return f"{figures.verdicts(rows)}\n\n{figures.table(heads, lines)}"
