"""Fetch model and adapter folders to this machine: local paths are used as they are, URLs are cached.

An adapter is cached under the digest of its bytes, so what the cache has under a digest is what was deployed under it.
"""

import hashlib
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import fsspec

from deployments.inference.adapters import CONFIG_FILE, MAX_WEIGHTS_BYTES, WEIGHTS_FILE, digest_adapter
from deployments.inference.request import AdapterRejected

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
Listed = Mapping[str, object]
"""What an fsspec backend lists about one file."""
MODEL_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt")
"""The only files of a base model that are fetched: no pickles and no code."""

BACKEND_ERRORS: Mapping[str, str] = {
    "aiohttp": "ClientError",
    "botocore.exceptions": "BotoCoreError",
    "google.auth.exceptions": "GoogleAuthError",
    "gcsfs.retry": "HttpError",
    "azure.core.exceptions": "AzureError",
}
"""Modules of fsspec's backends whose errors are not an OSError, and the base class of those errors."""


class ArtifactUnavailable(Exception):
    """A model or adapter folder cannot be fetched; the message names it and says why."""


def is_url(path: str) -> bool:
    """Whether the path must be fetched. A one-letter scheme is a Windows drive."""
    return len(urlsplit(path).scheme) > 1 and urlsplit(path).scheme != "file"


def local_path(path: str) -> Path:
    """A local folder, with or without ``file://``, with ``~`` expanded."""
    return Path(path.removeprefix("file://")).expanduser()


def fetch(path: str, cache_dir: Path, digest: str = "", *, without_weights: bool = False) -> Path:
    """The local folder of a base model or an adapter.

    ``digest``, for adapters, is checked against the fetched bytes; a cached copy of that digest is returned without
    asking the network. A local folder is returned unread: the engine checks the digest when it loads the adapter.
    ``without_weights`` leaves out a base model's tensors.

    Raises:
        ArtifactUnavailable: the folder is missing or not reachable, or its bytes have another digest.
    """
    if not is_url(path):
        folder = local_path(path)
        if not folder.is_dir():
            raise ArtifactUnavailable(f"{path}: there is no such folder (looked in {folder.absolute()})")
        return folder
    if digest and (cached := cache_dir / digest).is_dir():
        return cached
    return _fetch_url(path, cache_dir, digest, without_weights)


def _fetch_url(url: str, cache_dir: Path, digest: str, without_weights: bool) -> Path:
    """Download into the cache. Many processes may do it at once: each publishes a whole folder or nothing."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _named_errors(url):
        filesystem, root = fsspec.core.url_to_fs(url)
        files = _choose(url, filesystem.ls(root, detail=True), without_weights)
    is_adapter = CONFIG_FILE in files
    found = cache_dir / f"fetched-{_listing_key(url, files)}"
    if not digest and not is_adapter and found.is_dir():
        return found
    staging = Path(tempfile.mkdtemp(prefix="staging-", dir=cache_dir))
    try:
        with _named_errors(url):
            for name, info in files.items():
                filesystem.get_file(str(info["name"]), str(staging / name))
        _verify(url, staging, digest)
        return _publish(staging, cache_dir / _digest(url, staging) if is_adapter else found)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _choose(url: str, listing: Iterable[Listed], without_weights: bool) -> dict[str, Listed]:
    """The files to fetch, by name: an adapter's two, or those of a base model."""
    files = {PurePosixPath(str(info["name"])).name: info for info in listing if info.get("type") == "file"}
    if CONFIG_FILE in files:
        files = {name: info for name, info in files.items() if name in ADAPTER_FILES}
        if int(str(files.get(WEIGHTS_FILE, {}).get("size") or 0)) > MAX_WEIGHTS_BYTES:
            raise ArtifactUnavailable(f"{url}: {WEIGHTS_FILE} is larger than {MAX_WEIGHTS_BYTES} bytes")
        return files
    suffixes = tuple(s for s in MODEL_SUFFIXES if not (without_weights and s == ".safetensors"))
    files = {name: info for name, info in files.items() if name.endswith(suffixes)}
    if not files:
        raise ArtifactUnavailable(f"{url}: the folder has neither a model nor an adapter")
    return files


def _listing_key(url: str, files: Mapping[str, Listed]) -> str:
    """A key of a folder's content by names, sizes and the backend's own version marks: a changed file changes it."""
    marks = ("size", "ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "blob_id", "created")
    lines = [url] + [f"{name} {[str(info.get(mark)) for mark in marks]}" for name, info in sorted(files.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _publish(staging: Path, target: Path) -> Path:
    """Rename into place. Another process may have done so first, with the same bytes."""
    staging.chmod(0o755)
    try:
        os.rename(staging, target)
    except OSError:
        if not target.is_dir():
            raise
    return target


def _verify(path: str, folder: Path, digest: str) -> None:
    if digest and (has := _digest(path, folder)) != digest:
        raise ArtifactUnavailable(
            f"{path}: its bytes have the digest {has[:12]}…, not {digest[:12]}…: "
            "it changed since it was deployed; run `farebox deploy` again"
        )


def _digest(path: str, folder: Path) -> str:
    try:
        return digest_adapter(folder)
    except AdapterRejected as error:
        raise ArtifactUnavailable(str(error).replace(str(folder), path)) from error


@contextmanager
def _named_errors(url: str) -> Iterator[None]:
    """Raise ArtifactUnavailable for every error of an fsspec backend."""
    try:
        yield
    except ImportError as error:
        hint = f"install the fsspec backend for {urlsplit(url).scheme}://"
        raise ArtifactUnavailable(f"{url}: {error}: {hint}") from error
    except FileNotFoundError as error:
        raise ArtifactUnavailable(f"{url}: there is no such folder") from error
    except _backend_errors() as error:
        raise ArtifactUnavailable(f"{url}: {error or type(error).__name__}") from error


def _backend_errors() -> tuple[type[Exception], ...]:
    """The errors that fsspec raises, and those of the backends that are loaded."""
    loaded = (name for name in BACKEND_ERRORS if name in sys.modules)
    own = (getattr(importlib.import_module(name), BACKEND_ERRORS[name]) for name in loaded)
    return (OSError, ValueError, *own)
