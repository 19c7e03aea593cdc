"""Starts and ends the processes of one farebox, and finds those that an earlier run left behind.

A process belongs to a farebox if its environment variable ``FAREBOX_OWNER`` holds that farebox's folder. Children
inherit it. Names and process ids from files are not used for that, as they may belong to other processes.
"""

import os
import signal
import subprocess
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.valkey import die_with_parent

OWNER = "FAREBOX_OWNER"
"""The environment variable with the folder of the farebox that a process belongs to."""


@dataclass
class Child:
    """A child process, in a session of its own so that Ctrl-C reaches only the supervisor."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def end(self, timeout_s: float) -> None:
        """Terminate the process, kill it after ``timeout_s``, and kill every process that it started."""
        descendants = _descendants(self.process.pid)
        self.process.terminate()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        _kill(descendants)

    def tail(self, lines: int = 15) -> str:
        """The last lines of its log, for an error message."""
        return "\n".join(self.log.read_text(errors="replace").strip().splitlines()[-lines:])


def start(name: str, command: Sequence[str], env: Mapping[str, str], home: Path, log: Path) -> Child:
    """Start a child that ends when this process ends, even if that is killed. Call from the main thread."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            command,
            env=dict(env) | {OWNER: str(home)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )
    return Child(name, process, log)


def processes_of(home: Path, excluded: Collection[int] = ()) -> list[psutil.Process]:
    """The living processes of the farebox in ``home``, without this one and those with an ``excluded`` id."""
    excluded = {os.getpid(), *excluded}
    return [p for p in psutil.process_iter() if p.pid not in excluded and _owner(p) == str(home)]


def end_processes_of(home: Path, excluded: Collection[int] = (), timeout_s: float = 3.0) -> int:
    """Terminate those processes, kill them after ``timeout_s``, and return how many there were."""
    found = processes_of(home, excluded)
    for process in found:
        _signal(process, signal.SIGTERM)
    _kill(_wait(found, timeout_s))
    deadline = time.monotonic() + timeout_s
    while (started_meanwhile := processes_of(home, excluded)) and time.monotonic() < deadline:
        _kill(started_meanwhile)
    return len(found)


def holder_of(port: int) -> str:
    """Name and id of the process that listens on a port, or an empty string if it cannot be found."""
    for process in psutil.process_iter(["name"]):
        try:
            found = process.net_connections("tcp")
        except psutil.Error:
            continue
        if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in found):
            return f"{process.info['name']} (process {process.pid})"
    return ""


def _owner(process: psutil.Process) -> str | None:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process.environ().get(OWNER)
    except psutil.Error:
        return None


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _kill(processes: Iterable[psutil.Process]) -> None:
    left = list(processes)
    for process in left:
        _signal(process, signal.SIGKILL)
    _wait(left, 2.0)


def _wait(processes: Iterable[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Wait for processes to end; returns those that still run. A zombie has ended: a container may never reap it."""
    left = list(processes)
    deadline = time.monotonic() + timeout_s
    while (left := [p for p in left if _is_alive(p)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
