"""Base models: the supported architectures compute what transformers and PEFT compute; others are rejected."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    T5Config,
)

from deployments.inference.adapters import read_adapter
from deployments.inference.native.lora import stage
from deployments.inference.native.model import Model, PackedLinear, linear_shapes
from deployments.inference.native.sequence import Span
from deployments.inference.native.settings import EngineSettings
from deployments.inference.request import ModelRejected
from tests.support.models import VOCABULARY, peft_on_newer_transformers

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def _saved(config: PretrainedConfig, path: Path) -> str:
    torch.manual_seed(2)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return str(path)


SUPPORTED = [
    LlamaConfig(**SIZES, tie_word_embeddings=True),
    Qwen2Config(**SIZES),
    Qwen3Config(**SIZES, head_dim=16),
    MistralConfig(**SIZES, sliding_window=9),
    GemmaConfig(**SIZES, head_dim=16),
    Gemma2Config(**SIZES, head_dim=16, sliding_window=8, attn_logit_softcapping=1.5, query_pre_attn_scalar=16),
    Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
    Phi3Config(**SIZES),
    GraniteConfig(**SIZES),
    Olmo2Config(**SIZES),
    SmolLM3Config(**SIZES),
    GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3),
]


@pytest.mark.parametrize("config", SUPPORTED, ids=lambda config: config.model_type)
def test_supported_architecture_passes_start_check(
    config: PretrainedConfig, settings: EngineSettings, tmp_path: Path
) -> None:
    model = Model(replace(settings, model_path=_saved(config, tmp_path)))
    assert model.linears == linear_shapes(tmp_path)
    assert model.linears


@pytest.mark.parametrize("config", SUPPORTED, ids=lambda config: config.model_type)
def test_adapter_matches_peft_on_supported_architecture(
    config: PretrainedConfig, settings: EngineSettings, tmp_path: Path
) -> None:
    path = _saved(config, tmp_path / "base")
    with peft_on_newer_transformers():
        oracle = get_peft_model(
            AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager"),  # not all others cap scores
            LoraConfig(r=5, lora_alpha=7, target_modules="all-linear", fan_in_fan_out=config.model_type == "gpt2"),
        ).eval()
    for key, weight in oracle.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(weight, std=0.1)
    oracle.save_pretrained(tmp_path / "adapter")
    prompt = (5, 9, 200, 31, 7)
    with torch.inference_mode():
        expected = oracle(input_ids=torch.tensor([prompt])).logits[0, -1]
    model = Model(replace(settings, model_path=path))
    files = read_adapter(tmp_path / "adapter", linears=model.linears, max_rank=16)
    assert files.info.modules.keys() == model.linears.keys()
    model.lora.write(1, stage(files, torch.float32))
    beside = [Span(1, 1, 0, prompt, True), Span(0, -1, 0, prompt, True)]
    adapted, base = model.forward(beside)
    torch.testing.assert_close(adapted, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)
    assert not torch.allclose(base, adapted, atol=1e-2)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            GptOssConfig(**SIZES, head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=64),
            "attention sinks",
        ),
        (
            BloomConfig(vocab_size=VOCABULARY, hidden_size=48, n_layer=2, n_head=4),
            "does not let its attention be replaced",
        ),
        (
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0,
                        "original_max_position_embeddings": 64}),
            "longest sequence in the batch",
        ),
        (LlamaConfig(**{**SIZES, "max_position_embeddings": 64}), "the model's context is 64"),
    ],
    ids=["sinks", "no hook", "dynamic positions", "short context"],
)  # fmt: skip
def test_unsupported_model_is_rejected(
    config: PretrainedConfig, reason: str, settings: EngineSettings, tmp_path: Path
) -> None:
    path = _saved(config, tmp_path)
    with pytest.raises(ModelRejected, match=reason):
        Model(replace(settings, model_path=path))


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3_text"])
def test_sliding_window_holds_over_chunks_and_decodes(kind: str, settings: EngineSettings, tmp_path: Path) -> None:
    """Three prompts of different lengths, far longer than the window, in chunks and then token by token."""
    config = next(config for config in SUPPORTED if config.model_type == kind)
    path = _saved(config, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    prompts = [[(31 * i + 7 * slot) % VOCABULARY for i in range(30 + 11 * slot)] for slot in range(3)]
    with torch.inference_mode():
        wanted = [plain(input_ids=torch.tensor([prompt])).logits[0] for prompt in prompts]
    model = Model(replace(settings, model_path=path))
    done = [0, 0, 0]
    for sizes in ((13, 20, 27), (12, 5, 9), (1, 1, 1), (1, 1, 1), (1, 1, 1)):
        ends = [start + size for start, size in zip(done, sizes, strict=True)]
        spans = [Span(slot, -1, done[slot], prompts[slot][done[slot] : ends[slot]], True) for slot in range(3)]
        done = ends
        got = model.forward(spans)
        expected = torch.stack([logits[end - 1] for logits, end in zip(wanted, done, strict=True)])
        torch.testing.assert_close(got, expected, atol=2e-3 * float(expected.abs().max()), rtol=1e-3)


def test_model_rejected_when_start_check_differs(settings: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a future model hand its attention something that this engine overlooks."""
    from deployments.inference.native import attention

    right = attention._attend_slots
    monkeypatch.setattr(attention, "_attend_slots", lambda *args: right(*args) * 1.05)
    with pytest.raises(ModelRejected, match="computes other logits"):
        Model(settings)


