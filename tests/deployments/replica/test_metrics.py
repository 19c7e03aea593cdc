"""Metrics of an engine, and the bound on their labels."""

from dataclasses import fields

from deployments.inference.request import AdapterStats, EngineStats
from deployments.replica.metrics import ADAPTERS_SHOWN, COUNTERS, GAUGES, OTHER, by_label


def test_metrics_are_fields_of_engine_stats() -> None:
    known = {field.name for field in fields(EngineStats)}
    assert {field for field, _ in [*COUNTERS.values(), *GAUGES.values()]} <= known


def test_adapters_beyond_bound_are_summed() -> None:
    busy = [AdapterStats(f"busy{i}", str(i), "slot", running=2, waiting=1) for i in range(ADAPTERS_SHOWN)]
    idle = [AdapterStats(f"idle{i}", str(i), "host") for i in range(1000)]
    values = by_label((*idle, *busy))
    assert {label for label, _ in values} == {OTHER, *(one.name for one in busy)}
    assert values[OTHER, "host"] == 1000
    assert values["busy7", "running"] == 2
    assert values["busy7", "waiting"] == 1
    assert values["busy7", "slot"] == 1


def test_waiting_adapter_has_no_tier() -> None:
    assert by_label((AdapterStats("a", "d", "", waiting=3),)) == {("a", "waiting"): 3}
