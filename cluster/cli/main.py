"""The ``farebox`` command: a thin shell over the supervisor and what operators ask for.

Knows options, exit codes and words for people; every refusal is one message on stderr and exit code 1.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from cluster.cli import books, dead_letters, demo, keys, operate, panel, tenants, unresolved, webhooks
from cluster.cli import report as reports
from cluster.cli.migrate import migrate
from cluster.cli.notices import notices
from cluster.cli.operate import NotRunning, Running
from cluster.cli.standing import Standing
from cluster.cli.verify import verify
from cluster.local import children, commerce
from cluster.local.environment import LIVE, SANDBOX, dodo_environment
from cluster.local.first_run import ensure_models
from cluster.local.launch import HEALTHY_TIMEOUT_S
from cluster.local.preflight import Obstacle, check_machine, check_ports
from cluster.local.settings import Settings, SettingsError
from cluster.local.state import AlreadyRunning, Home, Phase
from cluster.local.supervisor import supervise

DOWN_TIMEOUT_S = 20.0

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Sell your LoRA adapters as an API.",
)
dodo = typer.Typer(no_args_is_help=True, help="What Dodo Payments knows of this farebox.")
app.add_typer(dodo, name="dodo")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(demo.app, name="demo")
app.add_typer(unresolved.app, name="unresolved")
app.add_typer(unresolved.app, name="quarantine", hidden=True)  # its name before 0.2
app.add_typer(tenants.app, name="tenants")
app.add_typer(keys.app, name="keys")
dodo.command()(dead_letters.dead)
dodo.command()(dead_letters.revive)
dodo.command()(verify)
app.command()(books.reconcile)
app.command()(books.usage)
app.command()(reports.report)
app.command()(reports.price)
app.command()(notices)
app.command()(migrate)
out = Console()
err = Console(stderr=True)

File = Annotated[Path, typer.Argument(help="a serve_config.yaml")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="what to serve [default: serve_config.yaml]")]
PortOption = Annotated[int | None, typer.Option(help="of the API [default: 8000, or FAREBOX_PORT]")]
DashboardOption = Annotated[int | None, typer.Option(help="of Ray's dashboard [default: 8265]")]
SandboxOption = Annotated[int | None, typer.Option(help="of the offline Dodo [default: 8010]")]
HaproxyOption = Annotated[
    bool | None, typer.Option("--haproxy/--no-haproxy", help="in front of the API [default: yes]")
]


@app.command()
def up(
    detach: Annotated[bool, typer.Option("--detach", help="return once it is healthy; it runs on")] = False,
    config: ConfigOption = None,
    port: PortOption = None,
    dashboard_port: DashboardOption = None,
    sandbox_port: SandboxOption = None,
    haproxy: HaproxyOption = None,
    timeout: Annotated[float, typer.Option(help="seconds until it must be healthy")] = HEALTHY_TIMEOUT_S,
) -> None:
    """Start everything: the store, the offline Dodo, Ray, the API. Ctrl-C stops all of it."""
    with _refusals():
        settings = Settings.from_env(
            config=config,
            api_port=port,
            dashboard_port=dashboard_port,
            sandbox_port=sandbox_port,
            haproxy=haproxy,
        )
        sandbox = dodo_environment() == SANDBOX
        check_machine(settings)
        home = Home.open(settings)
        home.lock().close()
        if not children.strays(home.path):
            check_ports(settings, needs_sandbox=sandbox)
        ensure_models(settings)
        if detach:
            _start_detached(settings, timeout)
            panel.show_welcome(out, settings, sandbox)
            return
        with panel.steps(out) as say:

            def ready(_: str) -> None:
                say("running; Ctrl-C stops it")
                panel.show_welcome(out, settings, sandbox)

            supervise(settings, say, ready, timeout)


@app.command()
def down() -> None:
    """Stop the farebox of this folder; what it sold and is owed stays."""
    with _refusals():
        running = Running.find(Settings.from_env())
        os.kill(running.run.pid, signal.SIGTERM)
        with panel.steps(out) as say:
            say("stopping")
            deadline = time.monotonic() + DOWN_TIMEOUT_S
            while running.home.is_locked:
                if time.monotonic() > deadline:
                    raise Obstacle(f"it does not end: see {running.home.logs}, or kill process {running.run.pid}")
                time.sleep(0.1)
        out.print("farebox is stopped")


@app.command()
def status(as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False) -> None:
    """Show what runs. Exit code 0 means healthy, 1 anything else."""
    with _refusals():
        found = operate.status(Settings.from_env())
    if as_json:
        print(found.to_json())
    else:
        out.print(panel.status_table(found))
    raise typer.Exit(0 if found.is_healthy else 1)


@app.command()
def check(
    file: File = Path("serve_config.yaml"),
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
    resolved: Annotated[bool, typer.Option("--resolved", help="print it as Serve takes it: paths and digests")] = False,
) -> None:
    """Is this file right? Every key, price and adapter, in a table. Exit code 0 means yes."""
    from cluster.checking.check import check as judge
    from cluster.checking.check import portable

    if resolved:
        with _refusals():
            print(portable(file), end="")
        return
    report = judge(file)
    if as_json:
        print(report.to_json())
    else:
        out.print(report.table())
    raise typer.Exit(0 if report.is_right else 1)


@app.command()
def deploy(
    file: File = Path("serve_config.yaml"),
    retire_plans: Annotated[
        bool, typer.Option("--retire-plans", help="drop plans that tenants are on: those tenants stay on them")
    ] = False,
) -> None:
    """Check a file, apply it, and return when every gateway serves it."""
    with _refusals():
        with panel.steps(out) as say:
            catalog = operate.deploy(Settings.from_env(), file, say, may_retire_plans=retire_plans)
        out.print(f"in force: {', '.join(model.identity for model in catalog.models)}", highlight=False)


@app.command()
def scale(replicas: Annotated[str, typer.Argument(help="a number of LoRA replicas, or `auto`")]) -> None:
    """Run exactly so many LoRA replicas; `auto` goes back to the file's own bounds."""
    with _refusals():
        if replicas != "auto" and not replicas.isdigit():
            raise SettingsError(f"a number or `auto`, not {replicas!r}")
        with panel.steps(out) as say:
            number = operate.scale(Settings.from_env(), None if replicas == "auto" else int(replicas), say)
        out.print(f"{number} LoRA replicas run")


