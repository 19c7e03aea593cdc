"""Adapters on disk: PEFT's folder format, read strictly and identified by its bytes.

Judges an adapter without torch and without running anything from it. What was read is what was
checked and digested: each file is read once. PEFT itself never touches a served model, because an
adapter's configuration can make it rewrite the shared base weights.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deployments.inference.peft_config import LARGEST_SCALING, PeftConfig, parse_config
from deployments.inference.request import AdapterRef, AdapterRejected
from deployments.inference.tensors import HEADER_BYTES, TensorSpan, read_header

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_BYTES = 64 * 1024
WEIGHTS_BYTES = 4 * 1024**3
TENSOR_KEY = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.]+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class LinearShape:
    """Sizes of a linear module of the base model."""

    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class ModuleDelta:
    """Where one module's two factors lie in the weights: ``a`` is [rank, in], ``b`` is [out, rank]."""

    a: TensorSpan
    b: TensorSpan
    rank: int
    scaling: float


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A judged adapter: its identity, and what it changes."""

    digest: str
    rank: int
    """The largest rank of any module."""
    modules: Mapping[str, ModuleDelta]
    base_model: str
    """What its config says it was trained on; a hint only."""
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter's two files in memory, judged."""

    info: AdapterInfo
    weights: memoryview
    """The tensors' bytes, header left out."""

    def tensor(self, span: TensorSpan) -> NDArray[np.float32]:
        """A tensor as float32, shape as in the file."""
        return span.as_float32(self.weights)


def inspect_adapter(
    path: Path,
    *,
    linears: Mapping[str, LinearShape] | None = None,
    max_rank: int | None = None,
    root: Path | None = None,
    max_bytes: int = WEIGHTS_BYTES,
) -> AdapterInfo:
    """Judge a PEFT folder without starting an engine.

    ``linears`` are the base model's adaptable modules (``model.linear_shapes`` reads them); without
    them only the adapter's own consistency is judged. ``root`` is where its real path must lie.

    Raises:
        AdapterRejected: anything wrong with it, in words.
    """
    return read_adapter(path, linears=linears, max_rank=max_rank, root=root, max_bytes=max_bytes).info


def read_adapter(
    path: Path,
    *,
    linears: Mapping[str, LinearShape] | None = None,
    max_rank: int | None = None,
    root: Path | None = None,
    max_bytes: int = WEIGHTS_BYTES,
) -> AdapterFiles:
    """As ``inspect_adapter``, and keep the bytes that were judged. Raises as it does."""
    config_path, weights_path = _locate(path, root)
    raw_config = _read_bounded(config_path, CONFIG_BYTES)
    config = parse_config(raw_config)
    header_size = _check_header(weights_path, config, linears, max_rank, max_bytes)
    raw_weights = _read_bounded(weights_path, max_bytes)
    if int.from_bytes(raw_weights[:8], "little") != header_size:
        raise AdapterRejected(f"{WEIGHTS_FILE} changed while it was read")
    body = memoryview(raw_weights)[8 + header_size :]
    modules = _judge(raw_weights[8 : 8 + header_size], len(body), config, linears, max_rank)
    info = AdapterInfo(
        digest=_digest(raw_config, raw_weights),
        rank=max(delta.rank for delta in modules.values()),
        modules=modules,
        base_model=config.base_model,
        weight_bytes=len(body),
    )
    files = AdapterFiles(info=info, weights=body)
    _check_finite(files)
    return files


def digest_adapter(path: Path, *, root: Path | None = None) -> str:
    """An adapter's identity: SHA-256 over both files, each preceded by its length; 64 hex digits.

    Raises:
        AdapterRejected: a file is missing, too large, or lies where it may not.
    """
    config_path, weights_path = _locate(path, root)
    return _digest(_read_bounded(config_path, CONFIG_BYTES), _read_bounded(weights_path, WEIGHTS_BYTES))


def _digest(config: bytes, weights: bytes) -> str:
    state = hashlib.sha256()
    for content in (config, weights):
        state.update(len(content).to_bytes(8, "little"))
        state.update(content)
    return state.hexdigest()


def _locate(path: Path, root: Path | None) -> tuple[Path, Path]:
    """The real paths of both files, which must lie under the root, or without one in the folder itself."""
    folder = Path(os.path.realpath(path))
    if not folder.is_dir():
        raise AdapterRejected(f"{path} is not a folder")
    allowed = folder if root is None else Path(os.path.realpath(root))
    if not folder.is_relative_to(allowed):
        raise AdapterRejected(f"{path} lies outside {root}")
    found = tuple(Path(os.path.realpath(folder / name)) for name in (CONFIG_FILE, WEIGHTS_FILE))
    for name, file in zip((CONFIG_FILE, WEIGHTS_FILE), found, strict=True):
        if not file.is_file():
            pickled = (folder / "adapter_model.bin").exists() and name == WEIGHTS_FILE
            raise AdapterRejected(
                f"{path} has no {name}" + (": pickled weights (adapter_model.bin) are not read" if pickled else "")
            )
        if not file.is_relative_to(allowed):
            raise AdapterRejected(f"{path}/{name} leads outside {allowed}")
    return found[0], found[1]


