"""The engine's greedy tokens are PEFT's own, whatever else runs beside them."""

import random

from deployments.engine.loop import Engine
from deployments.engine.request import AdapterRef, FinishReason, SamplingParams
from tests.engine.conftest import VOCABULARY, Collector, Oracle, request, run


def _sampling(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0)


def test_mixed_requests_get_the_tokens_that_peft_gives_one_at_a_time(
    engine: Engine, refs: dict[str, AdapterRef], oracle: Oracle
) -> None:
    """More adapters than slots, prompts longer than a step, cancels in between, and prompts that share a start."""
    rng = random.Random(7)
    shared = tuple(rng.randrange(4, VOCABULARY) for _ in range(40))
    jobs: list[tuple[str | None, tuple[int, ...], int, Collector]] = []
    for i in range(60):
        adapter = rng.choice([None, *refs])
        own = tuple(rng.randrange(4, VOCABULARY) for _ in range(rng.randrange(1, 30)))
        prompt = shared[: rng.randrange(10, 40)] + own if rng.random() < 0.4 else own
        max_tokens = rng.randrange(1, 20)
        jobs.append((adapter, prompt, max_tokens, Collector()))
        ref = refs[adapter] if adapter else None
        key = f"tenant {i % 5}"
        engine.submit(request(f"r{i}", prompt, ref, sampling=_sampling(max_tokens), fairness_key=key), jobs[-1][3])
        if i % 6 == 0:
            engine.submit(request(f"gone{i}", prompt, ref, fairness_key=key, max_tokens=80), Collector())
            engine.abort(f"gone{i}")
    for _, prompt, _, collector in jobs:
        assert collector.wait().finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        assert collector.pieces[-1].prompt_tokens == len(prompt)
    for adapter, prompt, max_tokens, collector in jobs:
        assert collector.token_ids == oracle.greedy(adapter, prompt, max_tokens), (adapter, prompt)
    stats = engine.stats()
    assert stats.mixed_steps > 0
    assert stats.max_adapters_in_step >= 3
    assert stats.adapter_loads > len(refs), "adapters were evicted and came back"
    assert (stats.running, stats.waiting, stats.kv_blocks_used, stats.queued_tokens) == (0, 0, 0, 0)


def test_a_prompt_whose_start_is_cached_gets_the_same_tokens(
    engine: Engine, refs: dict[str, AdapterRef], oracle: Oracle
) -> None:
    start = tuple(range(20, 60))
    for adapter in (None, "all8"):
        ref = refs[adapter] if adapter else None
        run(engine, request("first", start, ref))
        prompts = [start, (*start, 99, 98), (*start[:25], 97), (*start[:3], 96)]
        answers = [run(engine, request("r", prompt, ref, max_tokens=12))[0] for prompt in prompts]
        assert [answer.pieces[-1].cached_tokens for answer in answers] == [39, 40, 25, 0]
        for prompt, answer in zip(prompts, answers, strict=True):
            whole = oracle.greedy(adapter, prompt, 12)
            assert answer.token_ids[: len(whole)] == whole


def test_adapters_answer_differently_from_each_other_and_the_base(engine: Engine, refs: dict[str, AdapterRef]) -> None:
    answers = run(engine, *(request(str(ref), (9, 8, 7, 6), ref, max_tokens=16) for ref in [None, *refs.values()]))
    assert len({answer.token_ids for answer in answers}) == len(refs) + 1
