"""The ``farebox`` command as its user meets it: what it refuses, and what it says to do."""

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
from cluster.cli import panel
from cluster.cli.main import app
from cluster.cli.operate import Status
from cluster.local import launch
from cluster.local.settings import Settings
from cluster.local.state import Home, Phase, Run, birth
from cluster.serve_api import Application, Deployment

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


def test_without_a_run_there_is_nothing_to_stop_change_or_size(farebox: Farebox) -> None:
    for words in (("down",), ("deploy", "serve_config.yaml"), ("scale", "2"), ("dodo", "sync")):
        done = farebox(*words)
        assert done.exit_code == 1
        assert "farebox up" in done.stderr, "it says how to start one"


def test_status_is_json_for_programs_and_fails_unless_healthy(farebox: Farebox) -> None:
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
def test_status_shows_the_store_without_its_password(farebox: Farebox, home: Home, url: str, shown: str) -> None:
    home.tell(replace(run_of(os.getpid(), started=1.0, phase=Phase.HEALTHY), store_url=url))
    done = farebox("status", "--json")
    assert json.loads(done.stdout)["run"]["store_url"] == shown
    assert "hunter2" not in done.output + farebox("status").output


def test_a_killed_supervisor_is_told_from_a_stopped_one(farebox: Farebox, home: Home) -> None:
    home.tell(run_of(os.getpid(), started=1.0, phase=Phase.HEALTHY))
    done = farebox("status")
    assert done.exit_code == 1
    assert "was killed" in done.stdout


def test_a_failed_run_says_why_until_the_next(farebox: Farebox, home: Home) -> None:
    home.tell(replace(run_of(os.getpid(), started=1.0, phase=Phase.FAILED), problem="LoraReplica: no such folder"))
    assert "no such folder" in farebox("status").stdout


def test_a_second_up_in_a_folder_says_that_it_runs(farebox: Farebox, home: Home) -> None:
    with home.lock():
        for words in (("up",), ("up", "--detach")):
            done = farebox(*words)
            assert done.exit_code == 1
            assert "already runs" in done.stderr


def test_a_missing_configuration_is_named(farebox: Farebox) -> None:
    done = farebox("up", "--config", "elsewhere.yaml")
    assert done.exit_code == 1
    assert "elsewhere.yaml does not exist" in done.stderr


def test_a_taken_port_is_named_with_its_holder_and_the_way_out(
    farebox: Farebox, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_full_disk_is_said_before_anything_starts(farebox: Farebox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.local.preflight.DISK_MIN_BYTES", 2**62)
    done = farebox("up")
    assert done.exit_code == 1
    assert "MiB are free" in done.stderr


@pytest.mark.parametrize("word", ["0", "many", "-1"])
def test_a_size_that_is_none_is_refused(farebox: Farebox, word: str) -> None:
    assert farebox("scale", "--", word).exit_code == 1


def test_an_old_dodo_word_is_refused_before_anything_starts(farebox: Farebox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_DODO_ENVIRONMENT", "production")
    assert "production" in farebox("up").stderr


def test_a_file_that_lacks_a_running_application_is_refused() -> None:
    running = {name: Application(name, "RUNNING", "", ()) for name in ("farebox", "billing")}
    both = {"applications": [{"name": "farebox"}, {"name": "billing"}]}
    launch.refuse_losses(both, running)
    with pytest.raises(launch.LaunchError, match="billing"):
        launch.refuse_losses({"applications": [{"name": "farebox"}]}, running)


def test_a_problem_is_told_in_the_replicas_own_words() -> None:
    broken = Deployment("LoraReplica", "UPDATING", "ValueError: no such folder", (), 1)
    app_ = Application("farebox", "DEPLOYING", "deploying", (broken,))
    assert "no such folder" in app_.problem
    assert "deploying" not in app_.problem


def test_of_a_traceback_its_last_line_is_told() -> None:
    message = """failed to start. Error:
\x1b[36mray::ServeReplica\x1b[39m
RuntimeError: Traceback (most recent call last):
  File "replica.py", line 1, in __init__
deployments.inference.request.ModelRejected: device is cuda, but torch sees no GPU
"""
    assert serve_api.cause(message).startswith("deployments.inference.request.ModelRejected: device is cuda")
    assert serve_api.cause("waiting for resources: 2 CPUs") == "waiting for resources: 2 CPUs"


class Listing(serve_api.ServeApi):
    """Answers with what it was told instead of asking a dashboard."""

    def __init__(self, *apps: Application) -> None:
        self._apps = {app.name: app for app in apps}

    def applications(self) -> dict[str, Application]:
        return self._apps


def test_a_gateway_that_serve_is_building_anew_runs_not_yet_and_is_no_error() -> None:
    gateway = serve_api.Deployment("Gateway", "HEALTHY", "", ("RUNNING", "STARTING", "RUNNING"), 3)
    assert launch.running(Listing(Application("farebox", "DEPLOYING", "", ())), launch.GATEWAY) == 0
    assert launch.running(Listing(Application("farebox", "RUNNING", "", (gateway,))), launch.GATEWAY) == 2


def test_scaling_pins_the_bounds_and_leaves_the_rest() -> None:
    bounds = {"min_replicas": 1, "max_replicas": 4, "upscale_delay_s": 5}
    replica = {"name": "LoraReplica", "autoscaling_config": bounds}
    config = {"applications": [{"name": "farebox", "deployments": [replica]}]}
    changed = launch.scaled(config, 2)["applications"][0]["deployments"][0]["autoscaling_config"]
    assert changed == {"min_replicas": 2, "max_replicas": 2, "initial_replicas": 2, "upscale_delay_s": 5}
    assert bounds == {"min_replicas": 1, "max_replicas": 4, "upscale_delay_s": 5}


def test_options_go_before_the_file_in_host_and_port(home: Home) -> None:
    settings = Settings.from_env({}, api_port=9001)
    config = launch.addressed({"http_options": {"host": "0.0.0.0", "port": 8000, "keep_alive_timeout_s": 9}}, settings)
    assert config["http_options"] == {"host": "127.0.0.1", "port": 9001, "keep_alive_timeout_s": 9}


def test_the_printed_line_works_when_copied_from_a_narrow_terminal(home: Home) -> None:
    home.demo.write_text(json.dumps({"tenants": {"prepaid": {"api_key": "fbx_" + "k" * 32}}}))
    printed = StringIO()
    panel.show_welcome(Console(file=printed, width=40), Settings.from_env(), sandbox=True)
    line = printed.getvalue().split("Ask the pirate:")[1].split("Next:")[0]
    words = shlex.split(line)
    assert words[0] == "curl"
    assert f"Authorization: Bearer fbx_{'k' * 32}" in words
    assert json.loads(words[words.index("-d") + 1])["model"] == "pirate"


def test_a_healthy_status_needs_every_application() -> None:
    up, down = Application("farebox", "RUNNING", "", ()), Application("billing", "UNHEALTHY", "late", ())
    assert Status("healthy", "", None, {"farebox": up}, {}).is_healthy
    assert not Status("healthy", "", None, {"farebox": up, "billing": down}, {}).is_healthy


def run_of(pid: int, *, started: float | None = None, phase: Phase = Phase.STARTING) -> Run:
    return Run(
        pid=pid, started=started or birth(pid) or 0.0, api_url="http://127.0.0.1:8000", dashboard_url="",
        sandbox_url="", store_url="", config="", ports_base=10_240, haproxy=True, phase=phase,
    )  # fmt: skip