def _read_bounded(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise AdapterRejected(f"{path.name} cannot be read: {error.strerror}") from error
    if len(content) > limit:
        raise AdapterRejected(f"{path.name} is larger than {limit} bytes")
    return content


def _check_header(
    path: Path,
    config: PeftConfig,
    linears: Mapping[str, LinearShape] | None,
    max_rank: int | None,
    max_bytes: int,
) -> int:
    """Judge the shapes from the header alone, before the weights are read; return the header's length."""
    size = path.stat().st_size
    if size > max_bytes:
        raise AdapterRejected(f"{WEIGHTS_FILE} has {size} bytes, more than the allowed {max_bytes}")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(HEADER_BYTES, size - 8):
            raise AdapterRejected(f"{WEIGHTS_FILE} is not a safetensors file: its header has {length} bytes")
        _judge(file.read(length), size - 8 - length, config, linears, max_rank)
    return length


def _judge(
    header: bytes,
    body_bytes: int,
    config: PeftConfig,
    linears: Mapping[str, LinearShape] | None,
    max_rank: int | None,
) -> dict[str, ModuleDelta]:
    factors = _factors(dict(read_header(header, body_bytes)))
    modules = {module: _delta(module, pair, config, max_rank) for module, pair in factors.items()}
    if not modules:
        raise AdapterRejected(f"{WEIGHTS_FILE} holds no LoRA weights")
    if linears is not None:
        _check_modules(modules, config, linears)
    return modules


def _factors(spans: Mapping[str, TensorSpan]) -> dict[str, dict[str, TensorSpan]]:
    """Group the tensors by module; every key must be a factor of some module."""
    factors: dict[str, dict[str, TensorSpan]] = {}
    for key, span in spans.items():
        match = TENSOR_KEY.fullmatch(key)
        if match is None:
            raise AdapterRejected(f"{key} is not a LoRA factor that this engine knows")
        factors.setdefault(match["module"], {})[match["side"]] = span
    return factors


def _delta(module: str, pair: Mapping[str, TensorSpan], config: PeftConfig, max_rank: int | None) -> ModuleDelta:
    if set(pair) != {"A", "B"}:
        raise AdapterRejected(f"{module} has lora_{next(iter(pair))} alone; a module needs both factors")
    rank = pair["A"].shape[0]
    if pair["B"].shape[1] != rank:
        raise AdapterRejected(f"{module}: lora_A has rank {rank}, lora_B {pair['B'].shape[1]}")
    if rank != config.rank_of(module):
        raise AdapterRejected(f"{module} has rank {rank} where the config says {config.rank_of(module)}")
    if max_rank is not None and rank > max_rank:
        raise AdapterRejected(f"{module} has rank {rank}, more than the engine's {max_rank}")
    scaling = config.scaling_of(module)
    if scaling > LARGEST_SCALING:
        raise AdapterRejected(f"{module} is scaled by {scaling:g}, more than {LARGEST_SCALING:g}")
    return ModuleDelta(a=pair["A"], b=pair["B"], rank=rank, scaling=scaling)


def _check_modules(modules: Mapping[str, ModuleDelta], config: PeftConfig, linears: Mapping[str, LinearShape]) -> None:
    """Every module must be the base model's, of its size, and all that the config names must be there."""
    for module, delta in modules.items():
        shape = linears.get(module)
        if shape is None:
            raise AdapterRejected(f"{module} is no module of the base model that an adapter can change")
        has = (delta.a.shape[1], delta.b.shape[0])
        if has != (shape.in_features, shape.out_features):
            raise AdapterRejected(
                f"{module} is for {has[0]} inputs and {has[1]} outputs; "
                f"the base model's has {shape.in_features} and {shape.out_features}"
            )
    expected = config.expected(linears)
    if expected is not None and expected != modules.keys():
        missing, extra = sorted(expected - modules.keys()), sorted(modules.keys() - expected)
        if missing:
            raise AdapterRejected(f"weights are missing for {len(missing)} of its target modules, first {missing[0]}")
        raise AdapterRejected(f"{extra[0]} has weights but is none of the adapter's target modules")


def _check_finite(files: AdapterFiles) -> None:
    """Every number is one, and they are not all for nothing."""
    for module, delta in files.info.modules.items():
        if not delta.a.is_finite(files.weights) or not delta.b.is_finite(files.weights):
            raise AdapterRejected(f"{module} has weights that are not finite numbers")
    if not any(
        delta.a.is_any(files.weights) and delta.b.is_any(files.weights) for delta in files.info.modules.values()
    ):
        raise AdapterRejected("it changes nothing: in each module one factor is all zeros, as before any training")


def local_adapter(path: Path | str, name: str = "") -> AdapterRef:
    """The adapter in this folder, named after it unless told otherwise. Raises AdapterRejected."""
    folder = Path(path)
    return AdapterRef(name or folder.name, digest_adapter(folder), str(folder))
