"""What changes a price from request to request: volume, the time of day, load, experiments.

Pure: from a listed price and the circumstances of one request to the price it is held at. The order is
fixed, everything is multiplied first and rounded up once per rate, and each modifier is named for the record.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from billing.money import Nanos
from billing.pricing.prices import Price, Usd
from billing.usage import Modifier, Name, TenantId

UNIT = 10_000
"""A multiplier of 1, in ten-thousandths: four decimals are kept."""
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MINUTES_PER_HOUR = 60

_DECIMAL = re.compile(r"(\d{1,3})(?:\.(\d{1,4}))?", re.ASCII)
_CLOCK = re.compile(r"([01]\d|2[0-3]):([0-5]\d)", re.ASCII)


def _factor(value: object) -> int:
    match = _DECIMAL.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f'{value!r} must be a decimal in quotes with at most four decimals, such as "0.85"')
    return int(match[1]) * UNIT + int((match[2] or "").ljust(4, "0"))


def format_factor(factor: int) -> str:
    """Ten-thousandths as a decimal string: 8500 is ``0.85``."""
    whole, part = divmod(factor, UNIT)
    return f"{whole}.{part:04d}".rstrip("0").removesuffix(".")


def _minute(value: object) -> int:
    match = _CLOCK.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f'{value!r} must be a time of day in quotes, such as "22:00"')
    return int(match[1]) * MINUTES_PER_HOUR + int(match[2])


def _instant(value: object) -> datetime:
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        raise ValueError(f'{value!r} must be a moment with its time zone in quotes, such as "2026-12-01T00:00:00Z"')
    return found


def _format_minute(minute: int) -> str:
    return f"{minute // MINUTES_PER_HOUR:02d}:{minute % MINUTES_PER_HOUR:02d}"


Factor = Annotated[int, BeforeValidator(_factor), PlainSerializer(format_factor), Field(ge=100, le=100 * UNIT)]
"""A multiplier from 0.01 to 100: a decimal string on every wire, ten-thousandths in the program."""
Share = Annotated[int, BeforeValidator(_factor), PlainSerializer(format_factor), Field(ge=0, lt=UNIT)]
Minute = Annotated[int, BeforeValidator(_minute), PlainSerializer(_format_minute)]
Instant = Annotated[datetime, BeforeValidator(_instant)]
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]


class _Configured(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Tier(_Configured):
    """From this much settled spend in the tenant's period on, this multiplier."""

    above: Usd
    multiplier: Factor


class Hours(_Configured):
    """A span of the day in the owner's time zone; one that ends before it starts runs over midnight."""

    start: Minute
    end: Minute
    multiplier: Factor
    days: tuple[Day, ...] = ()
    """Days on which it starts; empty is every day."""

    @model_validator(mode="after")
    def _is_a_span(self) -> Self:
        if self.start == self.end:
            raise ValueError("`start` and `end` are the same: leave the entry out, or give the whole day as two")
        return self

    def holds(self, moment: datetime) -> bool:
        minute = moment.hour * MINUTES_PER_HOUR + moment.minute
        if self.start < self.end:
            return self.start <= minute < self.end and self._starts_on(moment.weekday())
        is_after_midnight = minute < self.end
        started_on = moment.weekday() - 1 if is_after_midnight else moment.weekday()
        return (minute >= self.start or is_after_midnight) and self._starts_on(started_on % len(DAYS))

    def _starts_on(self, weekday: int) -> bool:
        return not self.days or DAYS[weekday] in self.days


class Load(_Configured):
    """A multiplier that rises with the load: from 1 at ``starts_at`` of the capacity to ``ceiling`` at all of it."""

    starts_at: Share
    ceiling: Factor

    @model_validator(mode="after")
    def _only_raises(self) -> Self:
        if self.ceiling < UNIT:
            raise ValueError("`ceiling` is below 1: load never makes a price cheaper")
        return self

    def multiplier(self, load: int) -> int:
        """Ten-thousandths, rounded down, for a load in ten-thousandths of the capacity."""
        busy = min(max(load - self.starts_at, 0), UNIT - self.starts_at)
        return UNIT + (self.ceiling - UNIT) * busy // (UNIT - self.starts_at)


class Arm(_Configured):
    """What one share of the tenants gets: another price or a multiplier, other packs or plans, or nothing else."""

    id: Name
    weight: Annotated[int, Field(ge=1, le=1_000)] = 1
    multiplier: Factor = UNIT
    price: Price | None = None
    """In place of the adapter's own."""
    packs: tuple[Name, ...] = ()
    """Hidden packs that this arm is offered."""
    plans: tuple[Name, ...] = ()
    """Hidden plans that this arm is offered."""


