"""The next token of each row. Every row decides from its own logits, parameters and random number alone.

The random number is a function of (seed, position), not of a generator that others share: the same seed
gives the same tokens, alone or in a crowd.
"""

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from deployments.engine.request import SamplingParams

MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Row:
    """One row of logits: how to choose, and what has been generated so far."""

    sampling: SamplingParams
    seed: int
    generated: Seq[int]


@torch.inference_mode()
def sample(logits: Tensor, rows: Seq[Row]) -> list[int | None]:
    """Choose a token for each row of ``logits [rows, vocabulary]``; None where the logits are no numbers.

    The logits are the sampler's from here on: penalties change them in place.
    """
    logits = logits.float()
    sound = logits.amax(-1).isfinite().tolist()
    chosen = _penalised(logits, rows).argmax(-1).tolist()
    random = [i for i, row in enumerate(rows) if row.sampling.temperature > 0 and sound[i]]
    if random:
        drawn = _draw(logits[random], [rows[i] for i in random])
        for i, token in zip(random, drawn.tolist(), strict=True):
            chosen[i] = token
    return [token if good else None for token, good in zip(chosen, sound, strict=True)]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for one position of one seed, by SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    state = _mix(_mix(seed & MASK64) + (position + 1) * 0x9E3779B97F4A7C15 & MASK64)
    return (state >> 11) / (1 << 53)


def _mix(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
    return state ^ (state >> 31)


def _penalised(logits: Tensor, rows: Seq[Row]) -> Tensor:
    """Subtract, in place, presence and frequency penalties for the tokens generated so far."""
    for i, row in enumerate(rows):
        presence, frequency = row.sampling.presence_penalty, row.sampling.frequency_penalty
        if row.generated and (presence or frequency):
            counts = Counter(row.generated)
            tokens = torch.tensor(list(counts), device=logits.device)
            times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
            logits[i, tokens] -= presence + frequency * times
    return logits


def _draw(logits: Tensor, rows: Seq[Row]) -> Tensor:
    """One token for each row, by the inverse of the distribution function in the vocabulary's order."""
    below_best = (logits - logits.amax(-1, keepdim=True)).double()
    temperature = _column([row.sampling.temperature for row in rows], below_best)
    distribution = _kept((below_best / temperature).softmax(-1), rows).cumsum(-1)
    total = distribution[:, -1:]
    numbers = _column([uniform(row.seed, len(row.generated)) for row in rows], distribution)
    drawn = torch.searchsorted(distribution, numbers * total, right=True)
    likely_last = (distribution < total).sum(-1, keepdim=True)
    return drawn.minimum(likely_last)[:, 0]


def _kept(probabilities: Tensor, rows: Seq[Row]) -> Tensor:
    """Zero what top-k, top-p (of what top-k leaves) and min-p leave out; the likeliest token always stays."""
    params = [row.sampling for row in rows]
    floor = probabilities.amax(-1, keepdim=True) * _column([p.min_p for p in params], probabilities)
    if any(p.top_k or p.top_p < 1 for p in params):
        ranked = probabilities.sort(-1, descending=True).values
        size = ranked.shape[-1]
        ranks = torch.arange(size, device=ranked.device)
        top_k = _column([min(p.top_k or size, size) for p in params], ranked)
        ranked = ranked.where(ranks < top_k, 0.0)
        mass_before = ranked.cumsum(-1) - ranked
        top_p = _column([p.top_p if p.top_p < 1 else 2.0 for p in params], ranked)
        kept = (mass_before < top_p * ranked.sum(-1, keepdim=True)) & (ranks < top_k)
        floor = floor.maximum(ranked.gather(-1, kept.sum(-1, keepdim=True) - 1))
    return probabilities.where(probabilities >= floor, 0.0)


def _column(values: Seq[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
