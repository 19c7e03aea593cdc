"""Checks the base model's configuration and every adapter's files, and whether they fit together."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.checking.findings import CheckedModel, show_price
from deployments.config import FareboxArgs, ModelEntry
from deployments.inference.adapters import AdapterInfo, LinearShape, inspect_adapter
from deployments.inference.native.model import linear_shapes, read_config
from deployments.inference.request import AdapterRejected, ModelRejected
from deployments.replica.artifacts import ArtifactUnavailable, fetch, is_url, local_path

ADAPTER_CACHE = ".farebox/adapters"
"""The folder for downloaded adapters if the file's own `adapter_cache_dir` cannot be read."""
DEMO_HINT = "`python -m cluster.demo.models` makes the demo models"


class BaseRefused(Exception):
    """The base model cannot be served."""


def real_path(path: str, folder: Path) -> str:
    """A URL unchanged; a local path as an absolute one, relative to the folder of the file."""
    return path if is_url(path) else str((folder / local_path(path)).absolute())


@dataclass(frozen=True, slots=True)
class Base:
    """What adapters must fit."""

    linears: Mapping[str, LinearShape]


def open_base(args: FareboxArgs, folder: Path) -> Base:
    """Read the base model's configuration, without its weights.

    Raises:
        BaseRefused: it does not exist, or the engine cannot serve it.
    """
    path = real_path(args.model.path, folder)
    try:
        local = fetch(path, folder / args.adapter_cache_dir, without_weights=True)
        context = getattr(read_config(local), "max_position_embeddings", None)
        linears = linear_shapes(local)
    except ArtifactUnavailable as error:
        hint = f". {DEMO_HINT}" if ".farebox" in path else ""
        raise BaseRefused(f"{error}{hint}") from error
    except (ModelRejected, ValueError, OSError) as error:
        raise BaseRefused(str(error)) from error
    wanted = args.engine.max_context_tokens
    if context is not None and wanted > context:
        raise BaseRefused(f"max_context_tokens is {wanted}, but the base model has {context} positions: lower it")
    return Base(linears)


def open_adapter(entry: ModelEntry, args: FareboxArgs | None, base: Base | None, folder: Path) -> CheckedModel:
    """Read all of an adapter and check it; ``problem`` says what is wrong with it."""
    try:
        info = _inspect(entry, args, base, folder)
    except (ArtifactUnavailable, AdapterRejected) as error:
        return checked(entry, problem=str(error))
    if entry.digest and entry.digest != info.digest:
        problem = (
            f"`digest` is {entry.digest[:12]}…, but that of its files is {info.digest[:12]}…: remove or correct it"
        )
        return checked(entry, info, problem)
    return checked(entry, info)


def _inspect(entry: ModelEntry, args: FareboxArgs | None, base: Base | None, folder: Path) -> AdapterInfo:
    cache = folder / (args.adapter_cache_dir if args else ADAPTER_CACHE)
    local = fetch(real_path(entry.path, folder), cache, entry.digest)
    return inspect_adapter(
        local, linears=base.linears if base else None, max_rank=args.engine.max_adapter_rank if args else None
    )


def checked(entry: ModelEntry, info: AdapterInfo | None = None, problem: str = "") -> CheckedModel:
    """The line of an entry in the table."""
    return CheckedModel(
        id=entry.id,
        path=entry.path,
        price=show_price(entry.price),
        visibility=entry.visibility if isinstance(entry.visibility, str) else ", ".join(entry.visibility) or "nobody",
        digest=info.digest if info else "",
        rank=info.rank if info else 0,
        weight_bytes=info.weight_bytes if info else 0,
        problem=problem,
    )
