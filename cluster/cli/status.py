"""``farebox status``: what runs, and what needs attention."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import cast

import httpx
import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cluster.cli.output import JsonOption, dollars, out, table
from cluster.cli.target import Running
from cluster.local.settings import Settings
from cluster.local.state import Home, Phase, Run
from cluster.serve_api import RUNNING, Application, ServeUnavailable


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


def without_password(url: str) -> str:
    """A store's URL with ``***`` for its password, which may be before the host or in the query."""
    return re.sub(r"([?&_]password=)[^&]*", r"\1***", re.sub(r"(://[^:@/]*:).*@", r"\1***@", url))


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
    parts += [Text(line) for line in billing_lines(status.billing)] if status.billing else []
    return Group(*parts)


def billing_lines(billing: Mapping[str, object]) -> Iterator[str]:
    """Open holds, what waits for the export, what needs attention, and the last reconciliation."""
    if isinstance(exporter := billing.get("pump"), Mapping):
        yield "export: " + ", ".join(f"{key} {value}" for key, value in exporter.items() if value != "")
    if open_ := cast(Mapping[str, int], billing.get("money") or {}):
        held = dollars(open_["held_nanos"])
        yield f"holds: {open_['open_holds']} open with {held}, the oldest {open_['oldest_hold_s']} s"
        yield f"not exported to Dodo: {billing['backlog']}, the oldest {open_['backlog_age_s']} s"
    waiting = {
        "dead letters": "dead_events",
        "withheld records": "withheld_records",
        "parked webhooks": "parked_webhooks",
        "webhooks set aside": "set_aside_webhooks",
        "spooled settlements": "unsettled_on_this_gateway",
        "unresolved settlements": "quarantined_settles",
        "refused settlements": "refused_settles",
    }
    yield "needs attention: " + ", ".join(f"{billing.get(key, 0)} {name}" for name, key in waiting.items())
    for scope, proof in cast(Mapping[str, Mapping[str, object]], billing.get("books") or {}).items():
        result = f"{proof['faults']} differences: {proof['named']}" if proof["faults"] else str(proof["unproven"])
        yield f"reconciliation ({scope}): {result or 'no difference'}"