class Experiment(_Configured):
    """Arms of a comparison. A tenant stays in its arm while the arms and weights stay."""

    id: Name
    arms: Annotated[tuple[Arm, ...], Field(min_length=2)]
    adapters: tuple[str, ...] = ()
    """Models it is about; empty is all."""
    starts: Instant | None = None
    ends: Instant | None = None

    @model_validator(mode="after")
    def _compares(self) -> Self:
        ids = [arm.id for arm in self.arms]
        if len(set(ids)) != len(ids):
            raise ValueError("two arms have the same `id`")
        if self.starts is not None and self.ends is not None and self.starts >= self.ends:
            raise ValueError("`ends` is not after `starts`")
        return self

    def runs(self, now: datetime) -> bool:
        return (self.starts is None or self.starts <= now) and (self.ends is None or now < self.ends)

    def arm_of(self, tenant: TenantId) -> Arm:
        """Weighted rendezvous hashing: a changed weight moves only as many tenants as it must."""
        return max(self.arms, key=lambda arm: (-arm.weight / math.log(self._chance(arm, tenant)), arm.id))

    def _chance(self, arm: Arm, tenant: TenantId) -> float:
        digest = hashlib.sha256(f"{self.id}\0{arm.id}\0{tenant}".encode()).digest()
        return (int.from_bytes(digest[:6]) + 1) / (2**48 + 2)


class Pricing(_Configured):
    """All modifiers, applied to every priced request in the order of these fields."""

    volume_tiers: tuple[Tier, ...] = ()
    time_of_day: tuple[Hours, ...] = ()
    load: Load | None = None
    experiments: tuple[Experiment, ...] = ()
    time_zone: str = "UTC"

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        try:
            ZoneInfo(self.time_zone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f"time_zone {self.time_zone!r} is unknown: use a name such as Europe/Berlin") from None
        steps = [tier.above for tier in self.volume_tiers]
        if steps != sorted(set(steps)):
            raise ValueError("`volume_tiers` must rise: each `above` more than the one before")
        ids = [experiment.id for experiment in self.experiments]
        if len(set(ids)) != len(ids):
            raise ValueError("two experiments have the same `id`")
        return self


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What a request's price may depend on besides its model."""

    tenant: TenantId
    now_ms: int
    spent_nanos: Nanos = Nanos(0)
    """Settled in the tenant's period so far."""
    load: int = 0
    """Ten-thousandths of the replicas' capacity in use."""


@dataclass(frozen=True, slots=True)
class EffectivePrice:
    """The price a request is held at, and why."""

    price: Price
    modifiers: tuple[Modifier, ...] = ()


def effective(listed: Price, model: str, pricing: Pricing, at: Circumstances) -> EffectivePrice:
    """The price of one request. A free model stays free, whatever the circumstances."""
    if listed.free:
        return EffectivePrice(listed)
    found = list(_found(model, pricing, at))
    price = next((arm_price for _, _, arm_price in found if arm_price is not None), listed)
    factors = [factor for _, factor, _ in found]
    modifiers = tuple(modifier for modifier, _, _ in found)
    return EffectivePrice(price.scaled(math.prod(factors), UNIT ** len(factors)), modifiers)


def offers(pricing: Pricing, tenant: TenantId, now_ms: int) -> Sequence[Arm]:
    """The arms a tenant is in now: what else it may be offered."""
    now = _moment(now_ms)
    return [experiment.arm_of(tenant) for experiment in pricing.experiments if experiment.runs(now)]


def _found(model: str, pricing: Pricing, at: Circumstances) -> Iterator[tuple[Modifier, int, Price | None]]:
    now = _moment(at.now_ms)
    reached = [tier for tier in pricing.volume_tiers if at.spent_nanos >= tier.above]
    if reached:
        yield _named("volume", f"above {reached[-1].model_dump()['above']}", reached[-1].multiplier)
    local = now.astimezone(ZoneInfo(pricing.time_zone))
    hours = next((hours for hours in pricing.time_of_day if hours.holds(local)), None)
    if hours is not None:
        yield _named("time", f"{_format_minute(hours.start)}-{_format_minute(hours.end)}", hours.multiplier)
    if pricing.load is not None and (raised := pricing.load.multiplier(at.load)) != UNIT:
        yield _named("load", "busy", raised)
    for experiment in pricing.experiments:
        if experiment.runs(now) and (not experiment.adapters or model in experiment.adapters):
            arm = experiment.arm_of(at.tenant)
            modifier, factor, _ = _named("experiment", f"{experiment.id}:{arm.id}", arm.multiplier)
            yield modifier, factor, arm.price


def _named(kind: str, name: str, factor: int) -> tuple[Modifier, int, Price | None]:
    return Modifier(kind, name, format_factor(factor)), factor, None


def _moment(now_ms: int) -> datetime:
    return datetime.fromtimestamp(now_ms // 1000, UTC)
