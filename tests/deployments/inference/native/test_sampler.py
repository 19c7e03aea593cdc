"""Sampling: each row's token depends on its own logits, parameters, seed and position alone."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from deployments.inference.native.sampler import Row, sample, uniform
from deployments.inference.request import RequestRejected, SamplingParams

PLAIN = SamplingParams(max_tokens=1, temperature=1.0)


def _row(params: SamplingParams = PLAIN, seed: int = 0, generated: tuple[int, ...] = ()) -> Row:
    return Row(params, seed, generated)


def _draws(logits: list[float], params: SamplingParams, count: int = 2000) -> Counter[int]:
    tokens = sample(torch.tensor([logits]).repeat(count, 1), [_row(params, seed) for seed in range(count)])
    assert None not in tokens
    return Counter(token for token in tokens if token is not None)


def test_temperature_zero_is_greedy() -> None:
    logits = torch.randn(20, 50)
    assert sample(logits.clone(), [_row(replace(PLAIN, temperature=0.0))] * 20) == logits.argmax(-1).tolist()


def test_tokens_are_drawn_by_probability() -> None:
    drawn = _draws(torch.tensor([0.1, 0.2, 0.3, 0.4]).log().tolist(), PLAIN, count=20_000)
    assert [drawn[i] / 20_000 for i in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.015)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (replace(PLAIN, top_k=1), {3}),
        (replace(PLAIN, top_k=2), {2, 3}),
        (replace(PLAIN, top_k=99), {0, 1, 2, 3}),
        (replace(PLAIN, top_p=0.39), {3}),
        (replace(PLAIN, top_p=0.41), {2, 3}),
        (replace(PLAIN, top_p=0.69), {2, 3}),
        (replace(PLAIN, top_p=0.71), {1, 2, 3}),
        (replace(PLAIN, top_k=3, top_p=0.43), {3}),
        (replace(PLAIN, min_p=0.6), {2, 3}),
        (replace(PLAIN, min_p=1.0), {3}),
        (replace(PLAIN, temperature=1e-9), {3}),
    ],
)
def test_filters_keep_exactly_their_tokens(params: SamplingParams, kept: set[int]) -> None:
    assert set(_draws(torch.tensor([0.1, 0.2, 0.3, 0.4]).log().tolist(), params)) == kept


def test_seed_and_position_decide_the_token_in_any_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, 300)
    rows = [
        _row(replace(PLAIN, top_p=0.5 + seed % 3 / 4, top_k=seed % 5 * 10, temperature=1 + seed % 2), seed, (1,) * seed)
        for seed in range(64)
    ]
    together = sample(logits.clone(), rows)
    assert [sample(logits[i : i + 1].clone(), [rows[i]])[0] for i in range(64)] == together


def test_random_numbers_are_uniform() -> None:
    by_seed = [uniform(seed, 0) for seed in range(5000)]
    by_position = [uniform(2**64 - 1, position) for position in range(5000)]
    for numbers in (by_seed, by_position):
        assert all(0 <= number < 1 for number in numbers)
        assert len(set(numbers)) == 5000
        assert sum(numbers) / 5000 == pytest.approx(0.5, abs=0.02)


def test_seed_beyond_64_bits_is_accepted() -> None:
    assert sample(torch.zeros(2, 9), [_row(seed=-1), _row(seed=2**70)])


def test_penalties_lower_generated_tokens() -> None:
    greedy = replace(PLAIN, temperature=0.0)
    logits = torch.tensor([[1.0, 0.9, 0.8]])
    assert sample(logits.clone(), [_row(replace(greedy, presence_penalty=0.15), generated=(0,))]) == [1]
    assert sample(logits.clone(), [_row(replace(greedy, presence_penalty=0.05), generated=(0, 0, 0))]) == [0]
    assert sample(logits.clone(), [_row(replace(greedy, frequency_penalty=0.05), generated=(0, 0, 0))]) == [1]
    assert sample(logits.clone(), [_row(replace(greedy, frequency_penalty=-1.0), generated=(2,))]) == [2]


def test_nan_row_fails_alone() -> None:
    logits = torch.zeros(4, 5)
    logits[:, 2] = 1
    logits[1, 4] = float("nan")
    logits[2] = float("-inf")
    rows = [_row(replace(PLAIN, temperature=0.0)), _row(), _row(), _row(replace(PLAIN, top_k=1))]
    assert sample(logits, rows) == [2, None, None, 2]


def test_minus_infinity_is_not_a_failure() -> None:
    assert sample(torch.tensor([[float("-inf"), 1.0]]), [_row()]) == [1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": 2.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.5},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -2.5},
        {"max_tokens": 0},
        {"stop": ("",)},
    ],
)
def test_sampling_parameter_out_of_range_is_rejected(wrong: dict[str, float]) -> None:
    with pytest.raises(RequestRejected):
        replace(PLAIN, **wrong)
