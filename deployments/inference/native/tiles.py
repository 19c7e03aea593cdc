"""Divide a step's rows into tiles of one adapter, or of one sequence, for kernels whose grid has a fixed size."""

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq

from deployments.inference.native.sequence import Span

TILE_ROWS = 16
"""The most rows of a tile: the fewest that a tensor core multiplies."""


def lora_tiles(rows_by_slot: Mapping[int, int]) -> list[tuple[int, int, int]]:
    """``(slot, first row, rows)`` of each tile, for rows sorted by slot."""
    tiles, begin = [], 0
    for slot in sorted(rows_by_slot):
        end = begin + rows_by_slot[slot]
        tiles += [(slot, row, min(TILE_ROWS, end - row)) for row in range(begin, end, TILE_ROWS)]
        begin = end
    return tiles


def lora_tiles_max(rows: int, slots: int) -> int:
    """The most tiles that this many rows can need, whichever adapters they have.

    A slot with c rows needs ``1 + (c - 1) // TILE_ROWS``, so the worst case is that every slot has a row.
    """
    owners = min(rows, slots)
    return owners + (rows - owners) // TILE_ROWS


def query_tiles(spans: Seq[Span], most: int) -> list[tuple[int, int, int, int]]:
    """``(KV slot, first row, rows, position of the first row)`` of each tile, none with more than ``most`` rows."""
    tiles, begin = [], 0
    for span in spans:
        count = len(span.token_ids)
        for row in range(0, count, most):
            tiles.append((span.kv_slot, begin + row, min(most, count - row), span.start + row))
        begin += count
    return tiles


def buckets(most: int) -> list[int]:
    """Batch sizes that get a CUDA graph, up to ``most``; a step is padded to the next one."""
    return sorted({size for size in (1, 2, 4, 8, *range(16, most, 16)) if size < most} | {most})


def columns(tiles: Seq[tuple[int, ...]], length: int, fields: int) -> Iterator[int]:
    """The tiles field by field, each field padded with zeros to ``length``: a tile of 0 rows is empty."""
    assert len(tiles) <= length, "more tiles than the step has room for"
    for field in range(fields):
        yield from (tile[field] for tile in tiles)
        yield from (0 for _ in range(length - len(tiles)))
