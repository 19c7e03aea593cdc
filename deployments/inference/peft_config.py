"""Read PEFT's ``adapter_config.json`` strictly: keys that the engine supports are listed, all others are rejected.

Some of PEFT's keys change the base model's weights or import code. Those are never accepted.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from deployments.inference.request import AdapterRejected
from deployments.inference.tensors import unique_keys

MAX_SCALING = 1024.0
"""Bound on alpha / rank: far above that of any trained adapter, far below what overflows float16."""

IGNORED_KEYS = frozenset(
    (
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "lora_dropout",
        "fan_in_fan_out",
        "layers_pattern",
        "megatron_core",
        "qalora_group_size",
        "ensure_weight_tying",
    )
)
"""Keys whose value does not change what the adapter computes."""

NEUTRAL_KEYS: Mapping[str, tuple[object, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "modules_to_save": (None, []),
    "loftq_config": (None, {}),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "runtime_config": (None, {}),
    **dict.fromkeys(
        (
            "megatron_config",
            "eva_config",
            "corda_config",
            "lora_ga_config",
            "velora_config",
            "monteclora_config",
            "use_bdlora",
            "arrow_config",
            "kasa_config",
        ),
        (None, {}, False),
    ),
}
"""Keys for what the engine does not support, and the values that do not ask for it."""

READ_KEYS = frozenset(
    (
        "peft_type",
        "r",
        "lora_alpha",
        "target_modules",
        "exclude_modules",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
    )
)
Number = TypeVar("Number", int, float)
PATTERN = re.compile(r"\^?[A-Za-z0-9_.]+")


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The keys that decide what an adapter computes."""

    rank: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...] | str
    """Names of modules; or, as a string, PEFT's regular expression or ``all-linear``."""
    excluded: tuple[str, ...] | str
    layers: tuple[int, ...] | None
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base_model: str
    """The model that it was trained on, according to the file; may be empty."""

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski, arXiv 2312.03732)."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def expected(self, modules: Iterable[str]) -> frozenset[str] | None:
        """Which of the model's modules must have weights; None if a regular expression selects them."""
        if isinstance(self.excluded, str) or (isinstance(self.targets, str) and self.targets != "all-linear"):
            return None
        return frozenset(module for module in modules if self._names(module))

    def _names(self, module: str) -> bool:
        named = isinstance(self.targets, str) or ends_with_any(module, self.targets)
        excluded = not isinstance(self.excluded, str) and ends_with_any(module, self.excluded)
        return named and not excluded and (self.layers is None or layer_of(module) in self.layers)


def ends_with_any(module: str, names: Iterable[str]) -> bool:
    """PEFT's rule for a list of names: one is the module's whole path, or its end after a dot."""
    return any(module == name or module.endswith("." + name) for name in names)


def layer_of(module: str) -> int | None:
    """The first number in a module's path: its layer."""
    return next((int(part) for part in module.split(".") if part.isdigit()), None)


def parse_config(raw: bytes) -> PeftConfig:
    """Parse ``adapter_config.json``.

    Raises:
        AdapterRejected: it is not JSON or not LoRA, or a key is unknown or asks for what the engine does not support.
    """
    try:
        content = json.loads(raw, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise AdapterRejected(f"adapter_config.json is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise AdapterRejected("adapter_config.json must hold an object")
    if content.get("peft_type") != "LORA":
        raise AdapterRejected(f"peft_type must be LORA, not {content.get('peft_type')!r}")
    for key, value in content.items():
        _check_key(key, value)
    return _read(content)


def _check_key(key: str, value: object) -> None:
    if key in IGNORED_KEYS or key in READ_KEYS:
        return
    if key not in NEUTRAL_KEYS:
        raise AdapterRejected(f"adapter_config.json has the unknown key {key!r}")
    if not any(value == neutral and type(value) is type(neutral) for neutral in NEUTRAL_KEYS[key]):
        raise AdapterRejected(f"adapter_config.json has {key}={value!r}, which this engine does not support")


def _read(content: Mapping[str, object]) -> PeftConfig:
    rslora = content.get("use_rslora", False)
    if not isinstance(rslora, bool | None):
        raise AdapterRejected(f"use_rslora must be true or false, not {rslora!r}")
    layers = content.get("layers_to_transform")
    base = content.get("base_model_name_or_path")
    return PeftConfig(
        rank=_rank("r", content.get("r", 8)),
        alpha=_alpha("lora_alpha", content.get("lora_alpha", 8)),
        rslora=bool(rslora),
        targets=_names("target_modules", content.get("target_modules")),
        excluded=_names("exclude_modules", content.get("exclude_modules") or []),
        layers=None if layers is None else _layers(layers),
        rank_pattern={key: _rank(key, value) for key, value in _pattern("rank_pattern", content)},
        alpha_pattern={key: _alpha(key, value) for key, value in _pattern("alpha_pattern", content)},
        base_model=base if isinstance(base, str) else "",
    )


def _rank(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AdapterRejected(f"the rank {key} must be a positive whole number, not {value!r}")
    return value


def _alpha(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise AdapterRejected(f"the alpha {key} must be a positive number, not {value!r}")
    return float(value)


def _names(key: str, value: object) -> tuple[str, ...] | str:
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise AdapterRejected(f"{key} must be a list of module names or one regular expression, not {value!r}")
    return tuple(value)


def _layers(value: object) -> tuple[int, ...]:
    layers = value if isinstance(value, list) else [value]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise AdapterRejected(f"layers_to_transform must hold layer numbers, not {value!r}")
    return tuple(layers)


def _pattern(key: str, content: Mapping[str, object]) -> list[tuple[str, object]]:
    """The entries of a pattern, whose keys must be plain module paths.

    PEFT takes them for regular expressions; a hostile one could run for ever.
    """
    value = content.get(key) or {}
    if not isinstance(value, dict):
        raise AdapterRejected(f"{key} must be an object, not {value!r}")
    for name in value:
        if not PATTERN.fullmatch(name):
            raise AdapterRejected(f"{key} has the key {name!r}: only plain module names are supported")
    return list(value.items())


def _by_pattern(pattern: Mapping[str, Number], module: str, otherwise: Number) -> Number:
    """The value of the first key that matches this module, as in PEFT."""
    for key, value in pattern.items():
        exact = key.startswith("^")
        if module == key.removeprefix("^") or (not exact and ends_with_any(module, [key])):
            return value
    return otherwise
