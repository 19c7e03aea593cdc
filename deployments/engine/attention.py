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
               | q |   | q | q |            empty where no decode runs; their outputs are not read
    """

    rows: Tensor
    """Index in the packed batch, ``[N]``."""
    places: Tensor
    """Slot counted from ``low``, ``[N]``."""
    low: int
    high: int
    length: int
    """The longest of their contexts."""
    mask: Tensor
    """``[high - low, 1, 1, length]``, true where there is something to attend to."""


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
        self.slots = torch.tensor(slots, device=device)
        self.positions = torch.tensor(positions, device=device)
        self.decodes: Decodes | None = None
        self.chunks: list[Chunk] = []
        self._plan(spans, device)

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
    lengths = torch.full((high - low,), length)
    places = torch.tensor([span.kv_slot - low for _, span in singles])
    lengths[places] = torch.tensor([span.start + 1 for _, span in singles])
    return Decodes(
        rows=torch.tensor([row for row, _ in singles], device=device),
        places=places.to(device),
        low=low,
        high=high,
        length=length,
        mask=(torch.arange(length) < lengths[:, None]).view(high - low, 1, 1, length).to(device),
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
    keys[kv_step.slots, :, kv_step.positions] = key[0].transpose(0, 1)
    values[kv_step.slots, :, kv_step.positions] = value[0].transpose(0, 1)
    return _over_slots(kv_step, query[0].transpose(0, 1), keys, values, scaling)[None], None


def _over_slots(step: KvStep, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None) -> Tensor:
    """query ``[T, heads, dim]`` -> ``[T, heads, value_dim]``."""
    output = query.new_empty(query.shape[0], query.shape[1], values.shape[3])
    if step.decodes is not None:
        output[step.decodes.rows] = _decode(step.decodes, query, keys, values, scaling)
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


def _decode(decodes: Decodes, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None) -> Tensor:
    """All decode rows in one call. A kv head's queries stand together, so that its keys are read once."""
    heads, kv_heads = query.shape[1], keys.shape[1]
    queries = query.new_zeros(decodes.high - decodes.low, heads, query.shape[2])
    queries[decodes.places] = query[decodes.rows]
    attended = functional.scaled_dot_product_attention(
        queries.view(-1, kv_heads, heads // kv_heads, query.shape[2]),
        keys[decodes.low : decodes.high, :, : decodes.length],
        values[decodes.low : decodes.high, :, : decodes.length],
        attn_mask=decodes.mask,
        scale=scaling,
    )
    return attended.reshape(-1, heads, values.shape[3])[decodes.places]
