"""When a key counts as used like a stolen one, as the owner configures it; ``billing.abuse`` judges by it."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from billing.catalog.plans import Limits
from billing.money import Nanos
from billing.pricing.prices import Usd

REMEMBERED_HOURS = 7 * 24
"""How much of a key's past it is compared with."""


class Abuse(BaseModel):
    """What gets a key throttled, and what a throttled key may still do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    watch: bool = True
    """False: no key is throttled from now on; those that are stay so."""
    hourly_cap: Usd = Nanos(1_000_000_000)
    """The most that a throttled key may spend in an hour."""
    requests_per_minute: Annotated[int, Field(gt=0)] = 6
    """Requests that it may make, whatever they cost."""
    spend_factor: Annotated[int, Field(ge=2)] = 20
    """Spending so many times the mean of its busy hours in the last week is unusual."""
    spend_at_least: Usd = Nanos(10_000_000_000)
    """Less than this in an hour is never unusual."""
    long_hours: Annotated[int, Field(ge=1, le=REMEMBERED_HOURS)] = 3
    """So many hours in a row in which nearly every answer is as long as the longest look like scraping."""
    long_requests: Annotated[int, Field(ge=1)] = 500
    """Each of these hours has at least so many answers,"""
    long_tokens: Annotated[int, Field(ge=1)] = 256
    """and the longest at least so many tokens."""
    addresses: Annotated[int, Field(ge=1)] = 100
    """Client addresses in an hour; counted only where ``trusted_proxies`` says how they are known."""

    @property
    def limits(self) -> Limits:
        return Limits(requests_per_minute=self.requests_per_minute)
