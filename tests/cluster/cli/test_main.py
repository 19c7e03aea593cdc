"""``farebox up``, ``down``, ``status``, ``deploy`` and ``scale``: their errors, and what they tell a user to do."""

import json
import os
import shlex
import socket
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from cluster import serve_api
from cluster.cli.lifecycle import show_welcome
from cluster.cli.main import app
from cluster.cli.status import Status
from cluster.local import configuration, launch
from cluster.local.settings import Settings
from cluster.local.state import Home, Phase
from cluster.serve_api import GATEWAY, Application, Deployment
from tests.support.cli import run_of

Farebox = Callable[..., Result]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("FAREBOX_HOME", str(tmp_path / ".farebox"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "serve_config.yaml").write_text("applications: []\n")
    return Home.open(Settings.from_env())


@pytest.fixture
def farebox(home: Home) -> Farebox:
    return lambda *words: CliRunner().invoke(app, list(words))


def test_commands_without_a_run_say_how_to_start_one(farebox: Farebox) -> None:
    for words in (("down",), ("deploy", "serve_config.yaml"), ("scale", "2"), ("dodo", "sync")):
        done = farebox(*words)
        assert done.exit_code == 1
        assert "farebox up" in done.stderr, "the message names the remedy"


def test_status_of_a_stopped_farebox(farebox: Farebox) -> None:
    done = farebox("status", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["healthy"] is False
    assert json.loads(done.stdout)["phase"] == "stopped"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("rediss://farebox:hunter2@redis.example.com:6380/0", "rediss://farebox:***@redis.example.com:6380/0"),
        ("redis://:hunter2@redis.example.com", "redis://:***@redis.example.com"),
        ("redis://r:6379?password=hunter2&db=1", "redis://r:6379?password=***&db=1"),
        ("unix://u:hunter2@/run/s.sock", "unix://u:***@/run/s.sock"),
        ("unix:///home/you/.farebox/store/s.sock", "unix:///home/you/.farebox/store/s.sock"),
    ],
)
def test_status_hides_the_stores_password(farebox: Farebox, home: Home, url: str, shown: str) -> None:
    home.write_run(replace(run_of(os.getpid(), started=1.0, phase=Phase.HEALTHY), store_url=url))
    done = farebox("status", "--json")
    assert json.loads(done.stdout)["run"]["store_url"] == shown
    assert "hunter2" not in done.output + farebox("status").output


def test_status_of_a_killed_supervisor(farebox: Farebox, home: Home) -> None:
    home.write_run(run_of(os.getpid(), started=1.0, phase=Phase.HEALTHY))
    done = farebox("status")
    assert done.exit_code == 1
    assert "was killed" in done.stdout


def test_status_of_a_failed_run(farebox: Farebox, home: Home) -> None:
    home.write_run(replace(run_of(os.getpid(), started=1.0, phase=Phase.FAILED), problem="LoraReplica: no such folder"))
    assert "no such folder" in farebox("status").stdout


def test_second_up_is_refused(farebox: Farebox, home: Home) -> None:
    with home.lock():
        for words in (("up",), ("up", "--detach")):
            done = farebox(*words)
            assert done.exit_code == 1
            assert "already runs" in done.stderr


def test_up_names_a_missing_configuration(farebox: Farebox) -> None:
    done = farebox("up", "--config", "elsewhere.yaml")
    assert done.exit_code == 1
    assert "elsewhere.yaml does not exist" in done.stderr


def test_brackets_in_an_error_are_printed(farebox: Farebox) -> None:
    """Rich reads ``[/red]`` as markup."""
    assert "[/red].yaml does not exist" in farebox("up", "--config", "[/red].yaml").stderr


def test_help_shows_the_defaults(farebox: Farebox) -> None:
    """Rich reads ``[default: 8000]`` as markup and prints nothing."""
    assert "default: FAREBOX_PORT, or 8000" in farebox("up", "--help").stdout


