"""Sample the next token of each row of logits, from that row's logits, parameters and random number alone.

The random number is a function of seed and position, so that the same seed gives the same tokens in any batch.
"""

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from deployments.inference.request import Logprob, SamplingParams

MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Row:
    """What the sampler needs beside one row of logits."""

    sampling: SamplingParams
    seed: int
    generated: Seq[int]
    """The tokens generated so far; their number is the position of the random number."""
    forbidden: Seq[int] = ()
    """Tokens that must not be sampled."""


@torch.inference_mode()
def sample(logits: Tensor, rows: Seq[Row]) -> list[int | None]:
    """Sample a token for each row of ``logits [rows, vocabulary]``; None where a row's largest logit is not finite.

    The logits are changed in place.
    """
    logits = logits.float()
    is_finite = logits.amax(-1).isfinite().tolist()
    chosen = _adjusted(logits, rows).argmax(-1).tolist()
    random = [i for i, row in enumerate(rows) if row.sampling.temperature > 0 and is_finite[i]]
    if random:
        drawn = _draw(logits if len(random) == len(rows) else logits[random], [rows[i] for i in random])
        for i, token in zip(random, drawn.tolist(), strict=True):
            chosen[i] = token
    return [token if good else None for token, good in zip(chosen, is_finite, strict=True)]


class Logprobs:
    """The model's log-probabilities, for the rows that ask for them. Made before ``sample`` changes the logits."""

    @torch.inference_mode()
    def __init__(self, logits: Tensor, rows: Seq[Row]) -> None:
        self._wanted = {i: count for i, row in enumerate(rows) if (count := row.sampling.logprobs) is not None}
        """Row to the number of the likeliest tokens to report."""
        if self._wanted:
            self._logprobs = logits[list(self._wanted)].float().log_softmax(-1)

    @torch.inference_mode()
    def tokens(self, tokens: Seq[int | None]) -> dict[int, Logprob]:
        """The log-probabilities of the sampled tokens, by row, for the rows that asked and got one."""
        if not self._wanted:
            return {}
        found: dict[int, Logprob] = {}
        best = self._logprobs.topk(max(1, *self._wanted.values()), dim=-1)
        for i, (row, count) in enumerate(self._wanted.items()):
            token = tokens[row]
            if token is not None:
                top = zip(best.indices[i, :count].tolist(), best.values[i, :count].tolist(), strict=True)
                found[row] = Logprob(token, float(self._logprobs[i, token]), tuple(top))
        return found


def choice_seed(seed: int, index: int) -> int:
    """The seed of a request's choice with that index; the first has the request's own."""
    return seed if index == 0 else _mix((seed & MASK64) ^ _mix(index))


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of a seed and a position, by SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    state = _mix(_mix(seed & MASK64) + (position + 1) * 0x9E3779B97F4A7C15 & MASK64)
    return (state >> 11) / (1 << 53)


def _mix(state: int) -> int:
    """SplitMix64's finalizer."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
    return state ^ (state >> 31)


def _adjusted(logits: Tensor, rows: Seq[Row]) -> Tensor:
    """Change the logits in place: subtract penalties for the tokens generated, add biases, exclude forbidden tokens."""
    for i, row in enumerate(rows):
        presence, frequency = row.sampling.presence_penalty, row.sampling.frequency_penalty
        if row.generated and (presence or frequency):
            counts = Counter(row.generated)
            tokens = torch.tensor(list(counts), device=logits.device)
            times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
            logits[i, tokens] -= presence + frequency * times
        if row.sampling.logit_bias:
            biased = torch.tensor([token for token, _ in row.sampling.logit_bias], device=logits.device)
            logits[i, biased] += _row_of([bias for _, bias in row.sampling.logit_bias], logits)
        if row.forbidden:
            logits[i, torch.tensor(list(row.forbidden), device=logits.device)] = float("-inf")
    return logits


def _draw(logits: Tensor, rows: Seq[Row]) -> Tensor:
    """Draw one token for each row: invert the cumulative distribution over the vocabulary at its random number."""
    below_best = (logits - logits.amax(-1, keepdim=True)).double()
    temperature = _column([row.sampling.temperature for row in rows], below_best)
    distribution = _kept((below_best / temperature).softmax(-1), rows).cumsum(-1)
    total = distribution[:, -1:]
    numbers = _column([uniform(row.seed, len(row.generated)) for row in rows], distribution)
    drawn = torch.searchsorted(distribution, numbers * total, right=True)
    last_possible = (distribution < total).sum(-1, keepdim=True)
    return drawn.minimum(last_possible)[:, 0]


def _kept(probabilities: Tensor, rows: Seq[Row]) -> Tensor:
    """Set to zero what top-k, then top-p and min-p exclude; the likeliest token always stays."""
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


def _row_of(values: Seq[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def _column(values: Seq[float], like: Tensor) -> Tensor:
    return _row_of(values, like)[:, None]
