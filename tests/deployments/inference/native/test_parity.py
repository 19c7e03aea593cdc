"""The engine's greedy tokens are PEFT's own, whatever else runs beside them."""

from collections.abc import Callable
from dataclasses import replace

from deployments.inference.native.engine import Engine
from deployments.inference.native.settings import EngineSettings
from deployments.inference.request import AdapterRef
from tests.deployments.inference.native import parity
from tests.support.engine import request, run
from tests.support.models import Oracle


def test_mixed_requests_get_the_tokens_that_peft_gives_one_at_a_time(
    engine: Engine, refs: dict[str, AdapterRef], oracle: Oracle
) -> None:
    """A bounded round of ``python -m tests.deployments.inference.native.parity``."""
    found = parity.run(engine, refs, oracle, 100)
    assert not found.different
    assert found.compared == 100
    assert found.cancelled > 0
    stats = engine.stats()
    assert stats.mixed_steps > 0
    assert stats.max_adapters_in_step >= 3
    assert stats.adapter_loads > len(refs), "adapters were evicted and came back"
    assert (stats.running, stats.waiting, stats.kv_blocks_used, stats.queued_tokens) == (0, 0, 0, 0)


def test_base_rows_stay_base_with_every_slot_taken(
    start: Callable[[EngineSettings], Engine], settings: EngineSettings, refs: dict[str, AdapterRef], oracle: Oracle
) -> None:
    """As many different adapters in the batch as there are slots, and rows of the base model between them."""
    engine = start(replace(settings, adapter_slots=len(refs), max_running=2 * len(refs), max_batched_tokens=64))
    prompt = (5, 9, 200, 31)
    run(engine, *(request(name, prompt, ref, max_tokens=2) for name, ref in refs.items()))
    asked = [request(name, prompt, ref) for name, ref in refs.items()]
    mixed = [one for i, ref in enumerate(asked) for one in (ref, request(f"base{i}", prompt))]
    answers = run(engine, *mixed)
    assert engine.stats().max_adapters_in_step == len(refs) + 1
    for one, answer in zip(mixed, answers, strict=True):
        name = one.adapter.name if one.adapter else None
        assert answer.token_ids[:4] == oracle.greedy(name, prompt, 8)[:4]


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
