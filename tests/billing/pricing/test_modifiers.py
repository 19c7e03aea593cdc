"""A price depends on circumstances that its record names, in a fixed order, rounded once; what is free stays free."""

import math
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from billing.money import Nanos
from billing.pricing.modifiers import (
    Circumstances,
    EffectivePrice,
    Experiment,
    Pricing,
    effective,
    format_factor,
    offers,
)
from billing.pricing.prices import Price
from billing.usage import TenantId, Usage

LISTED = Price.model_validate({"input_per_1m": "1.00", "cached_input_per_1m": "0.10", "output_per_1m": "3.00"})
ACME = TenantId("acme")
USD = 1_000_000_000


def at(text: str = "2026-03-02T12:00", spent: int = 0, load: int = 0, tenant: str = "acme") -> Circumstances:
    moment = datetime.fromisoformat(text).replace(tzinfo=UTC)
    return Circumstances(TenantId(tenant), int(moment.timestamp()) * 1000, Nanos(spent), load)


def priced(pricing: dict[str, object], when: Circumstances, model: str = "pirate") -> EffectivePrice:
    return effective(LISTED, model, Pricing.model_validate(pricing), when)


def test_without_modifiers_a_price_is_its_list_price() -> None:
    assert priced({}, at()) == EffectivePrice(LISTED)


TIERS = {"volume_tiers": [{"above": "100.00", "multiplier": "0.9"}, {"above": "1000.00", "multiplier": "0.75"}]}


@pytest.mark.parametrize(
    ("spent", "output"),
    [
        (0, 3 * USD),
        (100 * USD - 1, 3 * USD),
        (100 * USD, 2_700_000_000),
        (1000 * USD - 1, 2_700_000_000),
        (1000 * USD, 2_250_000_000),
        (9_000_000 * USD, 2_250_000_000),
    ],
)
def test_highest_tier_reached_counts(spent: int, output: int) -> None:
    assert priced(TIERS, at(spent=spent)).price.output_per_1m == output


NIGHT = {"time_zone": "Europe/Berlin", "time_of_day": [{"start": "22:00", "end": "06:00", "multiplier": "0.5"}]}


@pytest.mark.parametrize(
    ("utc", "is_cheap"),
    [
        ("2026-01-10T20:59", False),
        ("2026-01-10T21:00", True),  # 22:00 in winter
        ("2026-01-11T04:59", True),
        ("2026-01-11T05:00", False),
        ("2026-07-10T19:59", False),
        ("2026-07-10T20:00", True),  # 22:00 in summer
        ("2026-07-11T04:00", False),
    ],
)
def test_hours_are_the_owners_own_over_midnight_and_summer_time(utc: str, is_cheap: bool) -> None:
    found = priced(NIGHT, at(utc))
    assert found.price.output_per_1m == (1_500_000_000 if is_cheap else 3 * USD)
    assert [m.kind for m in found.modifiers] == (["time"] if is_cheap else [])


@pytest.mark.parametrize(
    ("utc", "is_cheap"),
    [("2026-01-09T23:00", True), ("2026-01-10T03:00", True), ("2026-01-10T23:00", False), ("2026-01-09T03:00", False)],
)
def test_span_belongs_to_the_day_it_starts_on(utc: str, is_cheap: bool) -> None:
    """The 9th of January 2026 is a Friday."""
    friday = {"time_of_day": [{"start": "22:00", "end": "06:00", "multiplier": "0.5", "days": ["fri"]}]}
    assert bool(priced(friday, at(utc)).modifiers) == is_cheap


LOAD = {"load": {"starts_at": "0.5", "ceiling": "2"}}


@pytest.mark.parametrize(
    ("load", "multiplier"), [(0, "1"), (5_000, "1"), (5_001, "1.0002"), (7_500, "1.5"), (10_000, "2"), (90_000, "2")]
)
def test_load_raises_a_price_up_to_its_ceiling(load: int, multiplier: str) -> None:
    found = priced(LOAD, at(load=load))
    assert [m.multiplier for m in found.modifiers] == ([] if multiplier == "1" else [multiplier])
    assert found.price.output_per_1m == round(3 * USD * float(multiplier))


ARMS = [{"id": "control"}, {"id": "cheap", "multiplier": "0.8"}]


def test_arm_is_sticky_and_shares_follow_the_weights() -> None:
    experiment = Experiment.model_validate({"id": "e", "arms": [{"id": "a", "weight": 3}, {"id": "b", "weight": 1}]})
    arms = [experiment.arm_of(TenantId(f"t{n}")).id for n in range(4000)]
    assert arms == [experiment.arm_of(TenantId(f"t{n}")).id for n in range(4000)]
    assert 2_850 < arms.count("a") < 3_150


def test_changed_weight_moves_tenants_to_the_arm_that_gained() -> None:
    def arms(weight: int) -> list[str]:
        arms = [{"id": "a", "weight": weight}, {"id": "b"}, {"id": "c"}]
        experiment = Experiment.model_validate({"id": "e", "arms": arms})
        return [experiment.arm_of(TenantId(f"t{n}")).id for n in range(1000)]

    moved = [(old, new) for old, new in zip(arms(1), arms(2), strict=True) if old != new]
    assert moved
    assert {new for _, new in moved} == {"a"}


