"""The base model: loaded by transformers from a Hugging Face folder, and checked at start.

Its attention and its linears are replaced. At start it computes two prompts both as transformers does and as the
engine does, and is rejected unless the logits are the same.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deployments.inference.adapters import LinearShape
from deployments.inference.native import attention
from deployments.inference.native.attention import KvCache, KvStep
from deployments.inference.native.lora import LoraPool
from deployments.inference.native.sequence import Span
from deployments.inference.native.settings import EngineSettings, KvSizes
from deployments.inference.request import ModelRejected

if TYPE_CHECKING:
    from deployments.inference.native.tiled import TiledSteps

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of logits in the check at start, as a share of their spread."""
CHECK_TOKENS = 24
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary embeddings that differ with the longest sequence of the batch."""
PACKED_FOR_ROWS = 16
"""Rows of the batch that packed weights are laid out for; batches of any other size run too."""


class Model:
    """One base model with its KV cache and adapter slots.

    Raises:
        ModelRejected: the model cannot be served correctly, or the settings don't fit it.
    """

    def __init__(self, settings: EngineSettings, is_tiled: bool | None = None) -> None:
        """``is_tiled``: run steps on the GPU's kernels, and page the KV cache; None: if the device is a GPU."""
        self.device = torch.device(_device(settings.device))
        dtype = _dtype(settings.dtype, self.device)
        config = read_config(settings.model_path)
        _check_config(config, settings)
        self.vocab_size: int = config.vocab_size
        self.is_asynchronous = self.device.type == "cuda"
        """``forward`` returns before the logits are computed."""
        self.is_tiled = self.is_asynchronous if is_tiled is None else is_tiled
        self.sizes = settings.kv_sizes(self.is_tiled)
        self._model = _load(settings.model_path, dtype).to(self.device)
        self.linears = linear_modules(self._model)
        self.kv = KvCache(self.sizes.blocks + self.is_tiled, self.sizes.block_tokens, self.sizes.context)
        """With one block more on a GPU, where the rows that pad a batch are written."""
        checks = _check_prompts(self.vocab_size, settings)[: self.sizes.blocks // self.sizes.blocks_per_sequence]
        expected = [self._plain_logits(prompt) for prompt in checks]
        attention.register()
        self._model.set_attn_implementation(attention.NAME)
        self.lora = LoraPool(self._model, self.linears, settings.adapter_slots, settings.max_adapter_rank)
        _pack_linears(self._model)
        self._tiled = _tiled_steps(self._model, self.kv, self.sizes, self.lora, settings) if self.is_tiled else None
        self._check_logits(checks, expected, TOLERANCE[dtype])

    @property
    def is_captured(self) -> bool:
        """Decodes are replayed from CUDA graphs."""
        return self._tiled is not None and self._tiled.is_captured

    @torch.inference_mode()
    def forward(self, spans: Seq[Span]) -> Tensor:
        """Compute these spans, which are sorted by adapter slot, the base model's last.

        Returns the logits ``[sampled spans, vocabulary]`` after the last token of each span that is sampled.
        """
        if self._tiled is not None:
            return self._tiled.forward(spans)
        tokens: list[int] = []
        last_rows: list[int] = []
        for span in spans:
            tokens += span.token_ids
            if span.sampled:
                last_rows.append(len(tokens) - 1)
        step = KvStep(self.kv, spans, self.device)
        rows_by_slot: Counter[int] = Counter()
        for span in spans:
            if span.adapter_slot >= 0:
                rows_by_slot[span.adapter_slot] += len(span.token_ids)
        self.lora.step = self.lora.plan(rows_by_slot)
        logits: Tensor = self._model(
            input_ids=torch.tensor([tokens], device=self.device),
            position_ids=step.positions[None],
            use_cache=False,
            logits_to_keep=torch.tensor(last_rows, device=self.device, dtype=torch.long),
            kv_step=step,
        ).logits[0]
        self.lora.step = None
        return logits

    @torch.inference_mode()
    def _plain_logits(self, prompt: Seq[int]) -> Tensor:
        """Logits ``[tokens, vocabulary]``, from the model as transformers runs it."""
        logits: Tensor = self._model(input_ids=torch.tensor([prompt], device=self.device), use_cache=False).logits[0]
        return logits

    def _check_logits(self, prompts: Seq[Seq[int]], expected: Seq[Tensor], tolerance: float) -> None:
        """Compute the prompts in one batch, in chunks and token by token, and compare with the plain model's logits."""
        for start, end in _check_steps(len(prompts[0])):
            spans = [
                Span(slot, -1, start, prompt[start:end], True, self.sizes.blocks_of(slot))
                for slot, prompt in enumerate(prompts)
            ]
            for logits, plain in zip(self.forward(spans), expected, strict=True):
                wanted = plain[end - 1]
                worst = (logits - wanted).abs().max() / (wanted.max() - wanted.min()).clamp(min=1e-6)
                if not worst <= tolerance:
                    raise ModelRejected(
                        f"{type(self._model).__name__} computes other logits in this engine than in transformers: "
                        f"they differ by {worst:.2g} of their spread at position {end - 1}, and may by {tolerance:g}. "
                        "It is not supported"
                    )


class PackedLinear(nn.Module):
    """A float32 linear on a CPU, its weight laid out once as oneDNN reads it fastest; the plain weight is not kept."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self._packed = torch.ops.mkldnn._reorder_linear_weight(plain.weight.detach(), PACKED_FOR_ROWS)
        self._bias = None if plain.bias is None else plain.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return y


def _pack_linears(model: nn.Module) -> None:
    """Replace every linear that oneDNN takes. A head that shares the embedding's weight gets a copy of it."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and module.weight.dtype is torch.float32:
            model.set_submodule(name, PackedLinear(module))


def _tiled_steps(
    model: PreTrainedModel, kv: KvCache, sizes: KvSizes, lora: LoraPool, settings: EngineSettings
) -> "TiledSteps":
    """Import the kernels, which need Triton, and capture CUDA graphs if there is a GPU."""
    try:
        from deployments.inference.native.tiled import TiledSteps
    except ModuleNotFoundError as error:
        raise ModelRejected(
            f"device cuda needs {error.name}: install a CUDA build of torch, which includes it, or pip install triton"
        ) from error
    steps = TiledSteps(model, kv, sizes, lora, settings.adapter_slots, settings.max_running)
    if next(model.parameters()).device.type == "cuda":
        try:
            steps.capture()
        except RuntimeError as error:
            log.warning("%s runs without CUDA graphs, and slower: %s", type(model).__name__, error)
    return steps


def read_config(model_path: str | Path) -> PretrainedConfig:
    """The model's configuration. Raises ModelRejected if the folder has none that transformers supports."""
    try:
        return AutoConfig.from_pretrained(model_path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelRejected(f"{model_path} has no configuration that transformers can read: {error}") from error


def linear_shapes(model_path: str | Path) -> Mapping[str, LinearShape]:
    """The modules of a model that adapters can change, from its configuration alone: no weights are read."""
    config = read_config(model_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return linear_modules(model)


def linear_modules(model: nn.Module) -> dict[str, LinearShape]:
    """Every linear that computes each token once, in the model's order: not the head, and no expert of a router."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    found: dict[str, LinearShape] = {}
    for name, module in model.named_modules():
        if module is head or ".experts." in name:
            continue
        if isinstance(module, nn.Linear):
            found[name] = LinearShape(module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            found[name] = LinearShape(module.nx, module.nf)
    return found


def _device(name: str) -> str:
    if name not in ("auto", "cpu", "cuda"):
        raise ModelRejected(f"device must be auto, cpu or cuda, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelRejected("device is cuda, but torch sees no GPU")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ModelRejected(f"dtype must be auto or one of {', '.join(DTYPES)}, not {name!r}")
    return DTYPES[name]


def _check_config(config: PretrainedConfig, settings: EngineSettings) -> None:
    """Raise ModelRejected for what the engine cannot serve, before any weight is read."""
    if config.is_encoder_decoder:
        raise ModelRejected(f"{config.model_type} is an encoder-decoder model; only decoder models are served")
    context = getattr(config, "max_position_embeddings", None) or settings.max_context_tokens
    if settings.max_context_tokens > context:
        raise ModelRejected(
            f"max_context_tokens is {settings.max_context_tokens}, but the model's context is {context}: lower it"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    original = rope.get("original_max_position_embeddings") or context
    if kind in LENGTH_DEPENDENT_ROPE and settings.max_context_tokens > original:
        raise ModelRejected(
            f"the model's {kind} positions depend on the longest sequence in the batch; "
            f"set max_context_tokens to {original} or less"
        )


def _load(model_path: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_path,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise ModelRejected(f"{model_path} cannot be loaded: {error}") from error
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelRejected(f"{type(model).__name__} does not let its attention be replaced. It is not supported")
    return model.eval()


def _check_prompts(vocabulary: int, settings: EngineSettings) -> list[list[int]]:
    """Two prompts, or one if only one sequence may run, of fixed tokens from the whole vocabulary."""
    length = min(CHECK_TOKENS, settings.max_context_tokens, settings.max_batched_tokens // 2)
    count = min(2, settings.max_running)
    return [[(7919 * (i + 1) * (row + 1)) % vocabulary for i in range(length)] for row in range(count)]


def _check_steps(length: int) -> list[tuple[int, int]]:
    """The ranges of positions to compute: a chunk, a second one that continues it, then single tokens."""
    first, second = max(1, length // 3), max(2, 2 * length // 3)
    singles = [(position, position + 1) for position in range(second, length)]
    return [(0, first), (first, second), *singles[:4]]
