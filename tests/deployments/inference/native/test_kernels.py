"""The GPU's kernels compute what plain torch does. Without a GPU they run in Triton's interpreter."""

from collections.abc import Sequence as Seq

import pytest
import torch
from torch import Tensor

from deployments.inference.native.tiles import columns, lora_tiles, lora_tiles_max

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="Triton is not installed: pip install triton==3.8.0")

from deployments.inference.native import kernels_attention, kernels_lora  # noqa: E402

pytestmark = pytest.mark.slow

SLOTS, RANK, MEMBERS, WIDTH, OUT = 7, 24, 3, 136, 144
"""No multiples of a kernel's blocks."""
SPREADS = {
    "one row each": dict.fromkeys(range(SLOTS), 1),
    "a full tile and a row": {2: 17},
    "empty slots between": {0: 3, 6: 2},
    "many tiles of one": {1: 40, 3: 1},
    "none": {},
}
RANKS = (8, 3, 24, 16, 0, 1, 17)


def tile_table(tiles: Seq[tuple[int, ...]], length: int, fields: int) -> Tensor:
    return torch.tensor(list(columns(tiles, length, fields)), device=DEVICE).view(fields, length)


class Lora:
    """Random factors that are not zero beyond their slot's rank, so that reading too much shows."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.a = torch.randn(SLOTS, RANK, MEMBERS, WIDTH, device=DEVICE).to(dtype)
        self.b = torch.randn(MEMBERS, SLOTS, RANK, OUT, device=DEVICE).to(dtype)
        self.ranks = torch.tensor(RANKS, device=DEVICE)[:, None].repeat(1, MEMBERS)
        self.ranks[0, 1] = 0

    def add(self, x: Tensor, ys: Tensor, tiles: Tensor) -> None:
        h = kernels_lora.shrink(x, self.a, self.ranks, tiles)
        for member in range(MEMBERS):
            kernels_lora.expand(ys[member], h[:, member], self.b[member], self.ranks[:, member], tiles)

    def expected(self, x: Tensor, ys: Tensor, owners: Seq[int]) -> Tensor:
        wanted = ys.double()
        for member in range(MEMBERS):
            for row, slot in enumerate(owners):
                rank = int(self.ranks[slot, member])
                h = x[row].double() @ self.a[slot, :rank, member].double().T
                wanted[member, row] += h @ self.b[member, slot, :rank].double()
        return wanted


def owners_of(rows_by_slot: dict[int, int]) -> list[int]:
    return [slot for slot in sorted(rows_by_slot) for _ in range(rows_by_slot[slot])]


@pytest.mark.parametrize("spread", SPREADS)
def test_lora_kernel_matches_each_rows_own_product(spread: str) -> None:
    lora, owners = Lora(), owners_of(SPREADS[spread])
    x, ys = torch.randn(len(owners) + 4, WIDTH, device=DEVICE), torch.randn(MEMBERS, len(owners) + 4, OUT).to(DEVICE)
    wanted, before = lora.expected(x, ys, owners), ys.clone()
    lora.add(x, ys, tile_table(lora_tiles(SPREADS[spread]), lora_tiles_max(len(x), SLOTS), 3))
    torch.testing.assert_close(ys.double(), wanted, atol=1e-3, rtol=1e-4)
    assert torch.equal(ys[:, len(owners) :], before[:, len(owners) :]), "rows of the base model are not touched"


def test_lora_kernel_computes_in_half_precision() -> None:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter multiplies bfloat16 as integers
    lora, owners = Lora(dtype), [0, 2, 2]
    x, ys = torch.randn(3, WIDTH).to(DEVICE, dtype), torch.zeros(MEMBERS, 3, OUT).to(DEVICE, dtype)
    wanted = lora.expected(x, ys, owners)
    lora.add(x, ys, tile_table(lora_tiles({0: 1, 2: 2}), 3, 3))
    assert (ys.double() - wanted).abs().max() <= 0.02 * wanted.abs().max()


def test_lora_kernel_reuses_buffers_for_more_adapters() -> None:
    lora = Lora()
    x, rows = torch.randn(SLOTS, WIDTH, device=DEVICE), SLOTS
    tiles = tile_table(lora_tiles({3: rows}), lora_tiles_max(rows, SLOTS), 3)
    for rows_by_slot in ({3: rows}, dict.fromkeys(range(SLOTS), 1), {}, {0: 2, 5: 5}):
        owners, ys = owners_of(rows_by_slot), torch.zeros(MEMBERS, rows, OUT, device=DEVICE)
        tiles.copy_(tile_table(lora_tiles(rows_by_slot), tiles.shape[1], 3))
        wanted = lora.expected(x, ys, owners)
        lora.add(x, ys, tiles)
        torch.testing.assert_close(ys.double(), wanted, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("slots", [1, 3, 16, 64])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 33, 128])
def test_lora_tiles_max_is_the_worst_case(rows: int, slots: int) -> None:
    most = 0
    for owners in range(1, min(rows, slots) + 1):
        alone = dict.fromkeys(range(1, owners), 1) | {0: rows - owners + 1}
        even = {slot: rows // owners + (slot < rows % owners) for slot in range(owners)}
        most = max(most, len(lora_tiles(alone)), len(lora_tiles(even)))
    assert most == lora_tiles_max(rows, slots)


def test_too_many_tiles_fail_an_assertion() -> None:
    with pytest.raises(AssertionError, match="more tiles"):
        list(columns(lora_tiles({0: 1, 1: 1}), 1, 3))


class Memory:
    """Keys and values of sequences in scattered blocks, with random numbers in the unused ones."""

    def __init__(self, lengths: Seq[int], kv_heads: int, dim: int, value_dim: int, block_size: int) -> None:
        torch.manual_seed(0)
        each = -(-max(lengths) // block_size)
        order = torch.randperm(len(lengths) * each + 2)[: len(lengths) * each]
        self.table = order.view(len(lengths), each).to(DEVICE)
        shape = (len(lengths) * each + 2, kv_heads, block_size)
        self.keys = torch.randn(*shape, dim, device=DEVICE)
        self.values = torch.randn(*shape, value_dim, device=DEVICE)

    def of(self, sequence: int, pool: Tensor) -> Tensor:
        """``[kv_heads, positions, dim]``."""
        return pool[self.table[sequence]].transpose(0, 1).flatten(1, 2)


def plain(
    query: Tensor, memory: Memory, tiles: Seq[tuple[int, ...]], softcap: float | None, window: int | None
) -> Tensor:
    heads, kv_heads = query.shape[1], memory.keys.shape[1]
    out = query.new_zeros(query.shape[0], heads, memory.values.shape[3])
    for sequence, begin, count, start in tiles:
        keys, values = memory.of(sequence, memory.keys), memory.of(sequence, memory.values)
        for row, position in ((begin + i, start + i) for i in range(count)):
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(heads):
                mine = head // (heads // kv_heads)
                scores = keys[mine, first : position + 1] @ query[row, head] * 0.3
                scores = scores if softcap is None else softcap * (scores / softcap).tanh()
                out[row, head] = scores.softmax(-1) @ values[mine, first : position + 1]
    return out


DECODES = [(0, 0, 1, 0), (1, 1, 1, 40), (2, 2, 1, 129), (3, 3, 1, 63)]
CHUNKS = [(2, 0, 16, 100), (2, 16, 3, 116), (0, 19, 1, 7), (1, 20, 9, 0)]
SHAPES = {
    "no sharing": (2, 2, 16, 16, 130),
    "two to one": (4, 2, 24, 24, 130),
    "all on one, above a program's": (12, 1, 16, 40, 130),
    "small blocks": (4, 2, 16, 16, 16),
    "blocks of no power of two": (4, 2, 16, 16, 24),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tiles", [DECODES, CHUNKS], ids=["decodes", "chunks"])
def test_attention_kernel_matches_plain_attention(tiles: list[tuple[int, ...]], shape: str) -> None:
    check(tiles, shape)


@pytest.mark.parametrize("tiles", [DECODES, CHUNKS], ids=["decodes", "chunks"])
@pytest.mark.parametrize(("softcap", "window"), [(2.0, None), (None, 5), (None, 70), (1.5, 20)])
def test_attention_kernel_applies_softcap_and_window(
    tiles: list[tuple[int, ...]], softcap: float | None, window: int | None
) -> None:
    check(tiles, "two to one", softcap, window)


def check(tiles: list[tuple[int, ...]], shape: str, softcap: float | None = None, window: int | None = None) -> None:
    heads, kv_heads, dim, value_dim, block_size = SHAPES[shape]
    memory = Memory([130] * 4, kv_heads, dim, value_dim, block_size)
    rows = sum(tile[2] for tile in tiles)
    query = torch.randn(heads, rows, dim, device=DEVICE).transpose(0, 1)
    got = kernels_attention.attend(
        query, memory.keys, memory.values, memory.table, tile_table(tiles, len(tiles) + 2, 4),
        queries=max(tile[2] for tile in tiles), scale=0.3, softcap=softcap, window=window,
    )  # fmt: skip
    torch.testing.assert_close(got, plain(query, memory, tiles, softcap, window), atol=1e-5, rtol=1e-4)
