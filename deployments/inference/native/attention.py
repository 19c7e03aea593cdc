"""Attention over the engine's KV cache, called by transformers through ``AttentionInterface``.

The model runs on packed sequences, ``[1, T]``, without a cache of its own. For each layer, ``_attend`` writes the new
keys and values into the KV cache, and each sequence attends to its own.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from deployments.inference.native.sequence import Span
from deployments.inference.request import ModelRejected

NAME = "farebox_slots"
MAX_OVERREAD = 2
"""Decodes are computed in one call while that reads at most this many times the keys they need."""


class KvCache:
    """Keys and values, for each layer ``[blocks, kv_heads, block_tokens, head_dim]``, allocated at its first write.

    Without paging there is one block, as long as the context, for each slot.
    """

    def __init__(self, blocks: int, block_tokens: int, context: int) -> None:
        self._blocks = blocks
        self.block_tokens = block_tokens
        self.context = context
        """The most tokens of a sequence."""
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values; ``key`` and ``value`` ``[1, kv_heads, T, head_dim]`` give their shape."""
        if index not in self._keys:
            for pool, new in ((self._keys, key), (self._values, value)):
                pool[index] = new.new_zeros(self._blocks, new.shape[1], self.block_tokens, new.shape[3])
        return self._keys[index], self._values[index]

    def slot_mapping(self, blocks: Tensor, positions: Tensor, kv_heads: int) -> Tensor:
        """Index of each row's heads in a layer viewed as ``[-1, head_dim]``; ``positions`` are within ``blocks``."""
        heads = torch.arange(kv_heads, device=blocks.device)
        return ((blocks[:, None] * kv_heads + heads) * self.block_tokens + positions[:, None]).view(-1)

    @torch.inference_mode()
    def copy(self, source: int, target: int, rows: int) -> None:
        """Copy the first rows of one block into another."""
        for pool in (self._keys, self._values):
            for layer in pool.values():
                layer[target, :, :rows] = layer[source, :, :rows]

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Set a block to zeros."""
        for pool in (self._keys, self._values):
            for layer in pool.values():
                layer[slot].zero_()


@dataclass(frozen=True, slots=True)
class Decodes:
    """The spans of one token, computed in one call over a range of neighbouring slots.

    ::

        slots  low ............ high        queries [high - low, heads, dim]: row i is slot low + i,
               | q |   | q | q |            any query where no decode runs; those outputs are not read
    """

    rows: Tensor
    """``[N]``: index of each decode in the packed batch."""
    slots: Tensor
    """``[N]``: slot of each decode, counted from ``low``."""
    row_of_slot: Tensor
    """``[high - low]``: index in the packed batch of each slot's decode; of any decode where there is none."""
    low: int
    high: int
    length: int
    """The longest context of a decode."""
    lengths: Tensor
    """``[high - low]``: length of each slot's context; ``length`` where no decode runs."""
    is_ragged: bool
    """Their contexts differ in length."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A span that is computed by itself: ``count`` rows of the batch from ``row``, at positions from ``start``."""

    row: int
    count: int
    kv_slot: int
    start: int
    mask: Tensor | None
    """``[count, start + count]``: what each token attends to; None if it is the whole context, causally."""

    def mask_within(self, window: int | None, device: torch.device) -> Tensor | None:
        """The mask, limited to the last ``window`` tokens."""
        if window is None:
            return self.mask
        seen = torch.ones(self.count, self.start + self.count, dtype=torch.bool, device=device)
        return seen.tril(self.start).triu(self.start - window + 1)


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer turns products of queries and keys into attention weights."""

    scale: float
    softcap: float | None
    """Scores become ``softcap * tanh(score / softcap)``."""
    window: int | None
    """How many of the last tokens each one attends to, itself included; None: all."""

    def weights(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        """Softmax of the scaled ``scores`` plus ``bias``, computed in float32."""
        if self.softcap is not None:
            scores = (scores / self.softcap).tanh() * self.softcap
        if bias is not None:
            scores = scores + bias
        return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)


class AttentionStep(Protocol):
    """What one layer's attention needs of a step."""

    @property
    def pool(self) -> KvCache:
        """The KV cache."""

    def slot_mapping(self, kv_heads: int) -> Tensor:
        """``[T * kv_heads]``: where the new keys and values go, as for ``KvCache.slot_mapping``."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> Tensor:
        """query ``[T, heads, dim]`` and a layer's keys and values -> ``[T, heads, value_dim]``."""


