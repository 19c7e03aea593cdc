"""One engine's counters and gauges for Prometheus, under vLLM's names where it has one. Nothing is billed from them."""

from collections.abc import Mapping
from dataclasses import asdict

from ray.util.metrics import Counter, Gauge

from deployments.inference.request import AdapterStats, EngineStats

COUNTERS: Mapping[str, tuple[str, str]] = {
    "farebox_engine_steps": ("steps", "Batches that the engine ran"),
    "farebox_engine_mixed_steps": ("mixed_steps", "Batches that held three or more different adapters"),
    "vllm_prompt_tokens": ("prompt_tokens", "Prompt tokens computed"),
    "vllm_prefix_cache_hits": ("cached_tokens", "Prompt tokens found in the prefix cache"),
    "vllm_generation_tokens": ("generation_tokens", "Tokens generated"),
    "vllm_request_success": ("requests_finished", "Requests that the engine ended"),
    "vllm_num_preemptions": ("preemptions", "Running requests that were preempted"),
    "farebox_engine_requests_aborted": ("requests_aborted", "Requests that were aborted"),
    "farebox_engine_adapter_requests": ("adapter_requests", "Requests that asked for an adapter"),
    "farebox_engine_adapter_hits": ("adapter_hits", "Requests whose adapter was in its slot when they came"),
    "farebox_engine_adapter_loads": ("adapter_loads", "Adapters brought into a slot"),
    "farebox_engine_adapter_disk_loads": ("adapter_disk_loads", "Loads that had to read the disk"),
    "farebox_engine_adapter_load_ms": ("adapter_load_ms", "Milliseconds that those loads took"),
}
GAUGES: Mapping[str, tuple[str, str]] = {
    "vllm_num_requests_running": ("running", "Requests in the batch"),
    "vllm_num_requests_waiting": ("waiting", "Requests that wait to run"),
    "farebox_engine_max_adapters_in_step": ("max_adapters_in_step", "Most adapters seen in one batch"),
    "farebox_engine_queued_tokens": ("queued_tokens", "Most tokens that the requests without an answer may compute"),
    "farebox_engine_kv_blocks_used": ("kv_blocks_used", "Blocks of the key-value cache in use"),
    "farebox_engine_kv_blocks_total": ("kv_blocks_total", "Blocks of the key-value cache"),
    "farebox_engine_adapter_host_bytes": ("adapter_host_bytes", "Host memory used by adapters"),
}
ADAPTERS_SHOWN = 50
"""Adapters with a label of their own, which bounds the number of labels; the others are added up as ``other``."""
OTHER = "other"


class EngineMetrics:
    """Publishes counters as differences since the last call."""

    def __init__(self) -> None:
        self._counters = {name: Counter(name, text) for name, (_, text) in COUNTERS.items()}
        self._gauges = {name: Gauge(name, text) for name, (_, text) in GAUGES.items()}
        self._usage = Gauge("vllm_kv_cache_usage_perc", "Share of the key-value cache's blocks in use")
        self._requests = Gauge("farebox_adapter_requests", "Requests of an adapter", tag_keys=("adapter", "state"))
        self._resident = Gauge("farebox_adapter_resident", "Resident adapters", tag_keys=("adapter", "tier"))
        self._shown: set[tuple[Gauge, str, str]] = set()
        self._last = EngineStats()

    def publish(self, stats: EngineStats) -> None:
        now, before = asdict(stats), asdict(self._last)
        for name, (field, _) in COUNTERS.items():
            if now[field] > before[field]:
                self._counters[name].inc(now[field] - before[field])
        for name, (field, _) in GAUGES.items():
            self._gauges[name].set(now[field])
        self._usage.set(stats.kv_blocks_used / max(1, stats.kv_blocks_total))
        self._publish_adapters(by_label(stats.adapters))
        self._last = stats

    def _publish_adapters(self, adapters: Mapping[tuple[str, str], int]) -> None:
        """Set the gauges, and to zero those of adapters that have gone since the last call."""
        values = {
            (self._resident if state in ("slot", "host", "loading") else self._requests, adapter, state): value
            for (adapter, state), value in adapters.items()
        }
        for gauge, adapter, state in self._shown - values.keys():
            gauge.set(0, tags={"adapter": adapter, _label(gauge, self._resident): state})
        for (gauge, adapter, state), value in values.items():
            gauge.set(value, tags={"adapter": adapter, _label(gauge, self._resident): state})
        self._shown = set(values)


def by_label(adapters: tuple[AdapterStats, ...]) -> dict[tuple[str, str], int]:
    """Requests by (adapter, state) and adapters by (adapter, tier); those with most requests keep their own label."""
    ranked = sorted(adapters, key=lambda one: (-one.running - one.waiting, one.tier != "slot", one.name))
    values: dict[tuple[str, str], int] = {}
    for place, one in enumerate(ranked):
        label = one.name if place < ADAPTERS_SHOWN else OTHER
        for state, value in (("running", one.running), ("waiting", one.waiting), (one.tier, 1)):
            if state and value:
                values[label, state] = values.get((label, state), 0) + value
    return values


def _label(gauge: Gauge, resident: Gauge) -> str:
    return "tier" if gauge is resident else "state"
