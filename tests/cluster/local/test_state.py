"""The folder of a farebox: who may read it, who holds it, and whose a process is."""

import os
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster.local import children
from cluster.local.settings import Settings
from cluster.local.state import AlreadyRunning, Home, Phase, Run, birth

SLEEPING = "import time; time.sleep(60)"
SLEEP = [sys.executable, "-c", SLEEPING]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.open(Settings(home=tmp_path / ".farebox", config=tmp_path / "serve_config.yaml"))


def run_of(pid: int) -> Run:
    return Run(
        pid=pid, started=birth(pid) or 0.0, api_url="http://127.0.0.1:8000", dashboard_url="", sandbox_url="",
        store_url="", config="", ports_base=10_240, haproxy=True,
    )  # fmt: skip


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_folder_and_its_secrets_are_their_owners_alone(home: Home) -> None:
    home.secrets()
    home.tell(run_of(os.getpid()))
    assert mode(home.path) == 0o700
    assert mode(home.path / "secrets.json") == 0o600
    assert mode(home.path / "run.json") == 0o600


def test_secrets_are_made_once_and_differ_between_folders(home: Home, tmp_path: Path) -> None:
    made = home.secrets()
    assert home.secrets() == made
    other = Home.open(Settings(home=tmp_path / "other", config=tmp_path / "c")).secrets()
    assert not {made.admin_key, made.ray_token, made.dodo_api_key, made.webhook_secret} & {
        other.admin_key, other.ray_token, other.dodo_api_key, other.webhook_secret,
    }  # fmt: skip


def test_secrets_show_nothing_of_themselves(home: Home) -> None:
    made = home.secrets()
    assert repr(made) == "Secrets()"


def test_a_folder_has_one_supervisor_at_a_time(home: Home) -> None:
    with home.lock():
        assert home.is_locked
        with pytest.raises(AlreadyRunning, match="already runs"):
            home.lock()
    assert not home.is_locked


def test_a_killed_supervisor_leaves_no_lock(home: Home) -> None:
    hold = f"import fcntl, sys, time; f = open({str(home.path / 'lock')!r}, 'a'); fcntl.flock(f, fcntl.LOCK_EX)"
    holder = subprocess.Popen([sys.executable, "-c", f"{hold}; print('held', flush=True); time.sleep(60)"], stdout=-1)
    assert holder.stdout is not None
    holder.stdout.readline()
    assert home.is_locked
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert not home.is_locked


def test_a_run_reads_back_as_it_was_told(home: Home) -> None:
    told = home.tell(replace(run_of(os.getpid()), phase=Phase.FAILED, problem="no disk", pids={"ray": 1}))
    assert home.run() == told
    home.forget_run()
    assert home.run() is None


def test_a_number_that_was_given_to_another_process_is_not_the_run(home: Home) -> None:
    run = run_of(os.getpid())
    assert run.is_alive
    assert not replace(run, started=run.started - 1).is_alive
    assert not replace(run, pid=2**22 - 3).is_alive


def test_a_corpse_is_not_alive() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 10
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert birth(process.pid) is None
    process.wait()


def test_strays_of_this_folder_are_ended_with_their_children_and_strangers_are_left(home: Home, tmp_path: Path) -> None:
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
        assert [p.pid for p in children.strays(home.path)] == [orphan]
        assert children.strays(home.path, spare={orphan}) == []
        assert children.end_strays(home.path) == 1
        assert birth(orphan) is None
        assert stranger.poll() is None
        assert bystander.poll() is None
    finally:
        for process in (stranger, bystander):
            process.kill()
            process.wait()


def test_a_child_that_ignores_a_request_to_stop_is_stopped_all_the_same(home: Home) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    child = children.start("deaf", [sys.executable, "-c", deaf], dict(os.environ), home.path, home.logs / "deaf.log")
    while "up" not in child.tail():
        time.sleep(0.01)
    assert os.getsid(child.process.pid) == child.process.pid, "a session of its own: Ctrl-C is the supervisor's"
    child.end(patience_s=0.2)
    assert child.has_ended


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_children_end_when_their_supervisor_is_killed(home: Home) -> None:
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
    assert birth(child) is not None
    supervisor.send_signal(signal.SIGKILL)
    supervisor.wait()
    supervisor.stdout.close()
    deadline = time.monotonic() + 5
    while birth(child) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
