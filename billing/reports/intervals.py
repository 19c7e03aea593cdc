"""Means by arm of an experiment and their differences, each with its confidence interval.

The unit is the tenant, since a tenant stays in its arm: one that used nothing counts as zero.
Welch's interval (Biometrika 34, 1947), with Student's quantile after Abramowitz and Stegun 26.7.5.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from billing.pricing.modifiers import Experiment
from billing.usage import TenantId

LEAST = 5
"""An arm with fewer tenants has no interval."""
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the range that, in so many of 100 repetitions, holds what is true."""

    estimate: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Is nothing, no difference, outside of it?"""
        return self.low > 0 or self.high < 0

    def scaled(self, factor: float) -> "Interval":
        low, high = sorted((self.low * factor, self.high * factor))
        return Interval(self.estimate * factor, low, high)


def by_arm(experiment: Experiment, totals: Mapping[TenantId, int], tenants: Iterable[TenantId]) -> dict[str, list[int]]:
    """Each tenant's total under the arm that it is in; all ``tenants`` count, also those with none."""
    arms: defaultdict[str, list[int]] = defaultdict(list)
    for tenant in tenants:
        arms[experiment.arm_of(tenant).id].append(totals.get(tenant, 0))
    return {arm.id: arms[arm.id] for arm in experiment.arms}


def mean(values: Sequence[int], confidence: float = CONFIDENCE) -> Interval | None:
    """The mean of one arm; ``None`` where there are too few tenants to say."""
    if len(values) < LEAST:
        return None
    error = math.sqrt(statistics.variance(values) / len(values))
    return _around(statistics.fmean(values), error, len(values) - 1, confidence)


def difference(treated: Sequence[int], control: Sequence[int], confidence: float = CONFIDENCE) -> Interval | None:
    """How much higher the mean of ``treated`` is; ``None`` where an arm has too few tenants to say."""
    if min(len(treated), len(control)) < LEAST:
        return None
    parts = [statistics.variance(values) / len(values) for values in (treated, control)]
    weights = [part**2 / (len(values) - 1) for part, values in zip(parts, (treated, control), strict=True)]
    error = math.sqrt(sum(parts))
    freedom = sum(parts) ** 2 / sum(weights) if error else len(treated) + len(control) - 2
    return _around(statistics.fmean(treated) - statistics.fmean(control), error, freedom, confidence)


def _around(estimate: float, error: float, freedom: float, confidence: float) -> Interval:
    reach = error * quantile(freedom, confidence)
    return Interval(estimate, estimate - reach, estimate + reach)


def quantile(freedom: float, confidence: float) -> float:
    """Student's two-sided quantile, within a thousandth from five degrees of freedom on."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
