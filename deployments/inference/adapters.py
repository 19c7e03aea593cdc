"""Read adapters in PEFT's folder format strictly, and identify them by a digest of their bytes.

Needs no torch and runs nothing of the adapter. Each file is read once, so that the bytes checked are the bytes loaded.
PEFT itself is not used on a served model: an adapter's configuration can make it rewrite the shared base weights.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deployments.inference.peft_config import MAX_SCALING, PeftConfig, parse_config
from deployments.inference.request import AdapterRef, AdapterRejected
from deployments.inference.tensors import MAX_HEADER_BYTES, TensorSpan, read_header

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 64 * 1024
MAX_WEIGHTS_BYTES = 4 * 1024**3
TENSOR_KEY = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.]+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class LinearShape:
    """Sizes of a linear module of the base model."""

    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class ModuleDelta:
    """One module's two factors in the file: ``a [rank, in]`` and ``b [out, rank]``."""

    a: TensorSpan
    b: TensorSpan
    rank: int
    scaling: float


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """An adapter that was checked: its identity, and what it changes."""

    digest: str
    rank: int
    """The largest rank of any module."""
    modules: Mapping[str, ModuleDelta]
    base_model: str
    """The model that it was trained on, according to its configuration. Not checked."""
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter's two files in memory, checked."""

    info: AdapterInfo
    weights: memoryview
    """The weights file after its header."""

    def tensor(self, span: TensorSpan) -> NDArray[np.float32]:
        """A tensor as float32, in the file's shape."""
        return span.as_float32(self.weights)


def inspect_adapter(
    path: Path,
    *,
    linears: Mapping[str, LinearShape] | None = None,
    max_rank: int | None = None,
    root: Path | None = None,
    max_bytes: int = MAX_WEIGHTS_BYTES,
) -> AdapterInfo:
    """Check a PEFT folder without starting an engine.

    ``linears`` are the modules of the base model that adapters can change (see ``native.model.linear_shapes``); without
    them only the adapter's own consistency is checked. ``root`` is the folder in which its files must lie, symbolic
    links resolved.

    Raises:
        AdapterRejected: the message says what is wrong with it.
    """
    return read_adapter(path, linears=linears, max_rank=max_rank, root=root, max_bytes=max_bytes).info


def read_adapter(
    path: Path,
    *,
    linears: Mapping[str, LinearShape] | None = None,
    max_rank: int | None = None,
    root: Path | None = None,
    max_bytes: int = MAX_WEIGHTS_BYTES,
) -> AdapterFiles:
    """Do as ``inspect_adapter``, and return the files too."""
    config_path, weights_path = _locate(path, root)
    raw_config = _read_bounded(config_path, MAX_CONFIG_BYTES)
    config = parse_config(raw_config)
    header_size = _check_header(weights_path, config, linears, max_rank, max_bytes)
    raw_weights = _read_bounded(weights_path, max_bytes)
    if int.from_bytes(raw_weights[:8], "little") != header_size:
        raise AdapterRejected(f"{WEIGHTS_FILE} changed while it was read: deploy it again when it is complete")
    body = memoryview(raw_weights)[8 + header_size :]
    modules = _parse_header(raw_weights[8 : 8 + header_size], len(body), config, linears, max_rank)
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
    """An adapter's identity: SHA-256 over both files, each preceded by its length, as 64 hex digits.

    Raises:
        AdapterRejected: a file is missing, too large, or outside the root.
    """
    config_path, weights_path = _locate(path, root)
    return _digest(_read_bounded(config_path, MAX_CONFIG_BYTES), _read_bounded(weights_path, MAX_WEIGHTS_BYTES))


def _digest(config: bytes, weights: bytes) -> str:
    state = hashlib.sha256()
    for content in (config, weights):
        state.update(len(content).to_bytes(8, "little"))
        state.update(content)
    return state.hexdigest()


def _locate(path: Path, root: Path | None) -> tuple[Path, Path]:
    """The real paths of both files, which must lie under the root, or in the folder itself if there is none."""
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
    """Check the header before the weights are read, and return its length."""
    size = path.stat().st_size
    if size > max_bytes:
        raise AdapterRejected(f"{WEIGHTS_FILE} has {size} bytes, more than the allowed {max_bytes}")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise AdapterRejected(f"{WEIGHTS_FILE} is not a safetensors file: its header has {length} bytes")
        _parse_header(file.read(length), size - 8 - length, config, linears, max_rank)
    return length


def _parse_header(
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
    """Group the tensors by module. Every key must be a factor of a module."""
    factors: dict[str, dict[str, TensorSpan]] = {}
    for key, span in spans.items():
        match = TENSOR_KEY.fullmatch(key)
        if match is None:
            raise AdapterRejected(f"{key} is not a LoRA factor that this engine supports")
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
        raise AdapterRejected(f"{module} has rank {rank}, more than the engine's {max_rank} (max_adapter_rank)")
    scaling = config.scaling_of(module)
    if scaling > MAX_SCALING:
        raise AdapterRejected(f"{module} is scaled by {scaling:g}, more than the allowed {MAX_SCALING:g}")
    return ModuleDelta(a=pair["A"], b=pair["B"], rank=rank, scaling=scaling)


def _check_modules(modules: Mapping[str, ModuleDelta], config: PeftConfig, linears: Mapping[str, LinearShape]) -> None:
    """Check that every module is one of the base model, of its size, and that no target module is missing."""
    for module, delta in modules.items():
        shape = linears.get(module)
        if shape is None:
            raise AdapterRejected(f"{module} is not a module of the base model that an adapter can change")
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
        raise AdapterRejected(f"{extra[0]} has weights but is not one of the adapter's target modules")


def _check_finite(files: AdapterFiles) -> None:
    """Check that all weights are finite, and that some module has an effect."""
    for module, delta in files.info.modules.items():
        if not delta.a.is_finite(files.weights) or not delta.b.is_finite(files.weights):
            raise AdapterRejected(f"{module} has weights that are not finite numbers")
    if not any(
        delta.a.is_any(files.weights) and delta.b.is_any(files.weights) for delta in files.info.modules.values()
    ):
        raise AdapterRejected("it changes nothing: in each module one factor is all zeros, as before training")


def local_adapter(path: Path | str, name: str = "") -> AdapterRef:
    """Refer to the adapter in a folder, by the folder's name if no other is given. Raises AdapterRejected."""
    folder = Path(path)
    return AdapterRef(name or folder.name, digest_adapter(folder), str(folder))
