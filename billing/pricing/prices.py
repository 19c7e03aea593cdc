"""Prices: from quantities to nanos, rounded up once."""

import hashlib
import json
from functools import lru_cache
from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from billing.money import AmountError, Nanos, divide_up, format_usd, parse_usd
from billing.usage import Usage

TOKENS_PER_RATE = 1_000_000
MS_PER_SECOND = 1_000


def _amount(value: object) -> Nanos:
    if not isinstance(value, str):
        raise AmountError(f'{value!r} must be a decimal string of dollars in quotes, such as "0.50"')
    return parse_usd(value)


Usd = Annotated[Nanos, BeforeValidator(_amount), PlainSerializer(format_usd), Field(ge=0)]
"""A configured amount: a decimal string of dollars on every wire, nanos in the program."""


class Price(BaseModel):
    """Rates of one adapter in nanos. At least one is given: nothing is served unpriced.

    Token rates are per million tokens. ``free: true`` is the only way to charge nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_per_1m: Usd = Nanos(0)
    cached_input_per_1m: Usd | None = None
    """Rate of prompt tokens found in the prefix cache; the input rate where it is not given."""
    output_per_1m: Usd = Nanos(0)
    per_request: Usd = Nanos(0)
    per_compute_second: Usd = Nanos(0)
    free: bool = False

    @model_validator(mode="after")
    def _is_a_price(self) -> Self:
        rates = (self.input_per_1m, self.output_per_1m, self.per_request, self.per_compute_second)
        if self.free and any(rates):
            raise ValueError("a free adapter has no rates: remove `free: true` or the rates")
        if not self.free and not any(rates):
            raise ValueError("no rate above 0: give at least one, or say `free: true`")
        if self.cached_input_per_1m is not None and self.cached_input_per_1m > self.input_per_1m:
            raise ValueError("cached_input_per_1m exceeds input_per_1m: a cache hit must never cost more")
        return self

    @property
    def version(self) -> str:
        """A hash of the rates: the same rates are the same version wherever they stand."""
        return _version_of(self)

    def charge(self, usage: Usage) -> Nanos:
        """Nanos for these quantities: everything summed first, then rounded up once."""
        cached_rate = self.input_per_1m if self.cached_input_per_1m is None else self.cached_input_per_1m
        tokens = (
            (usage.prompt_tokens - usage.cached_tokens) * self.input_per_1m
            + usage.cached_tokens * cached_rate
            + usage.completion_tokens * self.output_per_1m
        )
        whole = usage.requests * self.per_request * TOKENS_PER_RATE * MS_PER_SECOND
        compute = usage.compute_ms * self.per_compute_second * TOKENS_PER_RATE
        return Nanos(divide_up(whole + compute + tokens * MS_PER_SECOND, TOKENS_PER_RATE * MS_PER_SECOND))

    def scaled(self, numerator: int, denominator: int) -> Self:
        """The same price with every rate multiplied by a fraction, each rounded up to a whole nano."""
        if numerator == denominator:
            return self
        names = ("input_per_1m", "cached_input_per_1m", "output_per_1m", "per_request", "per_compute_second")
        rates = {name: getattr(self, name) for name in names}
        update = {name: divide_up(rate * numerator, denominator) for name, rate in rates.items() if rate is not None}
        return self.model_copy(update=update)

    def at_most(self, prompt_tokens: int, max_tokens: int, max_compute_ms: int = 0) -> Nanos:
        """The most that a request can cost: no cache hit and every token generated."""
        return self.charge(Usage(prompt_tokens=prompt_tokens, completion_tokens=max_tokens, compute_ms=max_compute_ms))

    def affordable_tokens(self, prompt_tokens: int, budget: int, ceiling: int, max_compute_ms: int = 0) -> int:
        """The most completion tokens, up to ``ceiling``, that ``budget`` nanos pay for; -1 if not even the prompt."""
        if self.at_most(prompt_tokens, 0, max_compute_ms) > budget:
            return -1
        if self.output_per_1m == 0:
            return ceiling
        low, high = 0, ceiling
        while low < high:
            middle = (low + high + 1) // 2
            if self.at_most(prompt_tokens, middle, max_compute_ms) <= budget:
                low = middle
            else:
                high = middle - 1
        return low


@lru_cache(maxsize=4096)
def _version_of(price: Price) -> str:
    """Every request asks for it. By value: a copy with other rates is another price."""
    canonical = json.dumps(price.model_dump(mode="json"), sort_keys=True)
    return "pv_" + hashlib.sha256(canonical.encode()).hexdigest()[:12]
