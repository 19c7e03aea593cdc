"""The two products of batched LoRA: shrink, ``x A``, and expand, ``y += h B``, each row with its own slot's factors.

Knows how rows lie in a step and no modules. This is the one place that a faster kernel replaces.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

WASTE = 2
"""Slots are padded to one number of rows while that computes at most this many times the rows there are."""


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Which rows of a step belong to which slot: the first ``rows``, to slots ``low`` to ``high - 1`` in that order.

    Where the slots have about as many rows each, they are computed as one batch of equal matrices::

        rows   a a b c c c      per slot = 3      padded  a a . | b . . | c c c
        gather 0 1 0 2 0 0 3 4 5   (a dot repeats row 0)      scatter 0 1 3 6 7 8
    """

    rows: int
    low: int
    high: int
    ends: Tensor
    """int32 ``[high - low]``: where each slot's rows end."""
    per_slot: int
    """Rows of each slot after padding; 0 where the slots differ too much."""
    gather: Tensor | None
    """``[(high - low) * per_slot]``: the row of each padded place; None where nothing is padded."""
    scatter: Tensor | None
    """``[rows]``: the padded place of each row."""

    @classmethod
    def of(cls, rows_by_slot: Mapping[int, int], device: torch.device) -> "RowPlan":
        low, high = min(rows_by_slot), max(rows_by_slot) + 1
        counts = [rows_by_slot.get(slot, 0) for slot in range(low, high)]
        rows, most = sum(counts), max(counts)
        padded = most * len(counts)
        if padded > WASTE * rows:
            most = 0
        gather = scatter = None
        if most and padded != rows:
            places = [slot * most + i for slot, count in enumerate(counts) for i in range(count)]
            scatter = torch.tensor(places, device=device)
            gather = torch.zeros(padded, dtype=torch.long, device=device)
            gather[scatter] = torch.arange(rows, device=device)
        ends = torch.tensor(counts).cumsum(0).to(device=device, dtype=torch.int32)
        return cls(rows=rows, low=low, high=high, ends=ends, per_slot=most, gather=gather, scatter=scatter)


def shrink(x: Tensor, a: Tensor, plan: RowPlan) -> Tensor:
    """``x [T, in]``, ``a [slots, rank, members, in]`` -> ``[slots or 1, rank, members, rows]``, for ``expand``."""
    factors = a[plan.low : plan.high].flatten(1, 2)
    if not plan.per_slot:
        product = functional.grouped_mm(x[: plan.rows], factors.transpose(1, 2), offs=plan.ends)
        return product.t().view(1, a.shape[1], a.shape[2], plan.rows)
    placed = x[: plan.rows] if plan.gather is None else x.index_select(0, plan.gather)
    product = torch.bmm(factors, placed.view(-1, plan.per_slot, x.shape[1]).transpose(1, 2))
    return product.view(-1, a.shape[1], a.shape[2], plan.per_slot)


def expand(y: Tensor, h: Tensor, b: Tensor, plan: RowPlan) -> None:
    """Add one member's product to ``y [T, out]``: ``h [slots or 1, rank, rows]`` and ``b [slots, rank, out]``."""
    factors, mine = b[plan.low : plan.high], y[: plan.rows]
    if not plan.per_slot:
        mine += functional.grouped_mm(h[0].t().contiguous(), factors, offs=plan.ends)
    elif plan.scatter is None:
        mine.view(-1, plan.per_slot, y.shape[1]).baddbmm_(h.transpose(1, 2), factors)
    else:
        mine += torch.bmm(h.transpose(1, 2), factors).view(-1, y.shape[1]).index_select(0, plan.scatter)
