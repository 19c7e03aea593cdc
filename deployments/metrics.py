"""Counters for people, exported through Ray's Prometheus endpoint. Lossy: nothing is billed from them."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict

from ray.util.metrics import Counter, Gauge, Histogram

from billing.usage import UsageRecord
from deployments.engine.request import EngineStats

SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]

ENGINE_COUNTERS: Mapping[str, str] = {
    "steps": "Batches that the engine ran",
    "mixed_steps": "Batches that held three or more different adapters",
    "prompt_tokens": "Prompt tokens computed or found in the prefix cache",
    "cached_tokens": "Prompt tokens found in the prefix cache",
    "generation_tokens": "Tokens generated",
    "requests_finished": "Requests that the engine ended",
    "requests_aborted": "Requests that were aborted",
    "adapter_loads": "Adapters brought into a slot",
}
ENGINE_GAUGES: Mapping[str, str] = {
    "max_adapters_in_step": "Most adapters seen in one batch",
    "running": "Requests in the batch",
    "waiting": "Requests that wait for a place in the batch",
    "queued_tokens": "Prompt tokens that wait",
    "kv_blocks_used": "Blocks of the key-value cache in use",
    "kv_blocks_total": "Blocks of the key-value cache",
}


class GatewayMetrics:
    """What one gateway saw. Tenants are no label: their number has no bound.

    What every request changes is added up here and handed to Ray by ``publish``: each call into Ray's
    metrics costs a tenth of a hold.
    """

    def __init__(self) -> None:
        self._requests = Counter("farebox_requests", "Requests settled", tag_keys=("model", "status"))
        self._refusals = Counter("farebox_refusals", "Requests refused", tag_keys=("code",))
        self._tokens = Counter("farebox_tokens", "Tokens billed", tag_keys=("model", "kind"))
        self._charged = Counter("farebox_charged_nanos", "Nanos of a US dollar charged", tag_keys=("model",))
        self._spooled = Counter("farebox_spooled_settles", "Settles that had to wait for the store")
        self._open = Gauge("farebox_open_holds", "Holds that this gateway has open")
        self._first = Histogram("farebox_time_to_first_token_seconds", "From the hold to the first token", SECONDS)
        self._seen: defaultdict[tuple[Counter, tuple[tuple[str, str], ...]], int] = defaultdict(int)
        self._open_now = 0

    def publish(self) -> None:
        """Hand over what was added up since the last time."""
        seen = self._seen.copy()
        self._seen.clear()
        for (counter, tags), count in seen.items():
            counter.inc(count, tags=dict(tags))
        self._open.set(self._open_now)

    def refused(self, code: str) -> None:
        self._refusals.inc(1, tags={"code": code})

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def settled(self, model: str, record: UsageRecord) -> None:
        usage = record.usage
        self._add(self._requests, 1, ("model", model), ("status", record.status.value))
        self._add(self._charged, record.charged_nanos, ("model", model))
        self._add(self._tokens, usage.prompt_tokens, ("model", model), ("kind", "prompt"))
        self._add(self._tokens, usage.cached_tokens, ("model", model), ("kind", "cached"))
        self._add(self._tokens, usage.completion_tokens, ("model", model), ("kind", "completion"))

    def _add(self, counter: Counter, count: int, *tags: tuple[str, str]) -> None:
        if count:
            self._seen[counter, tags] += count

    def spooled(self) -> None:
        self._spooled.inc(1)

    def open_holds(self, count: int) -> None:
        self._open_now = count


class EngineMetrics:
    """The engine's own counters, published as differences since the last look."""

    def __init__(self) -> None:
        self._counters = {name: Counter(f"farebox_engine_{name}", text) for name, text in ENGINE_COUNTERS.items()}
        self._gauges = {name: Gauge(f"farebox_engine_{name}", text) for name, text in ENGINE_GAUGES.items()}
        self._last = EngineStats()

    def publish(self, stats: EngineStats) -> None:
        now, before = asdict(stats), asdict(self._last)
        for name, counter in self._counters.items():
            if now[name] > before[name]:
                counter.inc(now[name] - before[name])
        for name, gauge in self._gauges.items():
            gauge.set(now[name])
        self._last = stats
