"""An engine on paged KV memory, in Triton's interpreter where there is no GPU, answers as PEFT does one at a time."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from deployments.engine.loop import Engine
from deployments.engine.request import AdapterRef, ModelRefused
from deployments.engine.settings import EngineSettings
from tests.engine import parity
from tests.engine.conftest import request, run
from tests.engine.models import Oracle

pytest.importorskip("triton", reason="Triton is not installed: pip install triton==3.8.0")


@pytest.fixture
def paged(settings: EngineSettings) -> Iterator[Engine]:
    """A third of the memory that its requests could want at most."""
    tight = replace(settings, max_context_tokens=96, kv_block_tokens=4, kv_blocks=24)
    with Engine(tight, is_tiled=True) as engine:
        yield engine


def test_mixed_requests_in_too_few_blocks_get_the_tokens_that_peft_gives(
    paged: Engine, refs: dict[str, AdapterRef], oracle: Oracle
) -> None:
    """Prompts in chunks, shared starts, cancels, several adapters; some are set back and computed again."""
    found = parity.run(paged, refs, oracle, 40)
    assert not found.different
    assert found.cancelled > 0
    stats = paged.stats()
    assert stats.preemptions > 0
    assert (stats.running, stats.waiting, stats.kv_blocks_used, stats.kv_blocks_total) == (0, 0, 0, 24)


def test_a_start_that_is_there_already_is_read_from_its_whole_blocks(
    paged: Engine, refs: dict[str, AdapterRef], oracle: Oracle
) -> None:
    name, prompt = next(iter(refs)), tuple(range(4, 27))
    for cached in (0, 20):
        [answer] = run(paged, request(f"after {cached}", prompt, refs[name]))
        assert answer.pieces[-1].cached_tokens == cached
        assert answer.token_ids == oracle.greedy(name, prompt, 8)


def test_attention_without_block_tables_has_no_blocks(settings: EngineSettings) -> None:
    with pytest.raises(ModelRefused, match="kv_block_tokens and kv_blocks are for a GPU"):
        Engine(replace(settings, kv_blocks=24), is_tiled=False)
