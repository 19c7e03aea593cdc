"""``farebox up``, ``down``, ``logs`` and ``token``: the farebox of this folder, started, stopped and looked into."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.cli.output import out, panel, steps
from cluster.cli.target import Running
from cluster.local import children, demo, ray_node
from cluster.local.detached import start_detached
from cluster.local.environment import SANDBOX, dodo_environment
from cluster.local.launch import HEALTHY_TIMEOUT_S, LaunchError
from cluster.local.preflight import check_machine, check_ports
from cluster.local.settings import Settings
from cluster.local.state import Home
from cluster.local.supervisor import supervise

DOWN_TIMEOUT_S = 20.0
QUESTION = "What is the capital of Japan?"
NEXT = "Next: edit serve_config.yaml, then run `farebox check` and `farebox deploy`; `farebox status`; `farebox down`."

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="The configuration file (default: FAREBOX_CONFIG, or serve_config.yaml)."),
]


def up(
    detach: Annotated[
        bool, typer.Option("--detach", help="Run in the background; return when farebox is healthy.")
    ] = False,
    config: ConfigOption = None,
    port: Annotated[int | None, typer.Option(help="Port of the API (default: FAREBOX_PORT, or 8000).")] = None,
    dashboard_port: Annotated[
        int | None, typer.Option(help="Port of Ray's dashboard (default: FAREBOX_DASHBOARD_PORT, or 8265).")
    ] = None,
    sandbox_port: Annotated[
        int | None, typer.Option(help="Port of the Dodo sandbox (default: FAREBOX_SANDBOX_PORT, or 8010).")
    ] = None,
    haproxy: Annotated[
        bool | None,
        typer.Option(
            "--haproxy/--no-haproxy", help="Put HAProxy in front of the API (default: FAREBOX_HAPROXY, or yes)."
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds until farebox must be healthy.")] = HEALTHY_TIMEOUT_S,
) -> None:
    """Start the store, the Dodo sandbox, Ray and the API. Ctrl-C stops all of them."""
    settings = Settings.from_env(
        config=config, port=port, dashboard_port=dashboard_port, sandbox_port=sandbox_port, haproxy=haproxy
    )
    has_sandbox = dodo_environment() == SANDBOX
    check_machine(settings)
    home = Home.open(settings)
    home.lock().close()
    if not children.processes_of(home.path):
        check_ports(settings, needs_sandbox=has_sandbox)
    demo.ensure_models(settings)
    with steps() as progress:
        if detach:
            start_detached(settings, progress, timeout)
        else:

            def on_healthy() -> None:
                progress("running; Ctrl-C stops it")
                show_welcome(out, settings, has_sandbox)

            supervise(settings, progress, on_healthy, timeout)
    if detach:
        show_welcome(out, settings, has_sandbox)


def show_welcome(console: Console, settings: Settings, has_sandbox: bool) -> None:
    """Print the addresses and keys of a farebox that is healthy, and a command that asks a demo model."""
    home = Home(settings.home)
    rows = [("API", f"{settings.api_url}/v1"), ("Ray dashboard", f"{settings.dashboard_url}  (`farebox token`)")]
    example = ""
    if has_sandbox:
        key = json.loads(home.demo.read_text())["tenants"]["prepaid"]["api_key"]
        rows.insert(1, ("demo key", key))
        rows.append(("Dodo sandbox", f"{settings.sandbox_url}  (no account, no real money)"))
        rows.append(("more keys", str(home.demo)))
        example = f"\nAsk the pirate:\n\n{_curl(settings.api_url, key)}\n\n"
    if run := home.read_run():
        rows.append(("metrics", f"{run.metrics_url}  (Prometheus)"))
    rows.append(("data", str(home.path)))
    console.print(panel(console, "farebox is up", rows), soft_wrap=True)
    # Soft wrapping adds no line breaks, so that the command can be copied from a narrow terminal.
    console.print(example + NEXT, soft_wrap=True)


def _curl(api_url: str, key: str) -> str:
    body = json.dumps({"model": "pirate", "messages": [{"role": "user", "content": QUESTION}]})
    return (
        f"curl -s {api_url}/v1/chat/completions \\\n"
        f"  -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \\\n"
        f"  -d '{body}'"
    )


def down() -> None:
    """Stop the farebox of this folder. Its ledger and all other data stay."""
    running = Running.find(Settings.from_env())
    os.kill(running.run.pid, signal.SIGTERM)
    with steps() as progress:
        progress("stopping")
        deadline = time.monotonic() + DOWN_TIMEOUT_S
        while running.home.is_locked:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"farebox did not stop within {DOWN_TIMEOUT_S:g} s: see the logs in {running.home.logs}, "
                    f"or kill process {running.run.pid}"
                )
            time.sleep(0.1)
    out.print("farebox is stopped")


def logs(
    name: Annotated[str, typer.Argument(help="Part of a log's file name, such as Gateway (default: every log).")] = "",
    lines: Annotated[int, typer.Option("-n", help="How many lines of each log.")] = 20,
) -> None:
    """Show the last lines of the logs of farebox, the store and Ray Serve."""
    home = Home(Settings.from_env().home)
    serve = ray_node.ray_folder(ray_node.folder(home.path)) / "session_latest" / "logs" / "serve"
    for path in (log for folder in (home.logs, home.store, serve) for log in sorted(folder.glob("*.log"))):
        if name.lower() in path.name.lower() and path.stat().st_size:
            out.print(f"==> {path} <==", style="bold")
            out.print("\n".join(path.read_text(errors="replace").splitlines()[-lines:]))


def token() -> None:
    """Print the token that Ray's dashboard asks for."""
    print(Home.open(Settings.from_env()).secrets().ray_token)
