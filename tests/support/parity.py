"""Compare the engine's greedy tokens on random mixed requests with PEFT's, computed one at a time.

``python -m tests.support.parity --requests 1000``

There are more adapters than slots, prompts longer than a step, shared prefixes, several fairness keys, and aborts in
between. A difference counts unless PEFT's two best logits are equal within rounding.
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
"""Logits closer than this are a tie in float32."""


@dataclass(frozen=True)
class Case:
    """One request and its output."""

    adapter: str | None
    prompt: tuple[int, ...]
    max_tokens: int
    output: Collector


@dataclass(frozen=True)
class Parity:
    """How many outputs were compared, which differ, how many differ only at a tie, and how many were aborted."""

    compared: int
    different: list[Case]
    ties: int
    aborted: int


def run(engine: Engine, refs: dict[str, AdapterRef], oracle: Oracle, count: int, seed: int = 7) -> Parity:
    """Submit ``count`` random requests at once, wait for all, and compare."""
    rng = random.Random(seed)
    shared = tuple(rng.randrange(4, VOCABULARY) for _ in range(40))
    cases: list[Case] = []
    cancelled: list[Collector] = []
    for i in range(count):
        cases.append(_case(rng, shared, [None, *refs]))
        _submit(engine, refs, f"r{i}", cases[-1], f"tenant {i % 5}")
        if i % 6 == 0:
            gone = _case(rng, shared, [None, *refs])
            cancelled.append(gone.output)
            _submit(engine, refs, f"gone{i}", gone, f"tenant {i % 5}")
            if i % 12:
                time.sleep(rng.random() * 0.01)
            engine.abort(f"gone{i}")
    for case in cases:
        last = case.output.wait(600)
        assert last.finish_reason in (FinishReason.STOP, FinishReason.LENGTH), last
        assert last.prompt_tokens == len(case.prompt)
    different = [
        case for case in cases if case.output.token_ids != oracle.greedy(case.adapter, case.prompt, case.max_tokens)
    ]
    ties = [case for case in different if _is_tie(oracle, case)]
    stopped = sum(one.wait().finish_reason is FinishReason.ABORT for one in cancelled)
    return Parity(len(cases), [case for case in different if case not in ties], len(ties), stopped)


def _case(rng: random.Random, shared: tuple[int, ...], adapters: Sequence[str | None]) -> Case:
    own = tuple(rng.randrange(4, VOCABULARY) for _ in range(rng.randrange(1, 30)))
    prompt = shared[: rng.randrange(10, 40)] + own if rng.random() < 0.4 else own
    return Case(rng.choice(adapters), prompt, rng.randrange(1, 20), Collector())


def _submit(engine: Engine, refs: dict[str, AdapterRef], name: str, case: Case, key: str) -> None:
    sampling = SamplingParams(max_tokens=case.max_tokens, temperature=0.0)
    ref = refs[case.adapter] if case.adapter else None
    sent = request(name, case.prompt, ref, sampling=sampling, fairness_key=key, time_to_live_s=600)
    engine.submit(sent, case.output)


def _is_tie(oracle: Oracle, case: Case) -> bool:
    """True if the two best logits are a tie at the first token that differs."""
    expected, got = oracle.greedy(case.adapter, case.prompt, case.max_tokens), case.output.token_ids
    position = next((i for i, pair in enumerate(zip(expected, got, strict=False)) if pair[0] != pair[1]), None)
    if position is None:
        return False
    best = oracle.logits(case.adapter, (*case.prompt, *expected[:position])).topk(2).values
    return float(best[0] - best[1]) <= TIE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "base", make_tokenizer())
        paths = make_adapters(Path(folder) / "adapters", base)
        refs = {name: local_adapter(path) for name, path in paths.items()}
        settings: EngineSettings = small_settings(base)
        with Engine(settings) as engine:
            found = run(engine, refs, make_oracle(base, paths), options.requests, options.seed)
            stats = engine.stats()
    print(
        f"{found.compared} outputs compared with PEFT's, computed one at a time: {len(found.different)} differ, "
        f"{found.ties} more at a tie; {found.aborted} aborted in between; {len(refs)} adapters over "
        f"{settings.adapter_slots} slots, {stats.adapter_loads} loads, {stats.preemptions} preemptions, "
        f"{stats.cached_tokens} prompt tokens from the cache"
    )
    assert not found.different, found.different[0]


if __name__ == "__main__":
    main()
