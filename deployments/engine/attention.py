"""Attention over our own KV memory, entered through the hook that transformers offers.

The model runs packed, ``[1, T]``, without a cache of its own; each layer's keys and values come here,
are written to their slots, and each sequence attends to its own slot alone. Knows positions and slots,
no requests.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from deployments.engine.request import ModelRefused
from deployments.engine.sequence import Span

NAME = "farebox_slots"
WASTE = 2
"""Decode rows attend in one call while it reads at most this many times what they need."""


class KvPool:
    """Keys and values, per layer ``[slots, kv_heads, context, head_dim]``, made when a layer first writes."""

    def __init__(self, slots: int, context: int) -> None:
        self._slots = slots
        self.context = context
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's whole memory; ``key`` and ``value`` ``[1, kv_heads, T, head_dim]`` give its shape."""
        if index not in self._keys:
            for pool, new in ((self._keys, key), (self._values, value)):
                pool[index] = new.new_zeros(self._slots, new.shape[1], self.context, new.shape[3])
        return self._keys[index], self._values[index]

    @torch.inference_mode()
    def copy(self, source: int, target: int, rows: int) -> None:
        for pool in (self._keys, self._values):
            for layer in pool.values():
                layer[target, :, :rows] = layer[source, :, :rows]

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        for pool in (self._keys, self._values):
            for layer in pool.values():
                layer[slot].zero_()


@dataclass(frozen=True, slots=True)
class Decodes:
    """The spans of one token, to be attended together over a range of neighbouring slots.

    ::

        slots  low ............ high        queries [high - low, heads, dim]: row i is slot low + i,
               | q |   | q | q |            any query where no decode runs; those outputs are not read
    """

    rows: Tensor
    """Index in the packed batch, ``[N]``."""
    places: Tensor
    """Slot counted from ``low``, ``[N]``."""
    row_at: Tensor
    """Index in the packed batch of each place, ``[high - low]``."""
    low: int
    high: int
    length: int
    """The longest of their contexts."""
    bias: Tensor | None
    """``[high - low, 1, length]``: 0 where there is something to attend to, else minus infinity; None: everywhere."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of one sequence's tokens: ``count`` rows of the batch from ``row``, at positions from ``start``."""

    row: int
    count: int
    kv_slot: int
    start: int
    mask: Tensor | None
    """``[count, start + count]``; None where all is new, and plain causality does."""


class KvStep:
    """Where every row of one step stands; made once, used by all layers."""

    def __init__(self, pool: KvPool, spans: Seq[Span], device: torch.device) -> None:
        self.pool = pool
        slots: list[int] = []
        positions: list[int] = []
        for span in spans:
            slots += [span.kv_slot] * len(span.token_ids)
            positions += range(span.start, span.start + len(span.token_ids))
        self.rows = len(slots)
        self.positions = torch.tensor(positions, device=device)
        self._slots = torch.tensor(slots, device=device)
        self._places: dict[int, Tensor] = {}
        self._biases: dict[tuple[int, torch.dtype], Tensor] = {}
        self.decodes: Decodes | None = None
        self.chunks: list[Chunk] = []
        self._plan(spans, device)

    def places(self, kv_heads: int) -> Tensor:
        """Where each head of each row lies in a layer's memory, taken as ``[slots * kv_heads * context, dim]``."""
        if kv_heads not in self._places:
            heads = torch.arange(kv_heads, device=self._slots.device)
            first = (self._slots[:, None] * kv_heads + heads) * self.pool.context + self.positions[:, None]
            self._places[kv_heads] = first.view(-1)
        return self._places[kv_heads]

    def bias(self, kv_heads: int, dtype: torch.dtype) -> Tensor | None:
        """The decodes' bias for each kv head, ``[(high - low) * kv_heads, 1, length]``."""
        assert self.decodes is not None
        bias = self.decodes.bias
        if bias is not None and (kv_heads, dtype) not in self._biases:
            self._biases[kv_heads, dtype] = bias.to(dtype).repeat_interleave(kv_heads, dim=0)
        return self._biases.get((kv_heads, dtype))

    def _plan(self, spans: Seq[Span], device: torch.device) -> None:
        singles: list[tuple[int, Span]] = []
        row = 0
        for span in spans:
            if len(span.token_ids) == 1:
                singles.append((row, span))
            else:
                self.chunks.append(_chunk(row, span, device))
            row += len(span.token_ids)
        if _worth_joining([span for _, span in singles]):
            self.decodes = _decodes(singles, device)
        else:
            self.chunks += [_chunk(row, span, device) for row, span in singles]


def _worth_joining(singles: Seq[Span]) -> bool:
    if len(singles) < 2:
        return False
    slots = [span.kv_slot for span in singles]
    lengths = [span.start + 1 for span in singles]
    return (max(slots) + 1 - min(slots)) * max(lengths) <= WASTE * sum(lengths)


