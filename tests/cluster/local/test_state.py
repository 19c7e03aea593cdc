"""The folder of a farebox, its lock, and the processes that belong to it."""

import os
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster.local import children
from cluster.local.settings import Settings
from cluster.local.state import AlreadyRunning, Home, Phase, start_time
from tests.support.cli import run_of
from tests.support.waiting import eventually

SLEEPING = "import time; time.sleep(60)"
SLEEP = [sys.executable, "-c", SLEEPING]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.open(Settings(home=tmp_path / ".farebox", config=tmp_path / "serve_config.yaml"))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_folder_is_private(home: Home) -> None:
    home.secrets()
    home.write_run(run_of(os.getpid()))
    assert mode(home.path) == 0o700
    assert mode(home.path / "secrets.json") == 0o600
    assert mode(home.path / "run.json") == 0o600


def test_secrets_are_generated_once(home: Home, tmp_path: Path) -> None:
    made = home.secrets()
    assert home.secrets() == made
    other = Home.open(Settings(home=tmp_path / "other", config=tmp_path / "c")).secrets()
    assert not {made.admin_key, made.ray_token, made.dodo_api_key, made.webhook_secret} & {
        other.admin_key, other.ray_token, other.dodo_api_key, other.webhook_secret,
    }  # fmt: skip


def test_secrets_are_not_in_their_repr(home: Home) -> None:
    made = home.secrets()
    assert repr(made) == "Secrets()"


def test_folder_lock(home: Home) -> None:
    with home.lock():
        assert home.is_locked
        with pytest.raises(AlreadyRunning, match="already runs"):
            home.lock()
    assert not home.is_locked


def test_lock_ends_with_its_process(home: Home) -> None:
    hold = f"import fcntl, sys, time; f = open({str(home.path / 'lock')!r}, 'a'); fcntl.flock(f, fcntl.LOCK_EX)"
    holder = subprocess.Popen([sys.executable, "-c", f"{hold}; print('held', flush=True); time.sleep(60)"], stdout=-1)
    assert holder.stdout is not None
    holder.stdout.readline()
    assert home.is_locked
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert not home.is_locked


def test_run_is_read_as_written(home: Home) -> None:
    written = home.write_run(replace(run_of(os.getpid()), phase=Phase.FAILED, problem="no disk", pids={"ray": 1}))
    assert home.read_run() == written
    home.remove_run()
    assert home.read_run() is None


def test_reused_process_id_is_not_the_run(home: Home) -> None:
    run = run_of(os.getpid())
    assert run.is_alive
    assert not replace(run, started=run.started - 1).is_alive
    assert not replace(run, pid=2**22 - 3).is_alive


def test_zombie_is_not_alive() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    eventually(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
    assert start_time(process.pid) is None
    process.wait()


def test_only_processes_of_the_folder_are_ended(home: Home, tmp_path: Path) -> None:
    nest = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {SLEEPING!r}]).pid, flush=True)"
    parent = subprocess.Popen(
        [sys.executable, "-c", nest], env=os.environ | {children.OWNER: str(home.path)}, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    orphan = int(parent.stdout.readline())
    parent.wait()
    parent.stdout.close()
    stranger = subprocess.Popen(SLEEP, env=os.environ | {children.OWNER: str(tmp_path / "another")})
    bystander = subprocess.Popen(SLEEP)
    try:
        assert [p.pid for p in children.processes_of(home.path)] == [orphan]
        assert children.processes_of(home.path, excluded={orphan}) == []
        assert children.end_processes_of(home.path) == 1
        assert start_time(orphan) is None
        assert stranger.poll() is None
        assert bystander.poll() is None
    finally:
        for process in (stranger, bystander):
            process.kill()
            process.wait()


def test_child_is_killed_if_it_ignores_sigterm(home: Home) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    child = children.start("deaf", [sys.executable, "-c", deaf], dict(os.environ), home.path, home.logs / "deaf.log")
    eventually(lambda: "up" in child.tail())
    assert os.getsid(child.process.pid) == child.process.pid, "a session of its own, so that Ctrl-C does not reach it"
    child.end(timeout_s=0.2)
    assert child.has_ended


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_children_end_with_their_supervisor(home: Home) -> None:
    script = (
        "import os, sys, time\nfrom pathlib import Path\nfrom cluster.local import children\n"
        f"home = Path({str(home.path)!r})\n"
        f"command = [sys.executable, '-c', {SLEEPING!r}]\n"
        "child = children.start('c', command, dict(os.environ), home, home / 'c.log')\n"
        "print(child.process.pid, flush=True)\ntime.sleep(60)\n"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert supervisor.stdout is not None
    child = int(supervisor.stdout.readline())
    assert start_time(child) is not None
    supervisor.send_signal(signal.SIGKILL)
    supervisor.wait()
    supervisor.stdout.close()
    eventually(lambda: start_time(child) is None)
