"""Steps on a GPU: Triton kernels over tiles of rows, one copy to the device each step, CUDA graphs for decodes.

Without graphs it runs on a CPU too, in Triton's interpreter.
"""

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import chain, product, repeat

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deployments.inference.native import kernels_attention, kernels_lora
from deployments.inference.native.attention import KvCache, Scoring
from deployments.inference.native.lora import LoraLinear, LoraPool
from deployments.inference.native.sequence import Span
from deployments.inference.native.settings import KvSizes
from deployments.inference.native.tiles import buckets, columns, lora_tiles, lora_tiles_max, query_tiles

WARM_UPS = 2
"""Runs before a capture, in which kernels are compiled and libraries allocate their workspaces."""


class StepBuffers:
    """All integers that a step reads, in contiguous memory at fixed addresses, as a CUDA graph needs."""

    def __init__(self, rows: int, attention_tiles: int, adapter_tiles: int, device: torch.device) -> None:
        self.rows = rows
        sizes = [rows, rows, rows, 4 * attention_tiles, 3 * adapter_tiles]
        self._host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self.tokens, self.positions, self.kv_slots, attention, adapters = torch.split(self._device, sizes)
        self.attention_tiles = attention.view(4, attention_tiles)
        self.adapter_tiles = adapters.view(3, adapter_tiles)

    def fill(self, spans: Seq[Span], queries: int) -> None:
        """Write a step, whose spans have ``rows`` rows. The step before must have ended."""
        tiles = lora_tiles(rows_by_slot(spans))
        numbers = chain(
            (token for span in spans for token in span.token_ids),
            (span.start + i for span in spans for i in range(len(span.token_ids))),
            chain.from_iterable(repeat(span.kv_slot, len(span.token_ids)) for span in spans),
            columns(query_tiles(spans, queries), self.attention_tiles.shape[1], 4),
            columns(tiles, self.adapter_tiles.shape[1], 3),
        )
        self._host.copy_(torch.tensor(list(numbers)))
        self._device.copy_(self._host, non_blocking=True)


class BlockTable:
    """The blocks of each slot's sequence, at a fixed address; unused entries are the filler block."""

    def __init__(self, slots: int, width: int, filler: int, device: torch.device) -> None:
        self._host = torch.full((slots, width), filler, pin_memory=device.type == "cuda")
        self._written: dict[int, tuple[int, ...]] = {}
        self.blocks = self._host.to(device)
        """``[slots, width]``"""

    def write(self, spans: Seq[Span]) -> None:
        """Update the rows that these spans read. The step before must have ended."""
        changed = [span for span in spans if self._written.get(span.kv_slot) is not span.blocks]
        for span in changed:
            self._host[span.kv_slot, : len(span.blocks)] = torch.tensor(span.blocks)
            self._written[span.kv_slot] = span.blocks
        if changed:
            self.blocks.copy_(self._host, non_blocking=True)


@dataclass(slots=True)
class TiledAttention:
    """An ``AttentionStep`` on the kernels."""

    pool: KvCache
    buffers: StepBuffers
    table: Tensor
    """A ``BlockTable``'s blocks."""
    queries: int
    _slot_mappings: dict[int, Tensor] = field(default_factory=dict)

    def slot_mapping(self, kv_heads: int) -> Tensor:
        if kv_heads not in self._slot_mappings:
            positions, size = self.buffers.positions, self.pool.block_tokens
            blocks = self.table[self.buffers.kv_slots, positions // size]
            self._slot_mappings[kv_heads] = self.pool.slot_mapping(blocks, positions % size, kv_heads)
        return self._slot_mappings[kv_heads]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> Tensor:
        return kernels_attention.attend(
            query, keys, values, self.table, self.buffers.attention_tiles,
            queries=self.queries, scale=scoring.scale, softcap=scoring.softcap, window=scoring.window,
        )  # fmt: skip


@dataclass(slots=True)
class TiledLoraDelta:
    """A ``LoraDelta`` on the kernels. A tile does nothing in a module where its adapter has rank 0."""

    tiles: Tensor
    _shrunk: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, linear: LoraLinear, x: Tensor, y: Tensor) -> None:
        group = linear.group
        last = self._shrunk.get(id(group))
        if last is None or last[0] is not x:
            flat = x.reshape(-1, x.shape[-1])
            last = self._shrunk[id(group)] = (x, kernels_lora.shrink(flat, group.a, group.ranks, self.tiles))
        h, member = last[1][:, linear.member], linear.member
        kernels_lora.expand(y.view(-1, y.shape[-1]), h, linear.b, group.ranks[:, member], self.tiles)