def _decodes(singles: Seq[tuple[int, Span]], device: torch.device) -> Decodes:
    low = min(span.kv_slot for _, span in singles)
    high = max(span.kv_slot for _, span in singles) + 1
    length = max(span.start for _, span in singles) + 1
    lengths, row_at = [length] * (high - low), [singles[0][0]] * (high - low)
    for row, span in singles:
        lengths[span.kv_slot - low] = span.start + 1
        row_at[span.kv_slot - low] = row
    bias = None
    if min(lengths) < length:
        bias = torch.zeros(high - low, 1, length)
        bias[torch.arange(length) >= torch.tensor(lengths)[:, None, None]] = float("-inf")
        bias = bias.to(device)
    return Decodes(
        rows=torch.tensor([row for row, _ in singles], device=device),
        places=torch.tensor([span.kv_slot - low for _, span in singles], device=device),
        row_at=torch.tensor(row_at, device=device),
        low=low,
        high=high,
        length=length,
        bias=bias,
    )


def _chunk(row: int, span: Span, device: torch.device) -> Chunk:
    count = len(span.token_ids)
    mask = None
    if span.start and count > 1:
        mask = torch.ones(count, span.start + count, dtype=torch.bool, device=device).tril(span.start)
    return Chunk(row=row, count=count, kv_slot=span.kv_slot, start=span.start, mask=mask)


def register() -> None:
    """Make the hook known to transformers under ``NAME``; doing it twice does no harm."""
    AttentionInterface.register(NAME, _attend)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    kv_step: KvStep | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """One layer's attention: query ``[1, heads, T, dim]``, key and value ``[1, kv_heads, T, dim]``.

    Returns ``[1, T, heads, dim]``, and no attention weights.

    Raises:
        ModelRefused: the layer wants something that this attention doesn't do.
    """
    if kv_step is None:
        raise ModelRefused("the model does not hand its attention what it was called with")
    if softcap is not None or s_aux is not None:
        raise ModelRefused("the model caps its attention scores or has attention sinks, which is not supported")
    if sliding_window is not None and sliding_window < kv_step.pool.context:
        raise ModelRefused(
            f"the model attends through a window of {sliding_window} tokens, which is only supported "
            f"where max_context_tokens ({kv_step.pool.context}) fits into it"
        )
    assert isinstance(module.layer_idx, int)
    keys, values = kv_step.pool.layer(module.layer_idx, key, value)
    places = kv_step.places(key.shape[1])
    keys.view(-1, key.shape[3]).index_copy_(0, places, key[0].transpose(0, 1).reshape(-1, key.shape[3]))
    values.view(-1, value.shape[3]).index_copy_(0, places, value[0].transpose(0, 1).reshape(-1, value.shape[3]))
    return _over_slots(kv_step, query[0].transpose(0, 1), keys, values, scaling)[None], None


def _over_slots(step: KvStep, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None) -> Tensor:
    """query ``[T, heads, dim]`` -> ``[T, heads, value_dim]``. This is the one place that a faster kernel replaces."""
    decodes = step.decodes
    if decodes is not None:
        attended = _decode(step, decodes, query, keys, values, scaling)
        if not step.chunks:
            return attended
    output = query.new_empty(query.shape[0], query.shape[1], values.shape[3])
    if decodes is not None:
        output[decodes.rows] = attended
    for chunk in step.chunks:
        end = chunk.start + chunk.count
        output[chunk.row : chunk.row + chunk.count] = functional.scaled_dot_product_attention(
            query[chunk.row : chunk.row + chunk.count].transpose(0, 1)[None],
            keys[chunk.kv_slot, :, :end][None],
            values[chunk.kv_slot, :, :end][None],
            attn_mask=chunk.mask,
            is_causal=chunk.start == 0 and chunk.count > 1,
            scale=scaling,
            enable_gqa=True,
        )[0].transpose(0, 1)
    return output


def _decode(
    step: KvStep, decodes: Decodes, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None
) -> Tensor:
    """All decode rows in one go, ``[N, heads, value_dim]``. A kv head's queries share one pass over its keys.

    On a CPU in float32 two batched products are faster than torch's attention, whose work per head is small here.
    """
    heads, kv_heads, dim = query.shape[1], keys.shape[1], query.shape[2]
    queries = query.index_select(0, decodes.row_at).view(-1, heads // kv_heads, dim)
    seen_keys = keys[decodes.low : decodes.high].flatten(0, 1)[:, : decodes.length]
    seen_values = values[decodes.low : decodes.high].flatten(0, 1)[:, : decodes.length]
    bias = step.bias(kv_heads, query.dtype)
    if query.device.type == "cpu" and query.dtype is torch.float32:
        scale = dim**-0.5 if scaling is None else scaling
        if bias is None:
            scores = torch.bmm(queries * scale, seen_keys.transpose(1, 2))
        else:
            scores = torch.baddbmm(bias, queries, seen_keys.transpose(1, 2), alpha=scale)
        attended = torch.bmm(scores.softmax(-1), seen_values)
    else:
        attended = functional.scaled_dot_product_attention(
            queries[:, None], seen_keys[:, None], seen_values[:, None],
            attn_mask=None if bias is None else bias[:, None], scale=scaling,
        )[:, 0]  # fmt: skip
    return attended.view(-1, heads, values.shape[3]).index_select(0, decodes.places)
