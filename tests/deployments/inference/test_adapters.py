"""Adapters on disk: what is read, what is rejected and why, and that a rejected one leaves the base model as it was."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deployments.inference.adapters import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    digest_adapter,
    inspect_adapter,
    read_adapter,
)
from deployments.inference.native.engine import Engine
from deployments.inference.native.lora import stage
from deployments.inference.native.model import linear_shapes
from deployments.inference.request import AdapterRef, AdapterRejected, FinishReason
from tests.support.engine import request, run
from tests.support.models import ADAPTERS, Oracle

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
V = "base_model.model.model.layers.0.self_attn.v_proj.lora_"


@dataclass
class Folder:
    """An adapter's folder that a test may spoil."""

    path: Path

    def config(self, **changes: object) -> None:
        file = self.path / CONFIG_FILE
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def weights(self, change: Callable[[dict[str, Tensor]], None]) -> None:
        weights = load_file(self.path / WEIGHTS_FILE)
        change(weights)
        save_file({key: weight.contiguous() for key, weight in weights.items()}, self.path / WEIGHTS_FILE)

    def raw(self, change: Callable[[bytes], bytes]) -> None:
        file = self.path / WEIGHTS_FILE
        file.write_bytes(change(file.read_bytes()))

    def header(self, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
        """Rewrite the safetensors header, the weights' bytes as they were."""

        def rewrite(raw: bytes) -> bytes:
            size = struct.unpack("<Q", raw[:8])[0]
            content = json.loads(raw[8 : 8 + size])
            change(content)
            encoded = json.dumps(content).encode()
            return struct.pack("<Q", len(encoded)) + encoded + raw[8 + size :]

        self.raw(rewrite)


def _pickled(folder: Folder) -> None:
    torch.save(load_file(folder.path / WEIGHTS_FILE), folder.path / "adapter_model.bin")
    (folder.path / WEIGHTS_FILE).unlink()


def _leads_outside(folder: Folder) -> None:
    outside = folder.path.parent / "outside"
    shutil.move(folder.path / WEIGHTS_FILE, outside)
    (folder.path / WEIGHTS_FILE).symlink_to(outside)


def _rename(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    def rename(weights: dict[str, Tensor]) -> None:
        for key in [key for key in weights if old in key]:
            weights[key.replace(old, new)] = weights.pop(key)

    return rename


def _drop(part: str) -> Callable[[dict[str, Tensor]], None]:
    def drop(weights: dict[str, Tensor]) -> None:
        for key in [key for key in weights if part in key]:
            del weights[key]

    return drop


def _fill(key: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def fill(weights: dict[str, Tensor]) -> None:
        weights[key].view(-1)[3] = value

    return fill


def _to(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    def cast(weights: dict[str, Tensor]) -> None:
        weights.update({key: weight.to(dtype) for key, weight in weights.items()})

    return cast


def _add(key: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    def add(weights: dict[str, Tensor]) -> None:
        weights[key] = torch.zeros(shape)

    return add


def _resize(key: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    return _add(key, *shape)


def _gap(header: dict[str, dict[str, object]]) -> None:
    start, end = header[Q + "A.weight"]["data_offsets"]  # type: ignore[misc]
    header[Q + "A.weight"]["data_offsets"] = [start + 4, end + 4]


def _overlap(header: dict[str, dict[str, object]]) -> None:
    header[Q + "A.weight"]["data_offsets"] = header[V + "A.weight"]["data_offsets"]


def _pipe(name: str) -> Callable[[Folder], None]:
    """A named pipe, on which reading would wait for ever."""

    def spoil(folder: Folder) -> None:
        (folder.path / name).unlink()
        os.mkfifo(folder.path / name)

    return spoil


def _loop(folder: Folder) -> None:
    (folder.path / WEIGHTS_FILE).unlink()
    (folder.path / WEIGHTS_FILE).symlink_to(folder.path / WEIGHTS_FILE)


def _sparse(folder: Folder) -> None:
    """Terabytes by its size, nothing on the disk."""
    os.truncate(folder.path / WEIGHTS_FILE, 2**42)


def _zero(weights: dict[str, Tensor]) -> None:
    for key, weight in weights.items():
        if "lora_B" in key:
            weight.zero_()


def _pair(module: str, inputs: int, outputs: int) -> Callable[[dict[str, Tensor]], None]:
    def add(weights: dict[str, Tensor]) -> None:
        weights[f"base_model.model.{module}.lora_A.weight"] = torch.ones(8, inputs)
        weights[f"base_model.model.{module}.lora_B.weight"] = torch.ones(outputs, 8)

    return add


HOSTILE: Mapping[str, tuple[Callable[[Folder], object], str]] = {
    "no config": (lambda f: (f.path / CONFIG_FILE).unlink(), "has no adapter_config.json"),
    "no weights": (lambda f: (f.path / WEIGHTS_FILE).unlink(), r"has no adapter_model\.safetensors"),
    "pickled weights": (_pickled, "pickled weights"),
    "a link to outside": (_leads_outside, "leads outside"),
    "a folder in place of the weights": (
        lambda f: ((f.path / WEIGHTS_FILE).unlink(), (f.path / WEIGHTS_FILE).mkdir()),
        "has no adapter_model",
    ),
    "config not JSON": (lambda f: (f.path / CONFIG_FILE).write_text("{"), "is not JSON"),
    "config nested a million deep": (
        lambda f: (f.path / CONFIG_FILE).write_text("[" * (MAX_CONFIG_BYTES - 1)),
        "is not JSON",
    ),
    "config a list": (lambda f: (f.path / CONFIG_FILE).write_text("[]"), "must hold an object"),
    "config too large": (lambda f: f.config(revision="x" * MAX_CONFIG_BYTES), "larger than"),
    "another method": (lambda f: f.config(peft_type="IA3"), "peft_type must be LORA"),
    "an unknown key": (lambda f: f.config(new_idea=1), "unknown key 'new_idea'"),
    "DoRA": (lambda f: f.config(use_dora=True), "use_dora"),
    "an initialiser that rewrites the base": (lambda f: f.config(init_lora_weights="pissa"), "init_lora_weights"),
    "another such": (lambda f: f.config(init_lora_weights="olora"), "init_lora_weights"),
    "replicated layers": (lambda f: f.config(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    "modules to save": (lambda f: f.config(modules_to_save=["lm_head"]), "modules_to_save"),
    "trained biases": (lambda f: f.config(bias="all"), "bias"),
    "LoRA biases": (lambda f: f.config(lora_bias=True), "lora_bias"),
    "trained tokens": (lambda f: f.config(trainable_token_indices=[1]), "trainable_token_indices"),
    "expert parameters": (lambda f: f.config(target_parameters=["w"]), "target_parameters"),
    "one where false should stand": (lambda f: f.config(use_dora=1), "use_dora"),
    "an expression in a pattern": (lambda f: f.config(rank_pattern={"(a+)+$": 8}), "plain module names"),
    "a rank that is no number": (lambda f: f.config(r="8"), "positive whole number"),
    "rank zero": (lambda f: f.config(r=0), "positive whole number"),
    "another rank than the config's": (lambda f: f.config(r=16), "where the config says 16"),
    "endless alpha": (lambda f: f.config(lora_alpha=float("inf")), "must be a positive number"),
    "alpha not a number": (lambda f: f.config(lora_alpha=float("nan")), "must be a positive number"),
    "absurd alpha": (lambda f: f.config(lora_alpha=1e30), "is scaled by"),
    "targets missing from the weights": (lambda f: f.weights(_drop("layers.1")), "weights are missing for 7"),
    "weights that no target names": (lambda f: f.config(target_modules=["q_proj"]), "not one of the adapter's target"),
    "half a module": (lambda f: f.weights(_drop(Q + "B")), "needs both factors"),
    "modules the base model lacks": (lambda f: f.weights(_rename("layers.1", "layers.7")), "not a module of the base"),
    "all keys under a wrong prefix": (
        lambda f: f.weights(_rename("base_model.model.", "base_model.")),
        "not a LoRA factor|not a module of the base",
    ),
    "the head": (lambda f: f.weights(_add("base_model.model.lm_head.lora_A.weight", 8, 48)), "needs both factors"),
    "embedding factors": (lambda f: f.weights(_add("base_model.model.embed.lora_embedding_A", 8, 9)), "not a LoRA"),
    "a magnitude vector": (lambda f: f.weights(_add(Q + "magnitude_vector", 8, 1)), "not a LoRA factor"),
    "a wrong width": (lambda f: f.weights(_resize(Q + "A.weight", 8, 40)), "is for 40 inputs"),
    "a wrong height": (lambda f: f.weights(_resize(Q + "B.weight", 40, 8)), "40 outputs"),
    "factors of two ranks": (lambda f: f.weights(_resize(Q + "B.weight", 48, 4)), "lora_A has rank 8, lora_B 4"),
    "a cube": (lambda f: f.weights(_resize(Q + "B.weight", 48, 8, 1)), "must be a matrix"),
    "an empty matrix": (lambda f: f.weights(_resize(Q + "A.weight", 0, 48)), "does not have"),
    "not a number": (lambda f: f.weights(_fill(Q + "A.weight", float("nan"))), "not finite"),
    "infinity": (lambda f: f.weights(_fill(Q + "B.weight", float("-inf"))), "not finite"),
    "infinity in bfloat16": (
        lambda f: (f.weights(_to(torch.bfloat16)), f.weights(_fill(Q + "B.weight", float("inf")))),
        "not finite",
    ),
    "whole numbers for weights": (lambda f: f.weights(_to(torch.int32)), "has the type 'I32'"),
    "double precision": (lambda f: f.weights(_to(torch.float64)), "has the type 'F64'"),
    "no tensors": (lambda f: f.weights(lambda weights: weights.clear()), "no LoRA weights"),
    "no header": (lambda f: f.raw(lambda raw: b"1234"), "not a safetensors file"),
    "an endless header": (lambda f: f.raw(lambda raw: b"\xff" * 7 + b"\x7f" + raw[8:]), "not a safetensors file"),
    "a header of rubbish": (lambda f: f.raw(lambda raw: raw[:8] + b"?" * (len(raw) - 8)), "not a safetensors file"),
    "cut short": (lambda f: f.raw(lambda raw: raw[:-100]), "bytes of weights where"),
    "bytes at the end": (lambda f: f.raw(lambda raw: raw + b"PK"), "bytes of weights where"),
    "a gap between tensors": (lambda f: f.header(_gap), "do not follow"),
    "tensors that overlap": (lambda f: f.header(_overlap), "do not follow|does not have"),
    "sizes below zero": (
        lambda f: f.header(lambda h: h[Q + "A.weight"].update(shape=[-8, -48])),
        "must be a matrix",
    ),
    "a named pipe for the weights": (_pipe(WEIGHTS_FILE), "has no adapter_model"),
    "a named pipe for the config": (_pipe(CONFIG_FILE), "has no adapter_config"),
    "a link to itself": (_loop, "has no adapter_model"),
    "a sparse file of terabytes": (_sparse, "more than the allowed"),
    "weights before any training": (lambda f: f.weights(_zero), "it changes nothing"),
    "a module's name in other letters": (lambda f: f.weights(_rename("q_proj", "q_\u0440roj")), "not a LoRA factor"),
    "a module's name that climbs": (lambda f: f.weights(_rename("q_proj", "../q_proj")), "not a LoRA factor"),
    "a key twice in the config": (
        lambda f: (f.path / CONFIG_FILE).write_text('{"peft_type": "LORA", "r": 8, "r": 16}'),
        "a key occurs twice",
    ),
    "a rank of a thousand digits": (lambda f: f.config(r=10**1000), "where the config says"),
    "another base model's head": (lambda f: f.weights(_pair("lm_head", 48, 320)), "lm_head is not a module"),
    "another base model's embedding": (
        lambda f: f.weights(_pair("model.embed_tokens", 320, 48)),
        "embed_tokens is not a module",
    ),
    "another base model's width": (
        lambda f: f.weights(_pair("model.layers.0.self_attn.q_proj", 64, 64)),
        "is for 64 inputs and 64 outputs",
    ),
    "a size that lies": (lambda f: f.header(lambda h: h[Q + "A.weight"].update(shape=[2**40, 48])), "does not have"),
}


@pytest.fixture
def folder(adapter_paths: dict[str, Path], tmp_path: Path) -> Folder:
    return Folder(Path(shutil.copytree(adapter_paths["all8"], tmp_path / "spoiled")))


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_adapter_is_rejected_with_its_reason(kind: str, folder: Folder, base_path: Path) -> None:
    spoil, reason = HOSTILE[kind]
    inspect_adapter(folder.path, linears=linear_shapes(base_path), max_rank=16)
    spoil(folder)
    with pytest.raises(AdapterRejected, match=reason):
        inspect_adapter(folder.path, linears=linear_shapes(base_path), max_rank=16)


def test_hostile_adapters_leave_the_base_model_bit_identical(
    engine: Engine, adapter_paths: dict[str, Path], tmp_path: Path, refs: dict[str, AdapterRef], oracle: Oracle
) -> None:
    prompt = (5, 9, 200, 31)
    before = _base_logits(engine)
    for i, (kind, (spoil, reason)) in enumerate(HOSTILE.items()):
        folder = Folder(Path(shutil.copytree(adapter_paths["all8"], tmp_path / str(i) / "bad")))
        spoil(folder)
        ref = AdapterRef(f"bad{i}", f"{i:064x}", str(folder.path))
        if i % 8:
            requests = [request("bad", prompt, ref)]
        else:
            requests = [request("bad", prompt, ref), request("good", prompt, refs["all8"]), request("base", prompt)]
        bad, *others = run(engine, *requests)
        assert bad.deltas[-1].finish_reason is FinishReason.ERROR, kind
        assert f"bad{i}" in bad.deltas[-1].error
        for name, other in zip(["all8", None], others, strict=False):
            assert other.token_ids == oracle.greedy(name, prompt, 8)
        with pytest.raises(AdapterRejected, match=reason):
            engine.submit(request("again", prompt, ref), lambda delta: None)
        assert torch.equal(before, _base_logits(engine)), kind
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)


def _base_logits(engine: Engine) -> Tensor:
    """From the idle engine's model; its KV rows are written by each request before they are read."""
    from deployments.inference.native.sequence import Span

    return engine._model.forward([Span(0, -1, 0, (5, 9, 200, 31), True)])


def test_adapter_with_another_digest_is_rejected(engine: Engine, refs: dict[str, AdapterRef]) -> None:
    lie = AdapterRef("all8", "0" * 64, refs["all8"].path)
    assert "digest" in run(engine, request("r", adapter=lie))[0].deltas[-1].error


def test_adapter_larger_than_host_memory_is_rejected(folder: Folder) -> None:
    with pytest.raises(AdapterRejected, match="more than the allowed 1000"):
        inspect_adapter(folder.path, max_bytes=1000)


def test_rank_above_max_adapter_rank_is_rejected(folder: Folder) -> None:
    with pytest.raises(AdapterRejected, match="rank 8, more than the engine's 7"):
        inspect_adapter(folder.path, max_rank=7)


def test_adapter_outside_the_root_is_rejected(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(folder.path)
    inspect_adapter(folder.path, root=tmp_path)
    for path in (folder.path, tmp_path / "root" / "link", tmp_path / "root" / ".." / "spoiled"):
        with pytest.raises(AdapterRejected, match="outside"):
            inspect_adapter(path, root=tmp_path / "root")


def test_digest_covers_both_files_only(folder: Folder, adapter_paths: dict[str, Path]) -> None:
    original = digest_adapter(adapter_paths["all8"])
    assert digest_adapter(folder.path) == original == inspect_adapter(folder.path).digest
    (folder.path / "README.md").write_text("changed")
    assert digest_adapter(folder.path) == original
    folder.config(lora_alpha=17)
    changed = digest_adapter(folder.path)
    folder.weights(_fill(Q + "A.weight", 7.0))
    assert len({original, changed, digest_adapter(folder.path)}) == 3


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_adapter_is_read_with_its_rank_and_scaling(
    name: str, adapter_paths: dict[str, Path], base_path: Path, oracle: Oracle
) -> None:
    files = read_adapter(adapter_paths[name], linears=linear_shapes(base_path), max_rank=16)
    host = stage(files, torch.float32)
    for module, delta in files.info.modules.items():
        layer = oracle.model.base_model.model.get_submodule(module)
        assert delta.rank == layer.r[name]
        assert delta.scaling == pytest.approx(layer.scaling[name])
        expected = layer.get_delta_weight(name)
        factors = host.modules[module]
        torch.testing.assert_close((factors.a.t() @ factors.b).t(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_read_exactly(folder: Folder, dtype: torch.dtype) -> None:
    folder.weights(_to(dtype))
    files = read_adapter(folder.path)
    delta = next(iter(files.info.modules.items()))
    expected = load_file(folder.path / WEIGHTS_FILE)[f"base_model.model.{delta[0]}.lora_A.weight"].float()
    assert torch.equal(torch.from_numpy(files.tensor(delta[1].a).copy()), expected)


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q|k|v|o|gate|up|down)_proj"])
def test_target_modules_may_be_a_regular_expression(folder: Folder, base_path: Path, targets: str) -> None:
    folder.config(target_modules=targets)
    assert len(inspect_adapter(folder.path, linears=linear_shapes(base_path)).modules) == 14
