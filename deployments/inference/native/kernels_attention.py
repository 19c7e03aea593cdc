"""Attention in Triton over a paged KV cache, for decodes and chunks of prompts.

A tile is a few tokens of one sequence, whose keys the block table finds. The grid depends on shapes alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

QUERIES = 16
"""The most tokens of a tile in a step with prompts; in a step of decodes it is 1."""
HEADS = 8
"""The most query heads of one program, which share a pass over their keys."""
KEYS = 64


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    tiles: Tensor,
    *,
    queries: int,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """``query [T, heads, dim]`` -> ``[T, heads, value_dim]``; rows in no tile are undefined.

    ``keys`` and ``values`` ``[blocks, kv_heads, block size, dim]``; ``table [sequences, blocks of one]`` of integers;
    ``tiles [4, n]`` (row of the table, first row, rows, position of the first row), none above ``queries`` rows.
    """
    assert query.stride(2) == keys.stride(3) == values.stride(3) == table.stride(1) == tiles.stride(1) == 1
    rows, heads, dim = query.shape
    kv_heads, block_size, value_dim = keys.shape[1], keys.shape[2], values.shape[3]
    per_kv = heads // kv_heads
    together = min(per_kv, HEADS)
    parts = triton.cdiv(per_kv, together)
    out = torch.empty(rows, heads, value_dim, dtype=query.dtype, device=query.device)
    _attend[(tiles.shape[1], kv_heads * parts)](
        query, keys, values, out, table, tiles, tiles.shape[1],
        scale, softcap or 0.0, window or 0, block_size, dim, value_dim, per_kv, parts,
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), keys.stride(2),
        values.stride(0), values.stride(1), values.stride(2), out.stride(0), out.stride(1), table.stride(0),
        HAS_SOFTCAP=softcap is not None, HAS_WINDOW=window is not None, TOGETHER=together,
        ROWS=max(16, triton.next_power_of_2(queries * together)), KEYS=KEYS,
        DIM=max(16, triton.next_power_of_2(dim)), VALUE_DIM=max(16, triton.next_power_of_2(value_dim)),
    )  # fmt: skip
    return out


@triton.jit
def _attend(
    query, keys, values, out, table, tiles, tiles_max,
    scale, softcap, window, block_size, dim, value_dim, per_kv, parts,
    query_row, query_head, keys_block, keys_head, keys_place,
    values_block, values_head, values_place, out_row, out_head, table_row,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, TOGETHER: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Compute one tile for some query heads of a KV head: row m is token ``m // TOGETHER`` of head ``m % TOGETHER``."""
    tile, kv_head, part = tl.program_id(0), tl.program_id(1) // parts, tl.program_id(1) % parts
    sequence = tl.load(tiles + tile)
    begin = tl.load(tiles + tiles_max + tile)
    count = tl.load(tiles + 2 * tiles_max + tile)
    start = tl.load(tiles + 3 * tiles_max + tile)
    if count == 0:
        return
    m, d, e = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, VALUE_DIM)
    token, head = m // TOGETHER, part * TOGETHER + m % TOGETHER
    is_row = (token < count) & (head < per_kv)
    position, head = start + token, kv_head * per_kv + head
    query_at = query + (begin + token)[:, None] * query_row + head[:, None] * query_head + d[None, :]
    q = tl.load(query_at, mask=is_row[:, None] & (d < dim)[None, :], other=0.0)
    best = tl.full((ROWS,), -1e30, dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    attended = tl.zeros((ROWS, VALUE_DIM), dtype=tl.float32)
    end = start + count
    first = start * 0
    if HAS_WINDOW:
        first = tl.maximum(start - window + 1, 0)
    for place in range(first, end, KEYS):
        n = place + tl.arange(0, KEYS)
        block = tl.load(table + sequence * table_row + n // block_size, mask=n < end, other=0)
        k_at = keys + (block * keys_block + kv_head * keys_head + (n % block_size) * keys_place)[None, :] + d[:, None]
        k = tl.load(k_at, mask=(n < end)[None, :] & (d < dim)[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if HAS_SOFTCAP:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)  # tanh
        seen = n[None, :] <= position[:, None]
        if HAS_WINDOW:
            seen = seen & (n[None, :] > position[:, None] - window)
        # Not -inf, which would give NaN in a row with no score yet; its first real score scales the sum so far to zero.
        scores = tl.where(seen, scores, -1e30)
        better = tl.maximum(best, tl.max(scores, 1))
        weights, kept = tl.exp(scores - better[:, None]), tl.exp(best - better)
        v_at = values + (block * values_block + kv_head * values_head + (n % block_size) * values_place)[:, None]
        v = tl.load(v_at + e[None, :], mask=(n < end)[:, None] & (e < value_dim)[None, :], other=0.0)
        attended = attended * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * kept + tl.sum(weights, 1)
        best = better
    out_at = out + (begin + token)[:, None] * out_row + head[:, None] * out_head + e[None, :]
    attended = attended / total[:, None]
    tl.store(out_at, attended.to(out.dtype.element_ty), mask=is_row[:, None] & (e < value_dim)[None, :])
