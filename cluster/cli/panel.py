"""What people see: the steps of a start, the newcomer's panel, the state of things, in tables.

Knows Rich and the shapes of what is shown; asks nobody.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from billing.commerce.sync import SyncReport
from billing.money import format_usd
from cluster.cli.operate import Status
from cluster.local.launch import Say
from cluster.local.settings import Settings
from cluster.local.state import Home

QUESTION = "What is the capital of Japan?"
NEXT = "Next: edit serve_config.yaml, then `farebox check` and `farebox deploy` it; `farebox status`; `farebox down`."


@contextmanager
def steps(console: Console) -> Iterator[Say]:
    """Show steps as they come: one line that changes on a terminal, a line each in a log."""
    if not console.is_terminal:
        yield lambda text: console.print(f"· {text}", highlight=False)
        return
    with console.status("") as spinner:
        yield lambda text: spinner.update(text)


def show_welcome(console: Console, settings: Settings, sandbox: bool) -> None:
    """Print all that somebody who has just started their first farebox needs, and one line that works."""
    home = Home(settings.home)
    rows = [("API", f"{settings.api_url}/v1"), ("Ray dashboard", f"{settings.dashboard_url}  (`farebox token`)")]
    command = ""
    if sandbox:
        key = json.loads(home.demo.read_text())["tenants"]["prepaid"]["api_key"]
        rows.insert(1, ("demo key", key))
        rows.append(("Dodo sandbox", f"{settings.sandbox_url}  (no account, no real money)"))
        rows.append(("more keys", str(home.demo)))
        command = f"\nAsk the pirate:\n\n{curl(settings.api_url, key)}\n\n"
    if run := home.run():
        rows.append(("metrics", f"{run.metrics_url}  (Prometheus)"))
    rows.append(("data", str(home.path)))
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value))
    console.print(Panel(table, title="farebox is up", title_align="left", expand=False))
    # Soft wrapping leaves lines whole, so that they can be copied from a terminal of any width.
    console.print(command + NEXT, soft_wrap=True, highlight=False, markup=False)


def curl(api_url: str, key: str) -> str:
    """A shell line, pasteable as it stands."""
    body = json.dumps({"model": "pirate", "messages": [{"role": "user", "content": QUESTION}]})
    return (
        f"curl -s {api_url}/v1/chat/completions \\\n"
        f"  -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \\\n"
        f"  -d '{body}'"
    )


def status_table(status: Status) -> Group:
    """The state of a farebox, for people."""
    style = "green" if status.is_healthy else "red"
    parts: list[Text | Table] = [Text(f"farebox is {status.phase}", style=style)]
    if status.problem:
        parts.append(Text(status.problem))
    if status.applications:
        table = Table("application", "deployment", "status", "replicas", "message")
        for app in status.applications.values():
            for d in app.deployments:
                table.add_row(app.name, d.name, d.status, f"{d.running} of {d.target}", d.message[:200])
        parts.append(table)
    if status.run is not None and status.applications:
        run = status.run
        parts.append(Text(f"API {run.api_url}  dashboard {run.dashboard_url}  sandbox {run.sandbox_url or '-'}"))
    if isinstance(said := status.billing.get("pump"), dict):
        parts.append(Text("pump: " + ", ".join(f"{key} {value}" for key, value in said.items() if value != "")))
    if status.billing:
        parts += [Text(line) for line in money_lines(status.billing)]
    return Group(*parts)


def money_lines(billing: Mapping[str, object]) -> Iterator[str]:
    """What is open, what waits, what needs a person, and whether the books are right."""
    open_ = cast(Mapping[str, int], billing.get("money") or {})
    if open_:
        yield (
            f"holds: {open_['open_holds']} open with ${format_usd(open_['held_nanos'])}, "
            f"the oldest {open_['oldest_hold_s']} s"
        )
        yield f"not told to Dodo: {billing['backlog']}, the oldest {open_['backlog_age_s']} s"
    waiting = {
        "dead letters": "dead_events",
        "withheld records": "withheld_records",
        "parked webhooks": "parked_webhooks",
        "spooled settles": "unsettled_on_this_gateway",
        "unresolved settles": "quarantined_settles",
        "refused settles": "refused_settles",
    }
    yield "needs a look: " + ", ".join(f"{billing.get(key, 0)} {name}" for name, key in waiting.items())
    for kind, proof in cast(Mapping[str, Mapping[str, object]], billing.get("books") or {}).items():
        found = f"{proof['faults']} wrong, {proof['named']}" if proof["faults"] else str(proof["unproven"])
        yield f"books ({kind}): {found or 'every proof holds to the nano'}"


def show_sync(console: Console, report: SyncReport) -> None:
    """What is at Dodo, what is not yet, and what there is not as the configuration says."""
    table = Table("at Dodo", "state", "ours", "theirs")
    for name in report.created:
        table.add_row(name, "to be made")
    for name in report.found:
        differing = [drift for drift in report.drift if drift.name == name]
        if not differing:
            table.add_row(name, "there")
        for drift in differing:
            table.add_row(
                name, f"differs in {drift.what}: change it at Dodo, or here", drift.ours, drift.theirs, style="yellow"
            )
    console.print(table)