class TiledSteps:
    """Runs steps. ``kv`` has one block more than ``sizes``: the rows that pad a batch are written there."""

    def __init__(
        self, model: PreTrainedModel, kv: KvCache, sizes: KvSizes, lora: LoraPool, adapter_slots: int, max_running: int
    ) -> None:
        self._model = model
        self._kv = kv
        self._lora = lora
        self._adapter_slots = adapter_slots
        self._device = next(model.parameters()).device
        self._table = BlockTable(max_running + 1, sizes.blocks_per_sequence, sizes.blocks, self._device)
        self._filler = Span(max_running, -1, 0, (0,), False)
        self._buckets = buckets(max_running)
        self._graphs: dict[tuple[int, bool], DecodeGraph] = {}

    @property
    def is_captured(self) -> bool:
        return bool(self._graphs)

    def forward(self, spans: Seq[Span]) -> Tensor:
        """As ``Model.forward``. The logits of a graph are overwritten by the next step."""
        if self._graphs and all(span.sampled and len(span.token_ids) == 1 for span in spans):
            size = next(size for size in self._buckets if size >= len(spans))
            has_adapters = any(span.adapter_slot >= 0 for span in spans)
            graph = self._graphs[size, has_adapters]
            self.fill(graph.buffers, self.filled(spans, size), queries=1)
            graph.graph.replay()
            return graph.logits[: len(spans)]
        rows = sum(len(span.token_ids) for span in spans)
        queries = kernels_attention.QUERIES if rows > len(spans) else 1
        adapters = len(lora_tiles(rows_by_slot(spans)))
        buffers = StepBuffers(rows, len(query_tiles(spans, queries)), adapters, self._device)
        self.fill(buffers, spans, queries)
        ends, last_rows = 0, []
        for span in spans:
            ends += len(span.token_ids)
            if span.sampled:
                last_rows.append(ends - 1)
        return self.compute(
            buffers, queries, adapters > 0, torch.tensor(last_rows, dtype=torch.long, device=self._device)
        )

    def fill(self, buffers: StepBuffers, spans: Seq[Span], queries: int) -> None:
        """Write everything that a step reads."""
        self._table.write(spans)
        buffers.fill(spans, queries)

    def filled(self, spans: Seq[Span], size: int) -> list[Span]:
        """The spans, padded to ``size`` with rows of the base model whose logits are not used."""
        return [*spans, *repeat(self._filler, size - len(spans))]

    def decode_buffers(self, size: int) -> StepBuffers:
        """Buffers for ``size`` decodes of any adapters."""
        return StepBuffers(size, size, lora_tiles_max(size, self._adapter_slots), self._device)

    @torch.inference_mode()
    def compute(self, buffers: StepBuffers, queries: int, has_adapters: bool, keep: Tensor | int) -> Tensor:
        """Logits of the rows to keep (0: all), computed from the buffers."""
        self._lora.step = TiledLoraDelta(buffers.adapter_tiles) if has_adapters else None
        logits: Tensor = self._model(
            input_ids=buffers.tokens[None],
            position_ids=buffers.positions[None],
            use_cache=False,
            logits_to_keep=keep,
            kv_step=TiledAttention(self._kv, buffers, self._table.blocks, queries),
        ).logits[0]
        self._lora.step = None
        return logits

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture the graphs, the largest first, so that the smaller ones fit into its memory.

        Nothing else may use the GPU meanwhile.

        Raises:
            RuntimeError: the model does something that cannot be captured.
        """
        graphs: dict[tuple[int, bool], DecodeGraph] = {}
        memory = torch.cuda.graph_pool_handle()
        for size, has_adapters in product(reversed(self._buckets), (False, True)):
            buffers, graph = self.decode_buffers(size), torch.cuda.CUDAGraph()
            self.fill(buffers, self.filled((), size), queries=1)
            self._warm_up(buffers, has_adapters)
            with torch.cuda.graph(graph, pool=memory):
                logits = self.compute(buffers, 1, has_adapters, 0)
            graphs[size, has_adapters] = DecodeGraph(buffers, graph, logits)
        self._graphs = graphs

    def _warm_up(self, buffers: StepBuffers, has_adapters: bool) -> None:
        """Run on a stream of its own, as a capture does."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.compute(buffers, 1, has_adapters, 0)
        torch.cuda.current_stream().wait_stream(stream)


@dataclass(frozen=True, slots=True)
class DecodeGraph:
    """A step of decodes, captured once, replayed with any tokens, positions and adapters."""

    buffers: StepBuffers
    graph: torch.cuda.CUDAGraph
    logits: Tensor


def rows_by_slot(spans: Seq[Span]) -> Counter[int]:
    """The number of rows of each adapter slot; rows of the base model have none."""
    rows: Counter[int] = Counter()
    for span in spans:
        if span.adapter_slot >= 0:
            rows[span.adapter_slot] += len(span.token_ids)
    return rows
