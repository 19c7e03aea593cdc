"""``python -m tests.bench.engine --gpu``: a GPU's checklist, then a decode step's time beside what bandwidth allows.

The model is random, as wide as an 8-billion-parameter Llama and a quarter as deep. The bandwidth is measured, not
looked up. Where there is no GPU it says so and measures nothing.
"""

import importlib.util
import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from deployments.inference.native.lora import HostAdapter, HostFactors
from deployments.inference.native.model import Model
from deployments.inference.native.sequence import Span
from deployments.inference.native.settings import EngineSettings
from tests.bench import engine_fixture, figures
from tests.bench.figures import Row

BATCHES, ADAPTERS = (1, 2, 4, 8, 16, 32, 64, 128), (0, 1, 16, 64)
CONTEXT, RANK, ROUNDS = 1024, 16, 20
TOLERANCE = 5e-2
"""Largest difference of logits from the plain model's, as a share of their spread: both round to bfloat16."""


def skipped() -> str:
    """Why nothing can be measured; empty if it can."""
    return "" if torch.cuda.is_available() else "skipped: torch sees no GPU"


def table() -> str:
    """All results, as text for BENCHMARKS.md."""
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}"
    rows = list(checklist())
    model = Model(_settings(_base()))
    rows += [_same_as_plain(model), Row("CUDA graphs", "captured" if model.is_captured else "**none**")]
    bandwidth = _bandwidth()
    rows.append(Row("bandwidth of a copy in memory", f"{bandwidth / 1e12:.2f} TB/s"))
    return f"{where}.\n\n{figures.verdicts(rows)}\n\n{_times(model, bandwidth)}"


def checklist() -> Iterator[Row]:
    """Checks that must pass before the times mean anything."""
    yield Row("torch", torch.__version__)
    yield Row("`varlen_attn`", _signature("torch.nn.attention.varlen", "varlen_attn"))
    yield Row("`functional.grouped_mm`", "there" if hasattr(functional, "grouped_mm") else "missing")
    yield Row("flash_attn", "there" if importlib.util.find_spec("flash_attn") else "missing")
    yield _judged("grouped products: empty groups, the last end at the last row", _grouped_error)
    yield _judged("grouped products in a graph, replayed with other ends", _grouped_graph_error)
    for dtype in (torch.float32, torch.bfloat16):
        yield _judged(f"compiled kernels, {dtype}: more adapters at replay than at capture", _kernel_error(dtype))


def _signature(module: str, name: str) -> str:
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return "missing"
    return f"`{inspect.signature(found)}`".replace("|", "or")


def _judged(what: str, error: Callable[[], float]) -> Row:
    try:
        worst = error()
    except RuntimeError as error:
        return Row(what, str(error).splitlines()[0], "runs", False)
    return Row(what, f"{worst:.2g} of the largest", "<= 0.02", worst <= 0.02)


def _relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())


COUNTS = ((3, 0, 5, 8), (0, 0, 16, 0), (1, 13, 1, 1))


def _grouped() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x, factors = torch.randn(16, 256), torch.randn(4, 256, 64)
    return x.to("cuda", torch.bfloat16), factors.to("cuda", torch.bfloat16)


def _ends(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)


def _by_hand(x: Tensor, factors: Tensor, counts: tuple[int, ...]) -> Tensor:
    parts = zip(x.double().split(list(counts)), factors.double(), strict=True)
    return torch.cat([part @ factor for part, factor in parts])


def _grouped_error() -> float:
    x, factors = _grouped()
    found = (
        _relative(functional.grouped_mm(x, factors, offs=_ends(counts)), _by_hand(x, factors, counts))
        for counts in COUNTS
    )
    return max(found)


def _grouped_graph_error() -> float:
    x, factors = _grouped()
    ends = _ends(COUNTS[0])
    replay, got = _captured(lambda: functional.grouped_mm(x, factors, offs=ends))
    worst = 0.0
    for counts in COUNTS:
        ends.copy_(_ends(counts))
        replay()
        worst = max(worst, _relative(got, _by_hand(x, factors, counts)))
    return worst


def _captured(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    compute()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = compute()
    return graph.replay, got


def _kernel_error(dtype: torch.dtype) -> Callable[[], float]:
    """Shrink and expand, captured with one adapter, replayed with up to eight of mixed ranks."""

    def error() -> float:
        from deployments.inference.native.kernels_lora import expand, shrink
        from deployments.inference.native.tiles import columns, lora_tiles, lora_tiles_max

        torch.manual_seed(0)
        slots, rows, width = 8, 24, 512
        a = torch.randn(slots, 32, 1, width).to("cuda", dtype)
        b = torch.randn(slots, 32, width).to("cuda", dtype)
        x = torch.randn(rows, width).to("cuda", dtype)
        ranks = torch.tensor([8, 16, 32, 1, 0, 24, 8, 3], device="cuda")[:, None]
        most = lora_tiles_max(rows, slots)

        def tiles_of(rows_by_slot: dict[int, int]) -> Tensor:
            return torch.tensor(list(columns(lora_tiles(rows_by_slot), most, 3)), device="cuda").view(3, most)

        tiles = tiles_of({2: rows})

        def compute() -> Tensor:
            y = torch.zeros_like(x)
            expand(y, shrink(x, a, ranks, tiles)[:, 0], b, ranks[:, 0], tiles)
            return y

        replay, got = _captured(compute)
        worst = 0.0
        for rows_by_slot in ({2: rows}, dict.fromkeys(range(slots), 3), {1: 5, 7: 17}):
            tiles.copy_(tiles_of(rows_by_slot))
            replay()
            owners = [slot for slot, count in rows_by_slot.items() for _ in range(count)]
            wanted = torch.zeros_like(x, dtype=torch.float64)
            for row, slot in enumerate(owners):
                rank = int(ranks[slot])
                wanted[row] = x[row].double() @ a[slot, :rank, 0].double().T @ b[slot, :rank].double()
            worst = max(worst, _relative(got, wanted))
        return worst

    return error


def _base() -> Path:
    """The model's folder, made when it is missing."""
    path = engine_fixture.SCRATCH / "gpu-base"
    if not (path / "config.json").is_file():
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=8,
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=2048, dtype="bfloat16",
        )  # fmt: skip
        with torch.device("cuda"):
            made = LlamaForCausalLM(config).to(torch.bfloat16)
        made.save_pretrained(path)
    return path


