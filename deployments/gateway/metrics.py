"""A gateway's counters and gauges for Prometheus, exported through Ray. Nothing is billed from them."""

from collections import defaultdict

from ray.util.metrics import Counter, Gauge, Histogram

from billing.usage import UsageRecord

SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]


class GatewayMetrics:
    """Counters and gauges of one gateway. Tenants are no label: their number has no bound.

    What every request changes is added up here and passed to Ray by ``publish``: a call into Ray's metrics costs a
    tenth of a hold.
    """

    def __init__(self) -> None:
        self._requests = Counter("farebox_requests", "Requests settled", tag_keys=("model", "status"))
        self._refusals = Counter("farebox_refusals", "Requests refused", tag_keys=("code",))
        self._tokens = Counter("farebox_tokens", "Tokens billed", tag_keys=("model", "kind"))
        self._charged = Counter("farebox_charged_nanos", "Nanos of a US dollar charged", tag_keys=("model",))
        self._spooled = Counter("farebox_spooled_settles", "Settlements that had to wait for the store")
        self._waiting = Gauge("farebox_spool_settles", "Settlements on this gateway's disk that wait for the store")
        self._refused = Gauge(
            "farebox_spool_refused_settles", "Settlements on this machine's disk that the ledger refused"
        )
        self._unreadable = Gauge(
            "farebox_spool_unreadable_settles", "Settlements on this machine's disk that cannot be read"
        )
        self._task_failures = Gauge(
            "farebox_gateway_task_failures", "Rounds of a gateway's background tasks that an unexpected error ended"
        )
        self._open = Gauge("farebox_open_holds", "Holds that this gateway has open")
        self._first = Histogram("farebox_time_to_first_token_seconds", "From the hold to the first token", SECONDS)
        self._unpublished: defaultdict[tuple[Counter, tuple[tuple[str, str], ...]], int] = defaultdict(int)
        self._open_holds = 0

    def publish(self) -> None:
        """Pass to Ray what was added up since the last call."""
        unpublished = self._unpublished.copy()
        self._unpublished.clear()
        for (counter, tags), count in unpublished.items():
            counter.inc(count, tags=dict(tags))
        self._open.set(self._open_holds)

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
            self._unpublished[counter, tags] += count

    def spooled(self) -> None:
        self._spooled.inc(1)

    def spool(self, waiting: int, refused: int, unreadable: int) -> None:
        self._waiting.set(waiting)
        self._refused.set(refused)
        self._unreadable.set(unreadable)

    def task_failures(self, count: int) -> None:
        self._task_failures.set(count)

    def open_holds(self, count: int) -> None:
        self._open_holds = count