def test_up_names_the_process_on_a_taken_port(farebox: Farebox, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        monkeypatch.setenv("FAREBOX_PORT", str(port))
        done = farebox("up")
    assert done.exit_code == 1
    assert f"port {port} is taken" in done.stderr
    assert str(os.getpid()) in done.stderr
    assert "--port" in done.stderr


def test_up_refuses_a_full_disk(farebox: Farebox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.local.preflight.DISK_MIN_BYTES", 2**62)
    done = farebox("up")
    assert done.exit_code == 1
    assert "MiB are free" in done.stderr


@pytest.mark.parametrize("word", ["0", "many", "-1"])
def test_scale_refuses_an_invalid_number(farebox: Farebox, word: str) -> None:
    assert farebox("scale", "--", word).exit_code == 1


def test_up_refuses_an_unknown_dodo_environment(farebox: Farebox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_DODO_ENVIRONMENT", "production")
    assert "production" in farebox("up").stderr


def test_deploy_refuses_to_end_an_application() -> None:
    running = {name: Application(name, "RUNNING", "", ()) for name in ("farebox", "billing")}
    both = {"applications": [{"name": "farebox"}, {"name": "billing"}]}
    launch.refuse_lost_applications(both, running)
    with pytest.raises(launch.LaunchError, match="billing"):
        launch.refuse_lost_applications({"applications": [{"name": "farebox"}]}, running)


def test_problem_is_the_replicas_error() -> None:
    broken = Deployment("LoraReplica", "UPDATING", "ValueError: no such folder", (), 1)
    app_ = Application("farebox", "DEPLOYING", "deploying", (broken,))
    assert "no such folder" in app_.problem
    assert "deploying" not in app_.problem


def test_cause_is_the_last_line_of_a_traceback() -> None:
    message = """failed to start. Error:
\x1b[36mray::ServeReplica\x1b[39m
RuntimeError: Traceback (most recent call last):
  File "replica.py", line 1, in __init__
deployments.inference.request.ModelRejected: device is cuda, but torch sees no GPU
"""
    assert serve_api.cause(message).startswith("deployments.inference.request.ModelRejected: device is cuda")
    assert serve_api.cause("waiting for resources: 2 CPUs") == "waiting for resources: 2 CPUs"


class Listing(serve_api.ServeApi):
    """A client with fixed applications instead of a dashboard."""

    def __init__(self, *apps: Application) -> None:
        self._apps = {app.name: app for app in apps}

    def applications(self) -> dict[str, Application]:
        return self._apps


def test_rebuilt_gateway_does_not_run_yet() -> None:
    gateway = serve_api.Deployment("Gateway", "HEALTHY", "", ("RUNNING", "STARTING", "RUNNING"), 3)
    assert launch.running(Listing(Application("farebox", "DEPLOYING", "", ())), GATEWAY) == 0
    assert launch.running(Listing(Application("farebox", "RUNNING", "", (gateway,))), GATEWAY) == 2


def test_scaled_changes_only_the_bounds() -> None:
    bounds = {"min_replicas": 1, "max_replicas": 4, "upscale_delay_s": 5}
    replica = {"name": "LoraReplica", "autoscaling_config": bounds}
    config = {"applications": [{"name": "farebox", "deployments": [replica]}]}
    changed = configuration.scaled(config, 2)["applications"][0]["deployments"][0]["autoscaling_config"]
    assert changed == {"min_replicas": 2, "max_replicas": 2, "initial_replicas": 2, "upscale_delay_s": 5}
    assert bounds == {"min_replicas": 1, "max_replicas": 4, "upscale_delay_s": 5}


def test_options_win_over_the_file(home: Home) -> None:
    settings = Settings.from_env(port=9001)
    config = configuration.adapted(
        {"http_options": {"host": "0.0.0.0", "port": 8000, "keep_alive_timeout_s": 9}}, settings
    )
    assert config["http_options"] == {"host": "127.0.0.1", "port": 9001, "keep_alive_timeout_s": 9}


def test_example_can_be_copied_from_a_narrow_terminal(home: Home) -> None:
    home.demo.write_text(json.dumps({"tenants": {"prepaid": {"api_key": "fbx_" + "k" * 32}}}))
    printed = StringIO()
    show_welcome(Console(file=printed, width=40), Settings.from_env(), has_sandbox=True)
    line = printed.getvalue().split("Ask the pirate:")[1].split("Next:")[0]
    words = shlex.split(line)
    assert words[0] == "curl"
    assert f"Authorization: Bearer fbx_{'k' * 32}" in words
    assert json.loads(words[words.index("-d") + 1])["model"] == "pirate"


def test_healthy_needs_every_application() -> None:
    up, down = Application("farebox", "RUNNING", "", ()), Application("billing", "UNHEALTHY", "late", ())
    assert Status("healthy", "", None, {"farebox": up}, {}).is_healthy
    assert not Status("healthy", "", None, {"farebox": up, "billing": down}, {}).is_healthy
