"""An engine on paged KV memory, in Triton's interpreter where there is no GPU, answers as PEFT does one at a time."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from deployments.inference.native.engine import Engine
from deployments.inference.native.settings import EngineSettings
from deployments.inference.request import AdapterRef, ModelRejected, SamplingParams
from tests.deployments.inference.native import parity
from tests.support.engine import request, run
from tests.support.models import Oracle

pytest.importorskip("triton", reason="Triton is not installed: pip install triton==3.8.0")


@pytest.fixture(scope="module")
def paged(settings: EngineSettings) -> Iterator[Engine]:
    """A third of the memory that its requests could want at most."""
    tight = replace(settings, max_context_tokens=64, kv_block_tokens=4, kv_blocks=16, shared_prefixes=True)
    with Engine(tight, is_tiled=True) as engine:
        yield engine


def test_mixed_requests_in_too_few_blocks_get_the_tokens_that_peft_gives(
    paged: Engine, refs: dict[str, AdapterRef], oracle: Oracle
) -> None:
    """Prompts in chunks, shared starts, cancels, two adapters; some are set back and computed again."""
    found = parity.run(paged, {name: refs[name] for name in ("all8", "mixed")}, oracle, 16)
    assert not found.different
    assert found.cancelled > 0
    stats = paged.stats()
    assert stats.preemptions > 0
    assert (stats.running, stats.waiting, stats.kv_blocks_used, stats.kv_blocks_total) == (0, 0, 0, 16)


def test_a_prompt_whose_start_is_cached_gets_the_same_tokens(
    paged: Engine, refs: dict[str, AdapterRef], oracle: Oracle
) -> None:
    start = tuple(range(20, 40))
    for name, ref in ((None, None), ("all8", refs["all8"])):
        run(paged, request("first", start, ref, max_tokens=2))
        prompts = [start, (*start, 99, 98), (*start[:15], 97), (*start[:3], 96)]
        answers = [run(paged, request("r", prompt, ref, max_tokens=6))[0] for prompt in prompts]
        assert [answer.pieces[-1].cached_tokens for answer in answers] == [16, 20, 12, 0]
        for prompt, answer in zip(prompts, answers, strict=True):
            whole = oracle.greedy(name, prompt, 6)
            assert answer.token_ids[: len(whole)] == whole


def test_the_answers_of_one_request_read_its_prompt_and_write_apart(paged: Engine, oracle: Oracle) -> None:
    prompt = tuple(range(60, 81))
    sampling = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True, n=3)
    (answer,) = run(paged, request("three", prompt, sampling=sampling))
    whole = oracle.greedy(None, prompt, 10)
    for index in range(3):
        got = [token for piece in answer.pieces for token in piece.token_ids if piece.choices[0].index == index]
        assert tuple(got[: len(whole)]) == whole


def test_a_cpu_without_the_kernels_refuses_to_page(settings: EngineSettings) -> None:
    with pytest.raises(ModelRejected, match="kv_block_tokens and kv_blocks are for a GPU"):
        Engine(replace(settings, kv_block_tokens=16))
