"""Fetching model and adapter folders."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from deployments.inference.adapters import CONFIG_FILE, WEIGHTS_FILE, digest_adapter
from deployments.replica.artifacts import ArtifactUnavailable, fetch, is_url

REMOTE = "memory://bucket"


def make_adapter(folder: Path, fill: float = 1.0) -> Path:
    folder.mkdir(parents=True)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {
        f"{module}.lora_A.weight": np.full((8, 16), fill, np.float32),
        f"{module}.lora_B.weight": np.full((16, 8), fill, np.float32),
    }
    save_file(weights, folder / WEIGHTS_FILE)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return folder


def upload(folder: Path, url: str) -> None:
    filesystem, root = fsspec.core.url_to_fs(url)
    for file in folder.iterdir():
        filesystem.pipe(f"{root}/{file.name}", file.read_bytes())


@pytest.fixture(autouse=True)
def _empty_bucket() -> Iterator[None]:
    yield
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists("/bucket"):
        filesystem.rm("/bucket", recursive=True)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "made" / "haiku")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("path", "remote"),
    [("a/b", False), ("/a", False), ("file:///a", False), ("C:/a", False), ("s3://b/a", True), ("hf://o/m", True)],
)
def test_is_url(path: str, remote: bool) -> None:
    assert is_url(path) == remote


def test_local_folder_is_not_copied(adapter: Path, cache: Path) -> None:
    assert fetch(str(adapter), cache) == adapter
    assert fetch(f"file://{adapter}", cache, digest_adapter(adapter)) == adapter
    assert not cache.exists()


def test_adapter_cached_under_digest(adapter: Path, cache: Path) -> None:
    upload(adapter, f"{REMOTE}/haiku")
    found = fetch(f"{REMOTE}/haiku", cache)
    assert found == cache / digest_adapter(adapter)
    assert digest_adapter(found) == digest_adapter(adapter)


def test_only_adapter_files_fetched(adapter: Path, cache: Path) -> None:
    (adapter / "adapter_model.bin").write_bytes(b"pickle")
    (adapter / "code.py").write_text("raise SystemExit")
    upload(adapter, f"{REMOTE}/haiku")
    assert {file.name for file in fetch(f"{REMOTE}/haiku", cache).iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}


def test_cached_digest_needs_no_network(adapter: Path, cache: Path) -> None:
    upload(adapter, f"{REMOTE}/haiku")
    digest = digest_adapter(adapter)
    first = fetch(f"{REMOTE}/haiku", cache, digest)
    fsspec.filesystem("memory").rm("/bucket", recursive=True)
    assert fetch(f"{REMOTE}/haiku", cache, digest) == first


def test_wrong_digest_refused(adapter: Path, cache: Path, tmp_path: Path) -> None:
    deployed = digest_adapter(adapter)
    changed = make_adapter(tmp_path / "changed" / "haiku", fill=2.0)
    upload(changed, f"{REMOTE}/haiku")
    with pytest.raises(ArtifactUnavailable, match=r"haiku: its bytes have the digest .* not .* deploy"):
        fetch(f"{REMOTE}/haiku", cache, deployed)
    assert list(cache.iterdir()) == []


def test_changed_adapter_cached_separately(adapter: Path, cache: Path, tmp_path: Path) -> None:
    upload(adapter, f"{REMOTE}/haiku")
    old = fetch(f"{REMOTE}/haiku", cache)
    upload(make_adapter(tmp_path / "changed" / "haiku", fill=2.0), f"{REMOTE}/haiku")
    new = fetch(f"{REMOTE}/haiku", cache)
    assert old != new
    assert digest_adapter(old) == digest_adapter(adapter)


def test_concurrent_fetches_get_whole_folder(adapter: Path, cache: Path) -> None:
    url = f"local://{adapter}"  # the memory backend is not safe to read from many threads
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: fetch(url, cache), range(16)))
    assert found == {cache / digest_adapter(adapter)}
    assert [entry.name for entry in cache.iterdir()] == [digest_adapter(adapter)]


def test_base_model_fetched_once_without_code(cache: Path) -> None:
    filesystem = fsspec.filesystem("memory")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "pytorch_model.bin", "modeling.py"):
        filesystem.pipe(f"/bucket/base/{name}", b"{}")
    found = fetch(f"{REMOTE}/base", cache)
    assert {file.name for file in found.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    marker = found / "config.json"
    before = marker.stat().st_mtime_ns
    assert fetch(f"{REMOTE}/base", cache) == found
    assert marker.stat().st_mtime_ns == before


def test_incomplete_adapter_refused(adapter: Path, cache: Path) -> None:
    (adapter / WEIGHTS_FILE).unlink()
    upload(adapter, f"{REMOTE}/haiku")
    with pytest.raises(ArtifactUnavailable, match=r"memory://bucket/haiku has no adapter_model\.safetensors"):
        fetch(f"{REMOTE}/haiku", cache)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nowhere/at/all", "no such folder"),
        ("memory://bucket/absent", "there is no such folder"),
        ("gopher://old/net", "[Pp]rotocol not known"),
        ("http://127.0.0.1:9/adapter", "127.0.0.1"),
    ],
)
def test_unavailable_artifact_named_with_reason(path: str, reason: str, cache: Path) -> None:
    with pytest.raises(ArtifactUnavailable, match=reason) as refused:
        fetch(path, cache)
    assert path in str(refused.value)


def test_empty_folder_refused(cache: Path) -> None:
    fsspec.filesystem("memory").pipe("/bucket/empty/readme.md", b"")
    with pytest.raises(ArtifactUnavailable, match="neither a model nor an adapter"):
        fetch(f"{REMOTE}/empty", cache)


def test_interrupted_copy_not_published(adapter: Path, cache: Path) -> None:
    upload(adapter, f"{REMOTE}/haiku")
    found = fetch(f"{REMOTE}/haiku", cache)
    shutil.rmtree(found)
    (cache / found.name).write_text("a file in the way")
    with pytest.raises(NotADirectoryError):
        fetch(f"{REMOTE}/haiku", cache)
