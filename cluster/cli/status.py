"""``farebox status``: what runs, and what needs attention."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import cast

import httpx
import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from billing.clock import now_ms
from cluster.cli.output import JsonOption, dollars, out, table, whole
from cluster.cli.target import Running
from cluster.local.environment import without_password
from cluster.local.settings import Settings
from cluster.local.state import Home, Phase, Run
from cluster.serve_api import RUNNING, Application, ServeUnavailable

LATE_MS = 180_000
"""The exporter runs every minute by default; what ran this long ago is worth a word."""
_UNITS = {"d": 86_400, "h": 3_600, "min": 60, "s": 1}
_STATES = {
    "running": "running",
    "backing_off": "Dodo does not take what is sent",
    "starved": "STARVED of calls to Dodo",
    "stopped": "STOPPED, Dodo refuses the API key or address",
}


@dataclass(frozen=True)
class Status:
    """The state of a farebox; ``--json`` prints its fields."""

    phase: str
    problem: str
    run: Run | None
    applications: dict[str, Application]
    billing: dict[str, object]
    """The answer of ``GET /admin/billing``; empty if the API does not answer."""

    @property
    def is_healthy(self) -> bool:
        return self.phase == Phase.HEALTHY and all(app.status == RUNNING for app in self.applications.values())

    def to_json(self) -> str:
        addresses = {"metrics_url": self.run.metrics_url} if self.run else {}
        fields = asdict(self)
        if self.run:
            fields["run"]["store_url"] = without_password(self.run.store_url)
        return json.dumps({"healthy": self.is_healthy} | addresses | fields, indent=2)


def status(as_json: JsonOption = False) -> None:
    """Show what runs and what needs attention. Exit code 0 if farebox is healthy, else 1."""
    found = read_status(Settings.from_env())
    if as_json:
        print(found.to_json())
    else:
        out.print(status_table(found))
    raise typer.Exit(0 if found.is_healthy else 1)


def read_status(settings: Settings) -> Status:
    """The state of the farebox in this folder, whether it runs or not."""
    run = Home(settings.home).read_run()
    if run is None:
        return Status("stopped", "", None, {}, {})
    if not run.is_alive:
        problem = run.problem or "its supervisor was killed: `farebox up` ends what is left of it and starts again"
        return Status("stopped" if run.phase is not Phase.FAILED else run.phase, problem, run, {}, {})
    running = Running(Home(settings.home), run)
    try:
        applications, problem = running.api().applications(), run.problem
    except ServeUnavailable as error:
        applications, problem = {}, str(error)
    return Status(run.phase, problem, run, applications, _billing(running))


def _billing(running: Running) -> dict[str, object]:
    headers = {"Authorization": f"Bearer {running.environment['FAREBOX_ADMIN_KEY']}"}
    try:
        reply = httpx.get(f"{running.run.api_url}/admin/billing", headers=headers, timeout=5)
    except httpx.HTTPError:
        return {}
    return dict(reply.json()) if reply.status_code == httpx.codes.OK else {}


def status_table(status: Status) -> Group:
    parts: list[Text | Table] = [
        Text(f"farebox is {status.phase}", style="green" if status.is_healthy else "red"),
    ]
    if status.problem:
        parts.append(Text(status.problem))
    if status.applications:
        rows = table("application", "deployment", "status", "replicas", "message")
        for app in status.applications.values():
            for d in app.deployments:
                rows.add_row(app.name, d.name, d.status, f"{d.running} of {d.target}", d.message[:200])
        parts.append(rows)
        if run := status.run:
            parts.append(Text(f"API {run.api_url}  dashboard {run.dashboard_url}  sandbox {run.sandbox_url or '-'}"))
    parts += [Text(line) for line in billing_lines(status.billing, now_ms())] if status.billing else []
    return Group(*(whole(part) if isinstance(part, Text) else part for part in parts))


def billing_lines(billing: Mapping[str, object], now_ms: int) -> Iterator[str]:
    """The export, open holds, what waits for the export, what needs attention, and the last reconciliation."""
    if isinstance(exporter := billing.get("pump"), Mapping):
        yield f"export: {_export(exporter, now_ms)}"
    if open_ := cast(Mapping[str, int], billing.get("money") or {}):
        held = dollars(open_["held_nanos"])
        yield f"holds: {open_['open_holds']} open with {held}, the oldest {span(open_['oldest_hold_s'])}"
        yield f"not exported to Dodo: {billing['backlog']}, the oldest {span(open_['backlog_age_s'])}"
    waiting = {
        "dead letters": "dead_events",
        "withheld records": "withheld_records",
        "parked webhooks": "parked_webhooks",
        "webhooks set aside": "set_aside_webhooks",
        "spooled settlements": "unsettled_on_this_gateway",
        "unresolved settlements": "quarantined_settles",
        "refused settlements": "refused_settles",
        "unreadable settlements": "unreadable_settles",
    }
    yield "needs attention: " + ", ".join(f"{billing.get(key, 0)} {name}" for name, key in waiting.items())
    for scope, proof in cast(Mapping[str, Mapping[str, object]], billing.get("books") or {}).items():
        result = f"{proof['faults']} differences: {proof['named']}" if proof["faults"] else str(proof["unproven"])
        yield f"reconciliation ({scope}): {result or 'no difference'}"


def _export(exporter: Mapping[str, object], now_ms: int) -> str:
    """How the export goes, in words: its state, what waits, when it last succeeded, and what is wrong."""

    def number(name: str) -> int:
        return int(str(exporter.get(name) or 0))

    def ago(name: str) -> str:
        return f"{span((now_ms - number(name)) // 1_000)} ago"

    if not number("last_flush_ms"):
        return "starting"
    held = f"{number('held_events')} events wait for their tenant's Dodo customer" if number("held_events") else ""
    waiting = f"{number('waiting_events')} events wait" if number("waiting_events") else ""
    parts = [
        _STATES.get(str(exporter.get("state")), str(exporter.get("state"))),
        f"last success {ago('last_success_ms')}" if number("last_success_ms") else "nothing exported yet",
        ", ".join(part for part in (waiting, held) if part) or "nothing waits",
    ]
    if number("failures"):
        wait_s = max(0, number("next_try_ms") - now_ms) // 1_000
        parts.append(f"{number('failures')} failures in a row, next try in {span(wait_s)}")
    if number("last_flush_ms") < now_ms - LATE_MS:
        parts.append(f"last run {ago('last_flush_ms')}")
    error = str(exporter.get("error") or "")
    return ", ".join(parts) + (f": {error}" if error else "")


def span(seconds: int) -> str:
    """A length of time in its two largest units, such as ``12 s``, ``3 min 20 s`` and ``2 d 4 h``."""
    left = max(0, seconds)
    found: list[str] = []
    for unit, size in _UNITS.items():
        amount, left = divmod(left, size)
        if amount or (unit == "s" and not found):
            found.append(f"{amount} {unit}")
    return " ".join(found[:2])
