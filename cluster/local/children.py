"""Starts, ends and recognises the processes of one farebox, and nobody else's.

Every child carries the folder it belongs to in its environment, and so do its descendants:
that, never a name or a number found in a file, is how a stray one is known.
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
"""Environment variable with the folder that a process was started for."""


@dataclass
class Child:
    """A process in a session of its own, so that a Ctrl-C reaches the supervisor alone."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def end(self, patience_s: float) -> None:
        """Ask it to stop, then stop it with everything it started."""
        family = _family(self.process.pid)
        self.process.terminate()
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        _kill(family)

    def tail(self, lines: int = 15) -> str:
        """The end of its log, for an error message."""
        return "\n".join(self.log.read_text(errors="replace").strip().splitlines()[-lines:])


def start(name: str, command: Sequence[str], env: Mapping[str, str], home: Path, log: Path) -> Child:
    """Start a child that ends with this process, however that ends. Call from the main thread."""
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


def strays(home: Path, spare: Collection[int] = ()) -> list[psutil.Process]:
    """Living processes that were started for ``home``, but for those in ``spare`` and ourselves."""
    kept = {os.getpid(), *spare}
    return [p for p in psutil.process_iter() if p.pid not in kept and _owner(p) == str(home)]


def end_strays(home: Path, spare: Collection[int] = (), patience_s: float = 3.0) -> int:
    """End what was left behind; returns how many there were."""
    left = strays(home, spare)
    for process in left:
        _signal(process, signal.SIGTERM)
    _kill(_wait(left, patience_s))
    deadline = time.monotonic() + patience_s
    while (late := strays(home, spare)) and time.monotonic() < deadline:
        _kill(late)
    return len(left)


def holder_of(port: int) -> str:
    """The process that listens on a port, as people would name it, or an empty string."""
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


def _family(pid: int) -> list[psutil.Process]:
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
    """Those still alive at the end of it. Corpses do not count: in a container nobody may bury them."""
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