@app.command()
def logs(
    name: Annotated[str, typer.Argument(help="part of a file's name, such as Gateway; all when empty")] = "",
    lines: Annotated[int, typer.Option("-n", help="last lines of each")] = 20,
) -> None:
    """Show the ends of the logs: ours, the store's and Ray Serve's."""
    with _refusals():
        for path in operate.log_files(Settings.from_env()):
            if name.lower() in path.name.lower() and path.stat().st_size:
                out.rule(str(path), align="left")
                tail = path.read_text(errors="replace").splitlines()[-lines:]
                out.print("\n".join(tail), markup=False, highlight=False)


@app.command()
def token() -> None:
    """Print the token that Ray's dashboard asks for."""
    with _refusals():
        print(Home.open(Settings.from_env()).secrets().ray_token)


@app.command("dodo-sandbox", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def dodo_sandbox(context: typer.Context) -> None:
    """Run the offline Dodo alone, with the options of `python -m cluster.dodo_sandbox.server`."""
    from cluster.dodo_sandbox.server import main

    with _refusals():
        settings = Settings.from_env()
        home = Home.open(settings)
        defaults = ["--port", str(settings.sandbox_port), "--state", str(home.dodo)]
        defaults += ["--api-key", home.secrets().dodo_api_key, "--webhook-secret", home.secrets().webhook_secret]
        main([*defaults, *context.args])


@dodo.command("sync")
def dodo_sync(
    config: ConfigOption = None,
    plan: Annotated[bool, typer.Option("--plan", help="only show what it would do")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask, not even in live mode")] = False,
) -> None:
    """Make packs, plans, the meter and the webhook known to Dodo; the same again changes nothing, nothing is deleted.

    Shows first what it will make. In live mode it asks before it makes anything.
    """
    with _refusals():
        standing = Standing.find(Settings.from_env(config=config))
        settings = standing.settings if config is None else replace(standing.settings, config=config.absolute())
        wanted = commerce.resolved(settings)
        intended = commerce.register(wanted, standing.environment, is_dry=True)
        panel.show_sync(out, intended)
        if plan or not intended.created:
            return
        environment = dodo_environment(standing.environment)
        if environment == LIVE and not yes:
            typer.confirm("this is Dodo's live mode: make it?", abort=True)
        made = commerce.register(wanted, standing.environment)
        out.print(f"made: {', '.join(made.created)}", highlight=False)
        if made.webhook_secret and environment != SANDBOX:
            out.print("set DODO_PAYMENTS_WEBHOOK_KEY to the secret that Dodo's dashboard shows for this webhook")


def _start_detached(settings: Settings, timeout_s: float) -> None:
    """Start a supervisor that outlives this command, and wait until it says how it went."""
    home = Home.open(settings)
    home.forget_run()
    command = [sys.executable, "-m", "cluster.local.detached", str(timeout_s)]
    env = os.environ | {name: str(port) for name, port in settings.public_ports.items()}
    env |= {"FAREBOX_HOME": str(home.path), "FAREBOX_CONFIG": str(settings.config)}
    env |= {"FAREBOX_HAPROXY": "1" if settings.haproxy else "0"}
    log = home.logs / "supervisor.log"
    with log.open("ab") as sink:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
        )
    with panel.steps(out) as say:
        told = ""
        while True:
            run = home.run()
            if run is not None and run.pid == process.pid:
                if run.phase is Phase.HEALTHY:
                    return
                if run.phase is Phase.STARTING and run.step != told:
                    say(told := run.step)
            if process.poll() is not None:
                run = home.run()
                raise Obstacle(run.problem if run and run.problem else f"it did not start: see {log}")
            time.sleep(0.1)


@contextmanager
def _refusals() -> Iterator[None]:
    """Say what is wrong and leave with exit code 1."""
    try:
        yield
    except (*commerce.FAILURES, AlreadyRunning, NotRunning) as error:
        err.print(f"[bold red]farebox:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


def main() -> None:
    app()


if __name__ == "__main__":
    main()
