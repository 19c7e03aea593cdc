"""Batched LoRA in Triton, over tiles of rows that share an adapter slot.

The grid depends on shapes alone, so that a captured graph serves any adapters; an empty tile returns at once.
A tile reads no more ranks than its own adapter has in the module.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployments.inference.native.tiles import TILE_ROWS

RANK_BLOCK = 16
IN_BLOCK = 128
OUT_BLOCK = 128


def shrink(x: Tensor, a: Tensor, ranks: Tensor, tiles: Tensor) -> Tensor:
    """``x [T, in]``, ``a [slots, rank, members, in]`` -> ``[T, members, rank]``.

    ``ranks [slots, members]`` and ``tiles [3, n]`` (slot, first row, rows) are integers. Written are the rows of the
    tiles, up to their slot's rank, rounded up to ``RANK_BLOCK``; the rest is undefined.
    """
    assert x.stride(1) == a.stride(3) == ranks.stride(1) == tiles.stride(1) == 1
    rank, members, width = a.shape[1:]
    h = torch.empty(x.shape[0], members, rank, dtype=x.dtype, device=x.device)
    grid = (tiles.shape[1], members, triton.cdiv(rank, RANK_BLOCK))
    _shrink[grid](
        x, a, h, ranks, tiles, tiles.shape[1], rank, width,
        x.stride(0), a.stride(0), a.stride(1), a.stride(2), h.stride(0), h.stride(1), ranks.stride(0),
        ROWS=TILE_ROWS, RANKS=RANK_BLOCK, WIDTH=IN_BLOCK,
    )  # fmt: skip
    return h


def expand(y: Tensor, h: Tensor, b: Tensor, ranks: Tensor, tiles: Tensor) -> None:
    """Add one module's product to ``y [T, out]``: ``h [T, rank]``, ``b [slots, rank, out]``, ``ranks [slots]``."""
    assert y.stride(1) == h.stride(1) == b.stride(2) == tiles.stride(1) == 1
    width = b.shape[2]
    _expand[(tiles.shape[1], triton.cdiv(width, OUT_BLOCK))](
        y, h, b, ranks, tiles, tiles.shape[1], width,
        y.stride(0), h.stride(0), b.stride(0), b.stride(1), ranks.stride(0),
        ROWS=TILE_ROWS, RANKS=RANK_BLOCK, WIDTH=OUT_BLOCK,
    )  # fmt: skip


@triton.jit
def _shrink(
    x, a, h, ranks, tiles, tiles_max, rank_max, width,
    x_row, a_slot, a_rank, a_member, h_row, h_member, ranks_slot,
    ROWS: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute one block of ranks of one module for one tile."""
    tile, member = tl.program_id(0), tl.program_id(1)
    slot = tl.load(tiles + tile)
    begin = tl.load(tiles + tiles_max + tile)
    count = tl.load(tiles + 2 * tiles_max + tile)
    rank = tl.load(ranks + slot * ranks_slot + member)
    r = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    if count == 0:
        return
    if tl.program_id(2) * RANKS >= rank:
        return
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    x_at = x + (begin + row)[:, None] * x_row
    a_at = a + slot * a_slot + member * a_member + r[None, :] * a_rank
    product = tl.zeros((ROWS, RANKS), dtype=tl.float32)
    for first in range(0, width, WIDTH):
        c = first + column
        x_tile = tl.load(x_at + c[None, :], mask=(row < count)[:, None] & (c < width)[None, :], other=0.0)
        a_tile = tl.load(a_at + c[:, None], mask=(r < rank)[None, :] & (c < width)[:, None], other=0.0)
        product = tl.dot(x_tile, a_tile, product, input_precision="ieee")
    h_at = h + (begin + row)[:, None] * h_row + member * h_member + r[None, :]
    tl.store(h_at, product.to(h.dtype.element_ty), mask=(row < count)[:, None] & (r < rank_max)[None, :])


@triton.jit
def _expand(
    y, h, b, ranks, tiles, tiles_max, width,
    y_row, h_row, b_slot, b_rank, ranks_slot,
    ROWS: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add one block of columns for one tile. No two programs write the same element."""
    tile = tl.program_id(0)
    slot = tl.load(tiles + tile)
    begin = tl.load(tiles + tiles_max + tile)
    count = tl.load(tiles + 2 * tiles_max + tile)
    rank = tl.load(ranks + slot * ranks_slot)
    if count == 0:
        return
    if rank == 0:
        return
    row, c = tl.arange(0, ROWS), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    product = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for first in range(0, rank, RANKS):
        r = first + tl.arange(0, RANKS)
        h_at = h + (begin + row)[:, None] * h_row + r[None, :]
        h_tile = tl.load(h_at, mask=(row < count)[:, None] & (r < rank)[None, :], other=0.0)
        b_at = b + slot * b_slot + r[:, None] * b_rank + c[None, :]
        b_tile = tl.load(b_at, mask=(r < rank)[:, None] & (c < width)[None, :], other=0.0)
        product = tl.dot(h_tile, b_tile, product, input_precision="ieee")
    y_at = y + (begin + row)[:, None] * y_row + c[None, :]
    mask = (row < count)[:, None] & (c < width)[None, :]
    base = tl.load(y_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_at, (base + product).to(y.dtype.element_ty), mask=mask)
