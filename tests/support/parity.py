"""Random mixed requests beside PEFT, one at a time.

``python -m tests.support.parity --requests 1000``

More adapters than slots, prompts longer than a step, shared starts, several tenants, cancels in between. A
difference counts unless the oracle's two best logits lie closer than rounding can tell apart.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from deployments.inference.adapters import local_adapter
from deployments.inference.native.engine import Engine
from deployments.inference.native.settings import EngineSettings
from deployments.inference.request import AdapterRef, FinishReason, SamplingParams
from tests.support.engine import Collector, request
from tests.support.models import (
    VOCABULARY,
    Oracle,
    make_adapters,
    make_base,
    make_oracle,
    make_tokenizer,
    small_settings,
)

TIE = 1e-4
"""Logits closer than this are as good as equal in float32."""


@dataclass(frozen=True)
class Job:
    """One request, and what came of it."""

    adapter: str | None
    prompt: tuple[int, ...]
    max_tokens: int
    answer: Collector


@dataclass(frozen=True)
class Parity:
    """How many answers were compared, which differ, and how many differ at a tie."""

    compared: int
    different: list[Job]
    ties: int
    cancelled: int


def run(engine: Engine, refs: dict[str, AdapterRef], oracle: Oracle, count: int, seed: int = 7) -> Parity:
    """Submit all as fast as the engine's queue takes them, wait, and compare."""
    rng = random.Random(seed)
    shared = tuple(rng.randrange(4, VOCABULARY) for _ in range(40))
    jobs: list[Job] = []
    cancelled: list[Collector] = []
    for i in range(count):
        jobs.append(_job(rng, shared, [None, *refs]))
        _submit(engine, refs, f"r{i}", jobs[-1], f"tenant {i % 5}")
        if i % 6 == 0:
            gone = _job(rng, shared, [None, *refs])
            cancelled.append(gone.answer)
            _submit(engine, refs, f"gone{i}", gone, f"tenant {i % 5}")
            if i % 12:
                time.sleep(rng.random() * 0.01)
            engine.abort(f"gone{i}")
    for job in jobs:
        last = job.answer.wait(600)
        assert last.finish_reason in (FinishReason.STOP, FinishReason.LENGTH), last
        assert last.prompt_tokens == len(job.prompt)
    different = [job for job in jobs if job.answer.token_ids != oracle.greedy(job.adapter, job.prompt, job.max_tokens)]
    ties = [job for job in different if _is_tie(oracle, job)]
    stopped = sum(one.wait().finish_reason is FinishReason.ABORT for one in cancelled)
    return Parity(len(jobs), [job for job in different if job not in ties], len(ties), stopped)


def _job(rng: random.Random, shared: tuple[int, ...], adapters: Sequence[str | None]) -> Job:
    own = tuple(rng.randrange(4, VOCABULARY) for _ in range(rng.randrange(1, 30)))
    prompt = shared[: rng.randrange(10, 40)] + own if rng.random() < 0.4 else own
    return Job(rng.choice(adapters), prompt, rng.randrange(1, 20), Collector())


def _submit(engine: Engine, refs: dict[str, AdapterRef], name: str, job: Job, key: str) -> None:
    sampling = SamplingParams(max_tokens=job.max_tokens, temperature=0.0)
    ref = refs[job.adapter] if job.adapter else None
    asked = request(name, job.prompt, ref, sampling=sampling, fairness_key=key, time_to_live_s=600)
    engine.submit(asked, job.answer)


def _is_tie(oracle: Oracle, job: Job) -> bool:
    """At the first token that differs, the oracle could as well have said what the engine said."""
    expected, got = oracle.greedy(job.adapter, job.prompt, job.max_tokens), job.answer.token_ids
    place = next((i for i, pair in enumerate(zip(expected, got, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        return False
    best = oracle.logits(job.adapter, (*job.prompt, *expected[:place])).topk(2).values
    return float(best[0] - best[1]) <= TIE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=7)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "base", make_tokenizer())
        paths = make_adapters(Path(folder) / "adapters", base)
        refs = {name: local_adapter(path) for name, path in paths.items()}
        settings: EngineSettings = small_settings(base)
        with Engine(settings) as engine:
            found = run(engine, refs, make_oracle(base, paths), asked.requests, asked.seed)
            stats = engine.stats()
    print(
        f"{found.compared} answers compared with PEFT's one at a time: {len(found.different)} differ, "
        f"{found.ties} more at a tie; {found.cancelled} cancelled in between; {len(refs)} adapters over "
        f"{settings.adapter_slots} slots, {stats.adapter_loads} loads, {stats.preemptions} preemptions, "
        f"{stats.cached_tokens} prompt tokens from the cache"
    )
    assert not found.different, found.different[0]


if __name__ == "__main__":
    main()