class KvStep:
    """One step on a CPU: the position and slot of every row. Made once, used by all layers."""

    def __init__(self, pool: KvCache, spans: Seq[Span], device: torch.device) -> None:
        self.pool = pool
        slots: list[int] = []
        positions: list[int] = []
        for span in spans:
            slots += [span.kv_slot] * len(span.token_ids)
            positions += range(span.start, span.start + len(span.token_ids))
        self.rows = len(slots)
        self.positions = torch.tensor(positions, device=device)
        self._slots = torch.tensor(slots, device=device)
        self._slot_mappings: dict[int, Tensor] = {}
        self._biases: dict[tuple[int, torch.dtype, int | None], Tensor] = {}
        self.decodes: Decodes | None = None
        self.chunks: list[Chunk] = []
        self._plan(spans, device)

    def slot_mapping(self, kv_heads: int) -> Tensor:
        if kv_heads not in self._slot_mappings:
            self._slot_mappings[kv_heads] = self.pool.slot_mapping(self._slots, self.positions, kv_heads)
        return self._slot_mappings[kv_heads]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> Tensor:
        return _attend_slots(self, query, keys, values, scoring)

    def bias(self, kv_heads: int, dtype: torch.dtype, window: int | None) -> Tensor | None:
        """``[(high - low) * kv_heads, 1, length]``: 0 where a decode attends, else -inf; None if all are 0."""
        decodes = self.decodes
        assert decodes is not None
        if not decodes.is_ragged and window is None:
            return None
        key = (kv_heads, dtype, window)
        if key not in self._biases:
            positions = torch.arange(decodes.length, device=decodes.lengths.device)
            hidden = positions >= decodes.lengths[:, None]
            if window is not None:
                hidden |= positions < decodes.lengths[:, None] - window
            bias = hidden.new_zeros(hidden.shape, dtype=dtype).masked_fill(hidden, float("-inf"))
            self._biases[key] = bias[:, None].repeat_interleave(kv_heads, dim=0)
        return self._biases[key]

    def _plan(self, spans: Seq[Span], device: torch.device) -> None:
        singles: list[tuple[int, Span]] = []
        row = 0
        for span in spans:
            if len(span.token_ids) == 1:
                singles.append((row, span))
            else:
                self.chunks.append(_chunk(row, span, device))
            row += len(span.token_ids)
        if _worth_batching([span for _, span in singles]):
            self.decodes = _decodes(singles, device)
        else:
            self.chunks += [_chunk(row, span, device) for row, span in singles]


def _worth_batching(singles: Seq[Span]) -> bool:
    if len(singles) < 2:
        return False
    slots = [span.kv_slot for span in singles]
    lengths = [span.start + 1 for span in singles]
    return (max(slots) + 1 - min(slots)) * max(lengths) <= MAX_OVERREAD * sum(lengths)


def _decodes(singles: Seq[tuple[int, Span]], device: torch.device) -> Decodes:
    low = min(span.kv_slot for _, span in singles)
    high = max(span.kv_slot for _, span in singles) + 1
    length = max(span.start for _, span in singles) + 1
    lengths, row_of_slot = [length] * (high - low), [singles[0][0]] * (high - low)
    for row, span in singles:
        lengths[span.kv_slot - low] = span.start + 1
        row_of_slot[span.kv_slot - low] = row
    return Decodes(
        rows=torch.tensor([row for row, _ in singles], device=device),
        slots=torch.tensor([span.kv_slot - low for _, span in singles], device=device),
        row_of_slot=torch.tensor(row_of_slot, device=device),
        low=low,
        high=high,
        length=length,
        lengths=torch.tensor(lengths, device=device),
        is_ragged=min(lengths) < length,
    )


def _chunk(row: int, span: Span, device: torch.device) -> Chunk:
    count = len(span.token_ids)
    mask = None
    if span.start and count > 1:
        mask = torch.ones(count, span.start + count, dtype=torch.bool, device=device).tril(span.start)
    return Chunk(row=row, count=count, kv_slot=span.kv_slot, start=span.start, mask=mask)


