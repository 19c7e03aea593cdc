"""What serving costs the owner, and which prices would earn a wanted margin on it.

Pure: from a GPU's hourly price and measured speeds to nanos.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from billing.money import Nanos, divide_up
from billing.pricing.prices import TOKENS_PER_RATE, Price, Usd

MS_PER_HOUR = 3_600_000
SECONDS_PER_HOUR = 3_600
PERCENT = 100
CACHED_SHARE = 10
"""A prompt token from the cache is suggested at a tenth of one that is computed."""


class Costs(BaseModel):
    """What the owner pays for the hardware of one replica."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu_hour: Usd
    gpus_per_replica: Annotated[int, Field(ge=1, le=64)] = 1

    @property
    def replica_hour(self) -> int:
        return self.gpu_hour * self.gpus_per_replica

    def of(self, compute_ms: int) -> Nanos:
        """What so much of a replica's time costs."""
        return Nanos(divide_up(compute_ms * self.replica_hour, MS_PER_HOUR))


@dataclass(frozen=True, slots=True)
class Speeds:
    """What one replica does while it is busy, in whole tokens a second, and how much of an hour that is."""

    completion_per_s: int
    prompt_per_s: int
    busy_percent: int = PERCENT

    def __post_init__(self) -> None:
        if min(self.completion_per_s, self.prompt_per_s) < 1:
            raise ValueError("tokens per second must be at least 1")
        if not 1 <= self.busy_percent <= PERCENT:
            raise ValueError("the busy share must be between 1 and 100 percent")


def suggest(costs: Costs, speeds: Speeds, margin_percent: int) -> Price:
    """Token and compute prices at which this share of the revenue is left after the hardware is paid.

    Raises:
        ValueError: the margin is not between 0 and 99 percent.
    """
    if not 0 <= margin_percent < PERCENT:
        raise ValueError("the margin must be between 0 and 99 percent of the revenue")

    def rate(units_per_hour: int) -> Nanos:
        kept = (PERCENT - margin_percent) * speeds.busy_percent
        return Nanos(divide_up(costs.replica_hour * TOKENS_PER_RATE * PERCENT * PERCENT, units_per_hour * kept))

    prompt = rate(speeds.prompt_per_s * SECONDS_PER_HOUR)
    return Price.model_construct(
        input_per_1m=prompt,
        cached_input_per_1m=Nanos(divide_up(prompt, CACHED_SHARE)),
        output_per_1m=rate(speeds.completion_per_s * SECONDS_PER_HOUR),
    )


def per_request(tokens: Price, prompt_tokens: int, completion_tokens: int) -> Nanos:
    """The price of a request of this size at these token rates: what to ask where a request has one price."""
    return tokens.at_most(prompt_tokens, completion_tokens)


def per_compute_second(costs: Costs, margin_percent: int, busy_percent: int = PERCENT) -> Nanos:
    """The price of a second of a replica that leaves this margin."""
    kept = (PERCENT - margin_percent) * busy_percent
    return Nanos(divide_up(costs.replica_hour * PERCENT * PERCENT, SECONDS_PER_HOUR * kept))
