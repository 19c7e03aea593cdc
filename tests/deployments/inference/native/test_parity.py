"""The engine's greedy tokens are PEFT's own, whatever else is in the batch."""

from collections.abc import Callable
from dataclasses import replace

from deployments.inference.native.engine import Engine
from deployments.inference.native.settings import EngineSettings
from deployments.inference.request import AdapterRef
from tests.support import parity
from tests.support.engine import request, run
from tests.support.models import Oracle


def test_greedy_tokens_match_peft(engine: Engine, refs: dict[str, AdapterRef], oracle: Oracle) -> None:
    """A bounded round of ``python -m tests.support.parity``."""
    found = parity.run(engine, refs, oracle, 100)
    assert not found.different
    assert found.compared == 100
    assert found.aborted > 0
    stats = engine.stats()
    assert stats.mixed_steps > 0
    assert stats.max_adapters_in_step >= 3
    assert stats.adapter_loads > len(refs), "adapters were evicted and came back"
    assert (stats.running, stats.waiting, stats.kv_blocks_used, stats.queued_tokens) == (0, 0, 0, 0)


def test_base_model_rows_match_with_every_slot_in_use(
    start: Callable[[EngineSettings], Engine], settings: EngineSettings, refs: dict[str, AdapterRef], oracle: Oracle
) -> None:
    """As many different adapters in the batch as there are slots, and rows of the base model between them."""
    engine = start(replace(settings, adapter_slots=len(refs), max_running=2 * len(refs), max_batched_tokens=64))
    prompt = (5, 9, 200, 31)
    run(engine, *(request(name, prompt, ref, max_tokens=2) for name, ref in refs.items()))
    asked = [request(name, prompt, ref) for name, ref in refs.items()]
    mixed = [one for i, ref in enumerate(asked) for one in (ref, request(f"base{i}", prompt))]
    outputs = run(engine, *mixed)
    assert engine.stats().max_adapters_in_step == len(refs) + 1
    for one, output in zip(mixed, outputs, strict=True):
        name = one.adapter.name if one.adapter else None
        assert output.token_ids[:4] == oracle.greedy(name, prompt, 8)[:4]


def test_prefix_cache_hit_gives_the_same_tokens(engine: Engine, refs: dict[str, AdapterRef], oracle: Oracle) -> None:
    start = tuple(range(20, 60))
    for adapter in (None, "all8"):
        ref = refs[adapter] if adapter else None
        run(engine, request("first", start, ref))
        prompts = [start, (*start, 99, 98), (*start[:25], 97), (*start[:3], 96)]
        outputs = [run(engine, request("r", prompt, ref, max_tokens=12))[0] for prompt in prompts]
        assert [output.deltas[-1].cached_tokens for output in outputs] == [39, 40, 25, 0]
        for prompt, output in zip(prompts, outputs, strict=True):
            whole = oracle.greedy(adapter, prompt, 12)
            assert output.token_ids[: len(whole)] == whole


def test_adapters_and_base_model_answer_differently(engine: Engine, refs: dict[str, AdapterRef]) -> None:
    outputs = run(engine, *(request(str(ref), (9, 8, 7, 6), ref, max_tokens=16) for ref in [None, *refs.values()]))
    assert len({output.token_ids for output in outputs}) == len(refs) + 1
