"""Counters for people, exported through Ray's Prometheus endpoint. Lossy: nothing is billed from them."""

from collections import defaultdict

from ray.util.metrics import Counter, Gauge, Histogram

from billing.export.outbox import Backlog, ExporterState
from billing.reconcile.proof_state import ProofState
from billing.reports.unsettled import Unsettled
from billing.usage import UsageRecord

SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]


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
        self._waiting = Gauge("farebox_spool_settles", "Settles on this gateway's disk that wait for the store")
        self._refused = Gauge("farebox_spool_refused_settles", "Settles on this machine's disk that no ledger took")
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

    def spool(self, waiting: int, refused: int) -> None:
        self._waiting.set(waiting)
        self._refused.set(refused)

    def open_holds(self, count: int) -> None:
        self._open_now = count


class MoneyMetrics:
    """What the billing actor sees of the books."""

    def __init__(self) -> None:
        self._holds = Gauge("farebox_ledger_open_holds", "Holds of all gateways that are not settled")
        self._hold_age = Gauge("farebox_ledger_oldest_hold_seconds", "Age of the oldest open hold")
        self._held = Gauge("farebox_ledger_unsettled_nanos", "Nanos of a US dollar that open holds have set aside")
        self._unresolved = Gauge("farebox_quarantine_settles", "Settles that a person must charge or drop")
        self._unsealed = Gauge("farebox_billing_unsealed_entries", "Stream entries not yet sealed for export")
        self._outbox = Gauge("farebox_billing_outbox_events", "Sealed events that Dodo has not acknowledged")
        self._held_events = Gauge("farebox_billing_held_events", "Sealed events whose tenant has no Dodo customer yet")
        self._age = Gauge("farebox_billing_backlog_age_seconds", "Age of the oldest record that Dodo has not been told")
        self._dead = Gauge("farebox_billing_dead_events", "Events that Dodo refused for good")
        self._withheld = Gauge("farebox_billing_withheld_records", "Records not told, since they were altered")
        self._parked = Gauge("farebox_billing_parked_webhooks", "Webhooks that wait for another try")
        self._failures = Gauge("farebox_billing_export_failures", "Failed sends to Dodo in a row")
        self._stopped = Gauge("farebox_billing_export_stopped", "1 while Dodo refuses our key or address")
        self._success = Gauge("farebox_billing_last_success_seconds", "Unix time when Dodo last had everything sent")
        labelled = {"tag_keys": ("kind",)}
        self._drift = Gauge("farebox_reconcile_difference_nanos", "Nanos that are not where they should be", **labelled)
        self._faults = Gauge("farebox_reconcile_faults", "Proofs of the books that do not hold", **labelled)
        self._unproven = Gauge("farebox_reconcile_unproven", "1 where a proof could not be made", **labelled)
        self._proved = Gauge("farebox_reconcile_last_run_seconds", "Unix time of the last pass", **labelled)

    def ledger(self, open_: Unsettled, pump: ExporterState, now_ms: int) -> None:
        self._holds.set(open_.open_holds)
        self._hold_age.set(open_.oldest_hold_s)
        self._held.set(open_.held_nanos)
        self._unresolved.set(open_.unresolved)
        self._age.set(max(open_.oldest_unsealed_s, pump.waiting_s(now_ms)))

    def export(self, pump: ExporterState, backlog: Backlog) -> None:
        self._unsealed.set(backlog.unsealed_entries)
        self._outbox.set(backlog.outbox_events)
        self._held_events.set(pump.held_events)
        self._dead.set(backlog.dead_events)
        self._withheld.set(backlog.withheld_records)
        self._failures.set(pump.failures)
        self._stopped.set(int(pump.state == "stopped"))
        self._success.set(pump.last_success_ms // 1_000)

    def parked(self, webhooks: int) -> None:
        self._parked.set(webhooks)

    def proof(self, kind: str, state: ProofState) -> None:
        tags = {"kind": kind}
        self._drift.set(state.drift_nanos, tags=tags)
        self._faults.set(state.faults, tags=tags)
        self._unproven.set(int(bool(state.unproven)), tags=tags)
        self._proved.set(state.at_ms // 1_000, tags=tags)
