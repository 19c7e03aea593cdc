"""An engine on a paged KV cache gives PEFT's tokens. Without a GPU it runs in Triton's interpreter."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from deployments.inference.native.engine import Engine
from deployments.inference.native.settings import EngineSettings
from deployments.inference.request import AdapterRef, ModelRejected, SamplingParams
from tests.support import parity
from tests.support.engine import request, run
from tests.support.models import Oracle

pytest.importorskip("triton", reason="Triton is not installed: pip install triton==3.8.0")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def paged(settings: EngineSettings) -> Iterator[Engine]:
    """An engine with a third of the blocks that its sequences could need."""
    tight = replace(settings, max_context_tokens=64, kv_block_tokens=4, kv_blocks=16, shared_prefixes=True)
    with Engine(tight, is_tiled=True) as engine:
        yield engine


def test_greedy_tokens_match_peft_when_blocks_run_out(
    paged: Engine, refs: dict[str, AdapterRef], oracle: Oracle
) -> None:
    """Prompts in chunks, shared starts, aborts, two adapters; some are preempted."""
    found = parity.run(paged, {name: refs[name] for name in ("all8", "mixed")}, oracle, 16)
    assert not found.different
    assert found.aborted > 0
    stats = paged.stats()
    assert stats.preemptions > 0
    assert (stats.running, stats.waiting, stats.kv_blocks_used, stats.kv_blocks_total) == (0, 0, 0, 16)


def test_prefix_cache_hit_gives_the_same_tokens(paged: Engine, refs: dict[str, AdapterRef], oracle: Oracle) -> None:
    start = tuple(range(20, 40))
    for name, ref in ((None, None), ("all8", refs["all8"])):
        run(paged, request("first", start, ref, max_tokens=2))
        prompts = [start, (*start, 99, 98), (*start[:15], 97), (*start[:3], 96)]
        outputs = [run(paged, request("r", prompt, ref, max_tokens=6))[0] for prompt in prompts]
        assert [output.deltas[-1].cached_tokens for output in outputs] == [16, 20, 12, 0]
        for prompt, output in zip(prompts, outputs, strict=True):
            whole = oracle.greedy(name, prompt, 6)
            assert output.token_ids[: len(whole)] == whole


def test_choices_share_prompt_blocks_and_write_to_their_own(paged: Engine, oracle: Oracle) -> None:
    prompt = tuple(range(60, 81))
    sampling = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True, n=3)
    (output,) = run(paged, request("three", prompt, sampling=sampling))
    whole = oracle.greedy(None, prompt, 10)
    for index in range(3):
        got = [token for delta in output.deltas for token in delta.token_ids if delta.choices[0].index == index]
        assert tuple(got[: len(whole)]) == whole


def test_paging_rejected_without_kernels(settings: EngineSettings) -> None:
    with pytest.raises(ModelRejected, match="kv_block_tokens and kv_blocks are for a GPU"):
        Engine(replace(settings, kv_block_tokens=16))