def register() -> None:
    """Register the attention with transformers as ``NAME``. May be called twice."""
    AttentionInterface.register(NAME, _attend)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    kv_step: AttentionStep | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """One layer's attention: query ``[1, heads, T, dim]``, key and value ``[1, kv_heads, T, dim]``.

    Returns ``[1, T, heads, dim]``, and no attention weights.

    Raises:
        ModelRejected: the layer needs something that this attention does not support.
    """
    if kv_step is None:
        raise ModelRejected("the model does not pass its keyword arguments on to its attention. It is not supported")
    if s_aux is not None:
        raise ModelRejected("the model has attention sinks, which are not supported")
    is_narrow = sliding_window is not None and sliding_window < kv_step.pool.context
    scoring = Scoring(
        scale=query.shape[3] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        window=sliding_window if is_narrow else None,
    )
    assert isinstance(module.layer_idx, int)
    keys, values = kv_step.pool.layer(module.layer_idx, key, value)
    slots = kv_step.slot_mapping(key.shape[1])
    keys.view(-1, key.shape[3]).index_copy_(0, slots, key[0].transpose(0, 1).reshape(-1, key.shape[3]))
    values.view(-1, value.shape[3]).index_copy_(0, slots, value[0].transpose(0, 1).reshape(-1, value.shape[3]))
    return kv_step.attend(query[0].transpose(0, 1), keys, values, scoring)[None], None


def _attend_slots(step: KvStep, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> Tensor:
    """query ``[T, heads, dim]`` -> ``[T, heads, value_dim]``, without custom kernels."""
    decodes = step.decodes
    if decodes is not None:
        attended = _decode(step, decodes, query, keys, values, scoring)
        if not step.chunks:
            return attended
    output = query.new_empty(query.shape[0], query.shape[1], values.shape[3])
    if decodes is not None:
        output[decodes.rows] = attended
    for chunk in step.chunks:
        end = chunk.start + chunk.count
        output[chunk.row : chunk.row + chunk.count] = _attend_chunk(
            chunk,
            query[chunk.row : chunk.row + chunk.count].transpose(0, 1),
            keys[chunk.kv_slot, :, :end],
            values[chunk.kv_slot, :, :end],
            scoring,
        ).transpose(0, 1)
    return output


def _attend_chunk(chunk: Chunk, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> Tensor:
    """query ``[heads, count, dim]``, keys and values ``[kv_heads, end, dim]`` -> ``[heads, count, value_dim]``."""
    mask = chunk.mask_within(scoring.window, query.device)
    is_causal = mask is None and chunk.start == 0 and chunk.count > 1
    if scoring.softcap is None:
        return functional.scaled_dot_product_attention(
            query[None], keys[None], values[None],
            attn_mask=mask, is_causal=is_causal, scale=scoring.scale, enable_gqa=True,
        )[0]  # fmt: skip
    kv_heads, (heads, count, dim), end = keys.shape[0], query.shape, keys.shape[1]
    scores = torch.bmm(query.reshape(kv_heads, -1, dim) * scoring.scale, keys.transpose(1, 2))
    hidden = None
    if mask is not None or is_causal:
        seen = query.new_ones(count, end, dtype=torch.bool).tril() if mask is None else mask
        hidden = query.new_zeros(count, end).masked_fill(~seen, float("-inf"))
    weights = scoring.weights(scores.view(heads, count, end), hidden)
    return torch.bmm(weights.view(kv_heads, -1, end), values).view(heads, count, -1)


def _decode(step: KvStep, decodes: Decodes, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> Tensor:
    """All decodes in one call, ``[N, heads, value_dim]``. The queries of one KV head share a pass over its keys.

    On a CPU in float32 two batched products are faster than torch's attention, because each head has little work.
    """
    heads, kv_heads, dim = query.shape[1], keys.shape[1], query.shape[2]
    queries = query.index_select(0, decodes.row_of_slot).view(-1, heads // kv_heads, dim)
    seen_keys = keys[decodes.low : decodes.high].flatten(0, 1)[:, : decodes.length]
    seen_values = values[decodes.low : decodes.high].flatten(0, 1)[:, : decodes.length]
    bias = step.bias(kv_heads, query.dtype, scoring.window)
    is_cpu = query.device.type == "cpu" and query.dtype is torch.float32
    if is_cpu or scoring.softcap is not None:
        scores = torch.bmm(queries * scoring.scale, seen_keys.transpose(1, 2))
        attended = torch.bmm(scoring.weights(scores, bias), seen_values)
    else:
        attended = functional.scaled_dot_product_attention(
            queries[:, None], seen_keys[:, None], seen_values[:, None],
            attn_mask=None if bias is None else bias[:, None], scale=scoring.scale,
        )[:, 0]  # fmt: skip
    return attended.view(-1, heads, values.shape[3]).index_select(0, decodes.slots)
