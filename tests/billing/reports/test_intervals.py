"""Intervals cover the truth as often as they say, whatever the arms' sizes; too few tenants say nothing."""

import random

import pytest

from billing.pricing.modifiers import Experiment
from billing.reports.intervals import LEAST, Interval, by_arm, difference, mean, quantile
from billing.usage import TenantId

PRICES = Experiment.model_validate({"id": "dearer", "arms": [{"id": "control"}, {"id": "raised", "multiplier": "1.2"}]})


@pytest.mark.parametrize(
    ("freedom", "confidence", "expected"),
    [(5, 0.95, 2.571), (10, 0.95, 2.228), (10, 0.99, 3.169), (30, 0.95, 2.042), (120, 0.90, 1.658), (1e9, 0.95, 1.960)],
)
def test_students_quantile_is_that_of_the_tables(freedom: float, confidence: float, expected: float) -> None:
    assert quantile(freedom, confidence) == pytest.approx(expected, rel=2e-3)


def test_difference_worked_out_by_hand() -> None:
    """Means 12 and 10, variances 2.5 each: error 1, 8 degrees of freedom, quantile 2.306."""
    found = difference([10, 11, 12, 13, 14], [8, 9, 10, 11, 12])
    assert found is not None
    assert (found.estimate, found.low, found.high) == pytest.approx((2, -0.306, 4.306), abs=2e-3)
    assert not found.is_clear


@pytest.mark.parametrize(("treated", "control"), [(60, 60), (15, 90), (6, 8)])
def test_interval_covers_the_truth_in_95_of_100_experiments(treated: int, control: int) -> None:
    chance, truth, covered = random.Random(20_261_126), 300, 0
    for _ in range(600):
        raised = [round(chance.gauss(1_300, 400)) for _ in range(treated)]
        kept = [round(chance.gauss(1_000, 150)) for _ in range(control)]
        found = difference(raised, kept)
        assert found is not None
        covered += found.low <= truth <= found.high
    assert 0.925 <= covered / 600 <= 0.975


def test_equal_arms_seldom_differ_clearly() -> None:
    chance, false = random.Random(7), 0
    for _ in range(600):
        arms = [[round(chance.expovariate(1 / 1_000)) for _ in range(50)] for _ in range(2)]
        found = difference(*arms)
        false += found is not None and found.is_clear
    assert false / 600 <= 0.075


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert difference([7] * LEAST, [5] * LEAST) == Interval(2, 2, 2)
    assert mean([7] * LEAST) == Interval(7, 7, 7)


@pytest.mark.parametrize("few", [[], [1], [1] * (LEAST - 1)])
def test_too_few_tenants_have_no_interval(few: list[int]) -> None:
    assert mean(few) is None
    assert difference(few, [1] * 50) is None
    assert difference([1] * 50, few) is None


def test_tenant_without_usage_stays_in_its_arm() -> None:
    tenants = [TenantId(f"tenant-{number}") for number in range(40)]
    arms = by_arm(PRICES, {tenants[0]: 5}, tenants)
    assert list(arms) == ["control", "raised"]
    assert sum(map(len, arms.values())) == 40
    assert arms[PRICES.arm_of(tenants[0]).id].count(5) == 1
    assert sum(map(sum, arms.values())) == 5


def test_interval_scaled_by_a_negative_factor_keeps_its_order() -> None:
    assert Interval(2, 1, 4).scaled(-1) == Interval(-2, -4, -1)
