"""A GPU's steps, without CUDA graphs, compute what a CPU's do. Without a GPU they run in Triton's interpreter."""

from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deployments.inference.adapters import read_adapter
from deployments.inference.native.lora import stage
from deployments.inference.native.model import Model
from deployments.inference.native.sequence import Span
from deployments.inference.native.settings import EngineSettings, KvSizes

pytest.importorskip("triton", reason="Triton is not installed: pip install triton==3.8.0")

from deployments.inference.native.tiled import TiledSteps

pytestmark = pytest.mark.slow

NAMES = ("all8", "attention4", "mixed")
SIZES = KvSizes(blocks=30, block_tokens=12, context=64)
PROMPTS = [[(7 * i + 3 * row) % 320 for i in range(5 + 4 * row)] for row in range(4)]


@pytest.fixture(scope="module")
def models(base_path: Path, adapter_paths: dict[str, Path]) -> tuple[Model, Model]:
    """On the kernels, and on torch's own products; the same adapters in both."""
    settings = EngineSettings(
        model_path=str(base_path), max_context_tokens=64, max_running=5, max_batched_tokens=64,
        adapter_slots=3, max_adapter_rank=16, device="cpu",
    )  # fmt: skip
    plain, tiled = Model(settings), Model(replace(settings, kv_block_tokens=SIZES.block_tokens), is_tiled=True)
    for slot, name in enumerate(NAMES):
        adapter = stage(read_adapter(adapter_paths[name], linears=plain.linears, max_rank=16), plain.lora.dtype)
        for model in (tiled, plain):
            model.lora.write(slot, adapter)
    return tiled, plain


def spans(slots: Seq[int], length: int | None) -> list[Span]:
    """Whole prompts, or one token after so many."""
    if length is None:
        return [Span(i, slot, 0, PROMPTS[i], True, SIZES.blocks_of(i)) for i, slot in enumerate(slots)]
    return [Span(i, slot, len(PROMPTS[i]) + length, (9 + i,), True, SIZES.blocks_of(i)) for i, slot in enumerate(slots)]


def assert_same(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=2e-3, rtol=1e-3)


def test_kernels_match_plain_steps_for_prompts_decodes_and_chunks(models: tuple[Model, Model]) -> None:
    for slots in ([0, 1, 2, -1], [0, 0, -1, -1], [-1, -1, -1, -1]):
        for step in (
            spans(slots, None),
            spans(slots, 0),
            [*spans(slots, 1)[:3], Span(3, slots[3], 18, (1, 2, 3), True, SIZES.blocks_of(3))],
        ):
            tiled, plain = (model.forward(step) for model in models)
            assert_same(tiled, plain)


def test_padded_batch_is_reused_for_other_adapters(models: tuple[Model, Model]) -> None:
    tiled, plain = models
    steps = TiledSteps(tiled._model, tiled.kv, tiled.sizes, tiled.lora, adapter_slots=3, max_running=5)
    buffers = steps.decode_buffers(5)
    for model in models:
        model.forward(spans([-1] * 4, None))
    for slots in ([1, 1, 1, 1], [0, 1, 2, -1], [2, -1, -1, -1]):
        steps.fill(buffers, steps.filled(spans(slots, 0), 5), queries=1)
        got = steps.compute(buffers, 1, True, 0)
        assert got.shape[0] == 5
        assert_same(got[:4], plain.forward(spans(slots, 0)))


def test_base_model_rows_are_bit_identical_beside_adapters(models: tuple[Model, Model]) -> None:
    tiled, _ = models
    tiled.forward(spans([-1] * 4, None))
    alone = tiled.forward(spans([-1] * 4, 0)).clone()
    mixed = tiled.forward(spans([0, 1, -1, -1], 0))
    assert not torch.allclose(alone[:2], mixed[:2])
    assert torch.equal(alone[2:], mixed[2:])
