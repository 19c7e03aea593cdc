"""The archive: old stream entries in Parquet files, by date, readable by any tool.

The same entry may stand in two files after a crash: its stream id shows that it is one.
"""

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime
from pathlib import PurePosixPath
from typing import IO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from billing.archive.errors import ArchiveUnavailable
from billing.ledger.journal import Entry, order
from billing.store.keys import Shard
from billing.usage import TenantId

MS_PER_SECOND = 1_000
_ENTRY = ("id", "kind", "tenant", "payload", "chain")
"""Columns that an entry is made of; the others repeat its payload for those who query the files."""


@dataclass(frozen=True, slots=True)
class _Line:
    """One entry as it stands in a file. Amounts are nanos; columns of usage are 0 or empty for a grant."""

    id: str
    kind: str
    tenant: str
    occurred_at_ms: int
    adapter: str
    status: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    requests: int
    compute_ms: int
    list_nanos: int
    charged_nanos: int
    overage_nanos: int
    payload: str
    chain: str


_SCHEMA = pa.schema([(f.name, pa.int64() if f.type is int else pa.string()) for f in fields(_Line)])


@dataclass(frozen=True, slots=True)
class _File:
    """``s07_1700000000000-0_1700000009999-3.parquet``: a shard's entries from one stream id to another."""

    path: str
    first: str
    last: str

    @classmethod
    def read(cls, path: str) -> "_File":
        _, first, last = PurePosixPath(path).stem.split("_")
        return cls(path, first, last)

    def overlaps(self, start_ms: int, end_ms: int | None) -> bool:
        return order(self.last)[0] >= start_ms and (end_ms is None or order(self.first)[0] < end_ms)


class Archive:
    """Files under one local path or fsspec URL. Every call blocks: run it on a thread."""

    def __init__(self, url: str) -> None:
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ArchiveUnavailable(f"archive {url}: {error}") from error
        self.url = str(self._fs.unstrip_protocol(self._root))

    def write(self, shard: Shard, entries: Sequence[Entry]) -> int:
        """Keep these entries of a shard, in order; durable on return. How many files that made.

        Raises:
            UnreadableEntry: one of them is none of ours; nothing of its day was written.
            ArchiveUnavailable: some may have been written; write all of them again.
        """
        days: defaultdict[date, list[Entry]] = defaultdict(list)
        for entry in entries:
            days[_day(entry.id)].append(entry)
        for day, group in days.items():
            folder = f"{self._root}/date={day.isoformat()}"
            name = f"s{shard.number:02d}_{group[0].id}_{group[-1].id}.parquet"
            table = pa.Table.from_pylist([_line(entry) for entry in group], schema=_SCHEMA)
            try:
                self._fs.makedirs(folder, exist_ok=True)
                self._put(folder, name, table)
            except OSError as error:
                raise ArchiveUnavailable(f"archive {self.url}: {error}") from error
        return len(days)

    def _put(self, folder: str, name: str, table: pa.Table) -> None:
        """A file appears under its name only when it is whole."""
        draft = f"{folder}/.{name}.draft"
        with self._fs.open(draft, "wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            self._sync(file)
        self._fs.mv(draft, f"{folder}/{name}")
        if isinstance(self._fs, LocalFileSystem):
            for name_of_folder in (folder, self._root):
                _sync_folder(name_of_folder)

    def _sync(self, file: IO[bytes]) -> None:
        if isinstance(self._fs, LocalFileSystem):
            os.fsync(file.fileno())

    def read(
        self, shard: Shard, start_ms: int = 0, end_ms: int | None = None, tenant: TenantId | None = None
    ) -> list[Entry]:
        """Entries from ``start_ms`` until before ``end_ms``, each once, in the order they took effect.

        Raises:
            ArchiveUnavailable: a file cannot be read.
        """
        found: dict[str, Entry] = {}
        for file in self._files(shard):
            if file.overlaps(start_ms, end_ms):
                found |= self._entries(file, tenant)
        end = math.inf if end_ms is None else end_ms
        return [e for e in sorted(found.values(), key=_place) if start_ms <= _place(e)[0] < end]

    def newest_records(self, shard: Shard, tenant: TenantId, before: str, count: int) -> list[Entry]:
        """Up to ``count`` usage entries of a tenant, newest first, older than the stream id ``before``.

        Raises:
            ArchiveUnavailable: a file cannot be read.
        """
        found: dict[str, Entry] = {}
        newest: list[Entry] = []
        for file in sorted(self._files(shard), key=lambda file: order(file.last), reverse=True):
            if len(newest) == count and order(file.last) < _place(newest[-1]):
                break
            older = self._entries(file, tenant).values()
            found |= {entry.id: entry for entry in older if entry.is_usage and _place(entry) < order(before)}
            newest = sorted(found.values(), key=_place, reverse=True)[:count]
        return newest

    def _entries(self, file: _File, tenant: TenantId | None) -> dict[str, Entry]:
        filters = None if tenant is None else [("tenant", "=", tenant)]
        try:
            with self._fs.open(file.path, "rb") as source:
                table = pq.read_table(source, columns=list(_ENTRY), filters=filters)
        except (OSError, pa.ArrowInvalid) as error:
            raise ArchiveUnavailable(f"archive {self.url}: {file.path}: {error}") from error
        columns = (table.column(name).to_pylist() for name in _ENTRY)
        rows = zip(*columns, strict=True)
        return {id_: Entry(id_, kind, TenantId(of), payload, chain) for id_, kind, of, payload, chain in rows}

    def last(self, shard: Shard) -> str:
        """The newest stream id of a shard that is archived; ``0-0`` where nothing is."""
        return max((file.last for file in self._files(shard)), key=order, default="0-0")

    def _files(self, shard: Shard) -> list[_File]:
        return sorted(
            (_File.read(path) for path in self._fs.glob(f"{self._root}/date=*/s{shard.number:02d}_*.parquet")),
            key=lambda file: order(file.first),
        )


def _day(entry_id: str) -> date:
    return datetime.fromtimestamp(order(entry_id)[0] // MS_PER_SECOND, UTC).date()


def _place(entry: Entry) -> tuple[int, int]:
    return order(entry.id)


def _line(entry: Entry) -> dict[str, object]:
    whole: dict[str, object] = {name: 0 if _SCHEMA.field(name).type == pa.int64() else "" for name in _SCHEMA.names}
    whole |= {"id": entry.id, "kind": entry.kind, "tenant": entry.tenant, "payload": entry.payload}
    whole["chain"] = entry.chain
    whole["occurred_at_ms"] = order(entry.id)[0]
    if not entry.is_usage:
        return whole
    record = entry.record()
    usage = record.usage
    return whole | {
        "occurred_at_ms": record.occurred_at_ms,
        "adapter": record.adapter,
        "status": record.status.value,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        "requests": usage.requests,
        "compute_ms": usage.compute_ms,
        "list_nanos": record.list_nanos,
        "charged_nanos": record.charged_nanos,
        "overage_nanos": record.overage_nanos,
    }


def _sync_folder(path: str) -> None:
    """A new name is durable when its folder is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
