"""Brings model and adapter folders to this machine: local paths as they are, URLs into a cache.

Knows fsspec and folders; judges no weights. An adapter is cached under the digest of its bytes, so
what lies in the cache under a digest is what was deployed under it.
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
"""What a backend tells of one file."""
MODEL_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt")
"""Of a base model's folder only these are fetched: no pickles and no code."""

BACKEND_ERRORS: Mapping[str, str] = {
    "aiohttp": "ClientError",
    "botocore.exceptions": "BotoCoreError",
    "google.auth.exceptions": "GoogleAuthError",
    "gcsfs.retry": "HttpError",
    "azure.core.exceptions": "AzureError",
}
"""Where fsspec's backends define errors that are no OSError."""


class ArtifactUnavailable(Exception):
    """A model or adapter folder cannot be had; the message names it and says why."""


def is_url(path: str) -> bool:
    """Is it something to fetch? A one-letter scheme is a Windows drive."""
    return len(urlsplit(path).scheme) > 1 and urlsplit(path).scheme != "file"


def local_path(path: str) -> Path:
    """A local folder as written, with or without ``file://``, its home expanded."""
    return Path(path.removeprefix("file://")).expanduser()


def fetch(path: str, cache_dir: Path, digest: str = "", *, without_weights: bool = False) -> Path:
    """The local folder of a base model or an adapter.

    ``digest``, for adapters, is what fetched bytes must have; a cached copy of that digest saves every
    look at the network. A local folder is returned unread: whoever loads it digests what it reads.
    ``without_weights`` leaves a base model's tensors where they are: its shapes stand in its config.

    Raises:
        ArtifactUnavailable: not there, not reachable, or its bytes are not those of ``digest``.
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
    """Download into the cache: whole or not at all, however many processes do it at once."""
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


def _choose(
    url: str, listing: Iterable[Mapping[str, object]], without_weights: bool
) -> dict[str, Mapping[str, object]]:
    """Files worth fetching by name: an adapter's two, or those of a base model."""
    files = {PurePosixPath(str(info["name"])).name: info for info in listing if info.get("type") == "file"}
    if CONFIG_FILE in files:
        files = {name: info for name, info in files.items() if name in ADAPTER_FILES}
        if int(str(files.get(WEIGHTS_FILE, {}).get("size") or 0)) > MAX_WEIGHTS_BYTES:
            raise ArtifactUnavailable(f"{url}: {WEIGHTS_FILE} is larger than {MAX_WEIGHTS_BYTES} bytes")
        return files
    suffixes = tuple(s for s in MODEL_SUFFIXES if not (without_weights and s == ".safetensors"))
    files = {name: info for name, info in files.items() if name.endswith(suffixes)}
    if not files:
        raise ArtifactUnavailable(f"{url}: neither a model nor an adapter is there")
    return files


def _listing_key(url: str, files: Mapping[str, Mapping[str, object]]) -> str:
    """What a folder at a URL holds, by names, sizes and the backend's own marks: a change is another key."""
    marks = ("size", "ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "blob_id", "created")
    lines = [url] + [f"{name} {[str(info.get(mark)) for mark in marks]}" for name, info in sorted(files.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _publish(staging: Path, target: Path) -> Path:
    """Rename into place; a process that was faster has put the same bytes there."""
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
    """Each backend fails in its own words: give them one name."""
    try:
        yield
    except ImportError as error:
        hint = f"install the fsspec backend for {urlsplit(url).scheme}://"
        raise ArtifactUnavailable(f"{url}: {error}: {hint}") from error
    except FileNotFoundError as error:
        raise ArtifactUnavailable(f"{url}: nothing is there") from error
    except _backend_errors() as error:
        raise ArtifactUnavailable(f"{url}: {error or type(error).__name__}") from error


def _backend_errors() -> tuple[type[Exception], ...]:
    """What fsspec raises, and the own errors of the backends in use."""
    loaded = (name for name in BACKEND_ERRORS if name in sys.modules)
    own = (getattr(importlib.import_module(name), BACKEND_ERRORS[name]) for name in loaded)
    return (OSError, ValueError, *own)