def _settings(base: Path) -> EngineSettings:
    return EngineSettings(
        model_path=str(base), max_context_tokens=CONTEXT + 64, max_running=max(BATCHES), max_batched_tokens=2048,
        adapter_slots=max(ADAPTERS), max_adapter_rank=RANK, device="cuda", dtype="bfloat16",
    )  # fmt: skip


def _adapter(model: Model, seed: int) -> HostAdapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {
        name: HostFactors(
            a=(torch.randn(RANK, shape.in_features, generator=generator) * 0.02).to(torch.bfloat16),
            b=(torch.randn(RANK, shape.out_features, generator=generator) * 0.02).to(torch.bfloat16),
        )
        for name, shape in model.linears.items()
    }
    return HostAdapter(modules, sum(factors.a.nbytes + factors.b.nbytes for factors in modules.values()))


def _same_as_plain(model: Model) -> Row:
    """Prompt and decodes, base and two adapters in one batch, against transformers with the adapter merged in."""
    adapters = [_adapter(model, seed) for seed in range(max(ADAPTERS))]
    for slot, adapter in enumerate(adapters):
        model.lora.write(slot, adapter)
    prompt = [(7919 * i) % 32_000 for i in range(40)]
    owners, own = (0, 1, -1), model.sizes.blocks_of
    got = [model.forward([Span(i, slot, 0, prompt[:36], True, own(i)) for i, slot in enumerate(owners)]).clone()]
    got += [
        model.forward([Span(i, slot, at, prompt[at : at + 1], True, own(i)) for i, slot in enumerate(owners)]).clone()
        for at in range(36, 40)
    ]
    worst = 0.0
    for i, slot in enumerate(owners):
        wanted = _plain(model, adapters[slot] if slot >= 0 else None, prompt)[35:]
        for logits, plain in zip((step[i] for step in got), wanted, strict=True):
            worst = max(worst, float((logits.float() - plain).abs().max() / (plain.max() - plain.min())))
    what = "logits beside the plain model's, base and adapters in one batch"
    return Row(what, f"{worst:.2g} of their spread", f"<= {TOLERANCE}", worst <= TOLERANCE)


@torch.inference_mode()
def _plain(model: Model, adapter: HostAdapter | None, prompt: list[int]) -> Tensor:
    plain = AutoModelForCausalLM.from_pretrained(_base(), dtype=torch.bfloat16).to("cuda").eval()
    for name, factors in (adapter.modules if adapter else {}).items():
        delta = factors.b.to("cuda").float().T @ factors.a.to("cuda").float()
        weight = plain.get_submodule(name).weight
        weight.copy_(weight.float() + delta)
    logits: Tensor = plain(input_ids=torch.tensor([prompt], device="cuda"), use_cache=False).logits[0].float()
    return logits


def _bandwidth() -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_s(lambda: target.copy_(source))


def _median_s(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(ROUNDS + 3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return median(taken[3:])


@dataclass(frozen=True)
class Floor:
    """Bytes that a step must read."""

    weights: int
    kv_token: int
    adapter: int

    @classmethod
    def of(cls, model: Model) -> "Floor":
        config = model._model.config
        embedding = model._model.get_input_embeddings().weight.nbytes
        weights = sum(parameter.nbytes for parameter in model._model.parameters()) - embedding
        head_dim = config.hidden_size // config.num_attention_heads
        kv_token = 4 * config.num_hidden_layers * config.num_key_value_heads * head_dim
        return cls(weights, kv_token, _adapter(model, 0).nbytes)

    def seconds(self, batch: int, adapters: int, bandwidth: float) -> float:
        return (self.weights + batch * CONTEXT * self.kv_token + adapters * self.adapter) / bandwidth


def _times(model: Model, bandwidth: float) -> str:
    """Times of a step, from spans to logits: the copy of its integers and the graph."""
    floor, lines = Floor.of(model), []
    for batch in BATCHES:
        for adapters in (count for count in ADAPTERS if count <= batch):
            owners = sorted(i % adapters for i in range(batch)) if adapters else [-1] * batch
            step = [Span(i, slot, CONTEXT - 1, (5,), True, model.sizes.blocks_of(i)) for i, slot in enumerate(owners)]
            took, least = _median_s(lambda step=step: model.forward(step)), floor.seconds(batch, adapters, bandwidth)
            lines.append([str(batch), str(adapters), f"{took * 1e3:.2f}", f"{least * 1e3:.2f}", f"{took / least:.2f}"])
    return figures.table(("batch", "adapters", "ms a step", "floor ms", "over the floor"), lines)