def test_encoder_decoder_is_rejected(settings: EngineSettings, tmp_path: Path) -> None:
    T5Config(vocab_size=VOCABULARY).save_pretrained(tmp_path)
    with pytest.raises(ModelRejected, match="encoder-decoder"):
        Model(replace(settings, model_path=str(tmp_path)))


def test_folder_without_model_is_rejected(settings: EngineSettings, base_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelRejected):
        Model(replace(settings, model_path=str(tmp_path / "nowhere")))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelRejected):
        Model(replace(settings, model_path=str(tmp_path)))
    shutil.copy(base_path / "config.json", tmp_path / "config.json")
    with pytest.raises(ModelRejected):
        Model(replace(settings, model_path=str(tmp_path)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"device": "abacus"},
        {"dtype": "int8"},
        {"max_running": 24},
        {"max_adapter_rank": 12},
        {"adapter_slots": 0},
        {"torch_threads": 0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_rejected(settings: EngineSettings, wrong: dict[str, int]) -> None:
    with pytest.raises(ModelRejected, match=next(iter(wrong))):
        Model(replace(settings, **wrong))


def test_stale_slots_do_not_change_logits(settings: EngineSettings) -> None:
    """Slots are neither emptied nor in order: two decodes that read over a third, dirty slot."""
    model = Model(settings)
    prompts = [tuple(range(10 * i + 4, 10 * i + 10)) for i in range(3)]
    alone = [model.forward([Span(i, -1, 0, prompt, True)])[0] for i, prompt in enumerate(prompts)]
    model.forward([Span(slot, -1, 0, tuple(range(4, 100)), True) for slot in range(6)])
    spans = [Span(slot, -1, 0, prompt[:-1], False) for slot, prompt in zip((4, 0, 2), prompts, strict=True)]
    assert model.forward(spans).shape[0] == 0
    last = [Span(slot, -1, 5, prompt[-1:], True) for slot, prompt in zip((4, 0, 2), prompts, strict=True)]
    torch.testing.assert_close(model.forward(last), torch.stack(alone), atol=1e-4, rtol=1e-4)


def test_bfloat16_logits_are_close_to_float32(settings: EngineSettings, adapter_paths: dict[str, Path]) -> None:
    prompt = (5, 9, 200, 31, 7)
    answers = []
    for dtype in ("float32", "bfloat16"):
        model = Model(replace(settings, dtype=dtype))
        model.lora.write(0, stage(read_adapter(adapter_paths["all8"], linears=model.linears), model.lora.dtype))
        answers.append(model.forward([Span(1, 0, 0, prompt, True), Span(0, -1, 0, prompt, True)]).float())
    full, half = answers
    assert (full - half).abs().max() < 0.1 * (full.max() - full.min())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 16, 100])
def test_packed_linear_matches_plain_linear(rows: int, bias: bool) -> None:
    plain = nn.Linear(48, 80, bias=bias)
    x = torch.randn(1, rows, 48)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(plain)(x), plain(x), atol=1e-5, rtol=1e-5)


def test_only_float32_linears_are_packed(settings: EngineSettings) -> None:
    def kinds(dtype: str) -> set[type[nn.Module]]:
        model = Model(replace(settings, dtype=dtype))
        return {type(linear) for linear in model._model.modules() if isinstance(linear, nn.Linear | PackedLinear)}

    assert kinds("float32") == {PackedLinear}
    assert kinds("bfloat16") == {nn.Linear}


def test_missing_weights_in_a_slot_are_detected(settings: EngineSettings, adapter_paths: dict[str, Path]) -> None:
    model = Model(settings)
    for name in ("all8", "mixed", "mlp3"):
        adapter = stage(read_adapter(adapter_paths[name], linears=model.linears), model.lora.dtype)
        model.lora.write(1, adapter)
        assert model.lora.ineffective(1, adapter) == ""
        last = list(adapter.modules)[-1]
        model.lora._b[last][1].zero_()
        assert model.lora.ineffective(1, adapter) == last


def test_readme_lists_the_supported_architectures(repo: Path) -> None:
    table = (
        (repo / "docs" / "engine.md").read_text().partition("| architecture (`model_type`) |")[2].partition("\n\n")[0]
    )
    served = {name for line in table.splitlines() if "served" in line for name in re.findall(r"`([a-z0-9_]+)`", line)}
    assert served - {"max_context_tokens", "dynamic", "longrope"} == {config.model_type for config in SUPPORTED}


def test_readme_example_runs(
    repo: Path, base_path: Path, adapter_paths: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    section = (repo / "docs" / "engine.md").read_text()
    code = section.partition("```python\n")[2].partition("```")[0]
    code = code.replace('".farebox/models/base"', f'"{base_path}", max_context_tokens=256')
    code = code.replace(".farebox/models/adapters/pirate", str(adapter_paths["all8"]))
    exec(code, {})  # noqa: S102 (our own page)
    assert capsys.readouterr().out.strip()