@pytest.mark.parametrize(
    ("utc", "runs"), [("2026-03-01T23:59", False), ("2026-03-02T00:00", True), ("2026-04-02T00:00", False)]
)
def test_experiment_starts_and_stops(utc: str, runs: bool) -> None:
    span = {"starts": "2026-03-02T00:00:00Z", "ends": "2026-04-02T00:00:00Z"}
    pricing = {"experiments": [{"id": "e", "arms": ARMS, **span}]}
    assert bool(priced(pricing, at(utc)).modifiers) == runs
    assert bool(offers(Pricing.model_validate(pricing), ACME, at(utc).now_ms)) == runs


def test_experiment_covers_its_adapters_and_an_arm_may_have_a_price() -> None:
    arms = [{"id": "one", "price": {"per_request": "0.01"}}, {"id": "two", "price": {"per_request": "0.02"}}]
    pricing = {"experiments": [{"id": "e", "arms": arms, "adapters": ["pirate"]}], **TIERS}
    assert priced(pricing, at(), "yaml").price == LISTED
    found = priced(pricing, at(spent=100 * USD))
    assert found.price.per_request in (9_000_000, 18_000_000), "the volume's multiplier applies to the arm's price"
    assert [m.kind for m in found.modifiers] == ["volume", "experiment"]


def test_all_modifiers_multiply_and_stand_in_their_order() -> None:
    pricing = TIERS | LOAD | {"time_of_day": [{"start": "12:00", "end": "13:00", "multiplier": "0.5"}]}
    pricing["experiments"] = [{"id": "e", "arms": [{"id": "a", "multiplier": "1.1"}, {"id": "b", "multiplier": "1.1"}]}]
    found = priced(pricing, at(spent=100 * USD, load=7_500))
    assert [m.kind for m in found.modifiers] == ["volume", "time", "load", "experiment"]
    assert found.price.output_per_1m == 2_227_500_000  # 3 x 0.9 x 0.5 x 1.5 x 1.1
    assert found.price.version != LISTED.version


def test_free_model_stays_free() -> None:
    free = Price(free=True)
    assert effective(free, "pirate", Pricing.model_validate(LOAD), at(load=UNIT_LOAD)) == EffectivePrice(free)


UNIT_LOAD = 10_000


@given(
    rate=st.integers(1, 10**12),
    numerators=st.lists(st.integers(100, 1_000_000), max_size=4),
    tokens=st.integers(0, 10**6),
)
def test_scaled_price_is_rounded_up_by_less_than_a_nano(rate: int, numerators: list[int], tokens: int) -> None:
    numerator, denominator = math.prod(numerators), 10_000 ** len(numerators)
    price = LISTED.model_copy(update={"output_per_1m": Nanos(rate)}).scaled(numerator, denominator)
    assert 0 <= price.output_per_1m * denominator - rate * numerator < denominator
    charged = price.charge(Usage(completion_tokens=tokens, requests=0))
    assert charged * 10**6 * denominator >= rate * numerator * tokens


@pytest.mark.parametrize(
    ("pricing", "word"),
    [
        ({"volume_tiers": [{"above": "5", "multiplier": 0.9}]}, "in quotes"),
        ({"volume_tiers": [{"above": "5", "multiplier": "0.00001"}]}, "four decimals"),
        ({"volume_tiers": [{"above": "5", "multiplier": "0"}]}, "greater than or equal"),
        ({"volume_tiers": [{"above": "9", "multiplier": "1"}, {"above": "5", "multiplier": "1"}]}, "must rise"),
        ({"time_of_day": [{"start": "9:00", "end": "10:00", "multiplier": "1"}]}, "time of day"),
        ({"time_of_day": [{"start": "09:00", "end": "09:00", "multiplier": "1"}]}, "the same"),
        ({"time_of_day": [{"start": "09:00", "end": "24:00", "multiplier": "1"}]}, "time of day"),
        ({"load": {"starts_at": "0.5", "ceiling": "0.9"}}, "below 1"),
        ({"load": {"starts_at": "1", "ceiling": "2"}}, "less than"),
        ({"experiments": [{"id": "e", "arms": [{"id": "a"}]}]}, "at least 2"),
        ({"experiments": [{"id": "e", "arms": [{"id": "a"}, {"id": "a"}]}]}, "same `id`"),
        ({"experiments": [{"id": "e", "arms": ARMS}, {"id": "e", "arms": ARMS}]}, "same `id`"),
        ({"experiments": [{"id": "e", "arms": ARMS, "starts": "2026-01-01T00:00:00"}]}, "time zone in quotes"),
        ({"time_zone": "Mars/Olympus"}, "Europe/Berlin"),
        ({"volume_teirs": []}, "Extra inputs"),
    ],
)
def test_bad_modifier_is_refused_with_what_to_do(pricing: dict[str, object], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        Pricing.model_validate(pricing)


def test_configured_pricing_survives_its_own_json() -> None:
    pricing = Pricing.model_validate(TIERS | NIGHT | LOAD | {"experiments": [{"id": "e", "arms": ARMS}]})
    assert Pricing.model_validate_json(pricing.model_dump_json()) == pricing
    assert [format_factor(f) for f in (10_000, 8_500, 12_345, 100)] == ["1", "0.85", "1.2345", "0.01"]
