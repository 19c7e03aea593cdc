"""The folder of one farebox: its secrets, the demo's keys, and the state of its current run.

Only the owner may read the folder and the secrets in it.
"""

import errno
import fcntl
import json
import os
import secrets
from base64 import b64encode
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import IO, Self

import psutil

from cluster.errors import ClusterError
from cluster.local.settings import RayPorts, Settings

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk, or a user's share of it, that is full."""


class AlreadyRunning(ClusterError):
    """Another supervisor holds the lock of this folder."""


class Phase(StrEnum):
    """The phase of a run."""

    STARTING = "starting"
    HEALTHY = "healthy"
    DEGRADED = "degraded"
    """It runs, but a part of it does not, or the disk is full; ``Run.problem`` says what."""
    STOPPING = "stopping"
    FAILED = "failed"


@dataclass(frozen=True)
class Run:
    """One run of a supervisor, as ``run.json`` has it for other processes."""

    pid: int
    started: float
    """When the supervisor's process started, in seconds since 1970: process ids are used again."""
    api_url: str
    dashboard_url: str
    sandbox_url: str
    store_url: str
    config: str
    ports_base: int
    haproxy: bool
    dodo_environment: str = ""
    phase: Phase = Phase.STARTING
    step: str = ""
    """The current step of the start."""
    problem: str = ""
    """Why it failed, or is degraded."""
    pids: dict[str, int] = field(default_factory=dict)
    """The process id of each child, by name."""

    @property
    def ports(self) -> RayPorts:
        return RayPorts(self.ports_base)

    @property
    def metrics_url(self) -> str:
        """Ray's Prometheus endpoint, which also has farebox's metrics."""
        return f"http://127.0.0.1:{self.ports.fixed['metrics-export-port']}/metrics"

    @property
    def is_alive(self) -> bool:
        """Whether this very process runs, and not another with its id."""
        return start_time(self.pid) == self.started


@dataclass(frozen=True)
class Secrets:
    """Generated at the first start and kept as long as the folder."""

    admin_key: str = field(repr=False)
    dodo_api_key: str = field(repr=False)
    ray_token: str = field(repr=False)
    webhook_secret: str = field(repr=False)
    """The Dodo sandbox signs webhooks with it."""


@dataclass(frozen=True)
class Home:
    """The folder of one farebox."""

    path: Path

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """The folder, created if it is missing, with access for its owner only."""
        settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        settings.home.chmod(0o700)
        home = cls(settings.home)
        home.logs.mkdir(exist_ok=True)
        return home

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def store(self) -> Path:
        return self.path / "store"

    @property
    def dodo(self) -> Path:
        return self.path / "dodo"

    @property
    def demo(self) -> Path:
        return self.path / "demo.json"

    @property
    def spool(self) -> Path:
        return self.path / "spool"

    @property
    def adapters(self) -> Path:
        return self.path / "adapters"

    @property
    def checked(self) -> Path:
        """The configuration as the check resolved it."""
        return self.path / "checked.json"

    @property
    def deployed(self) -> Path:
        """The configuration that was last sent to Ray Serve."""
        return self.path / "deployed.json"

    @property
    def operator(self) -> Path:
        """What the operator's environment named at the start of the run, with Dodo's key."""
        return self.path / "operator.json"

    def secrets(self) -> Secrets:
        """The secrets of this folder, generated on first use."""
        try:
            return Secrets(**json.loads((self.path / "secrets.json").read_text()))
        except FileNotFoundError:
            generated = Secrets(
                admin_key=f"fba_{secrets.token_urlsafe(24)}",
                dodo_api_key=f"sandbox_{secrets.token_urlsafe(24)}",
                ray_token=secrets.token_hex(32),
                webhook_secret=f"whsec_{b64encode(secrets.token_bytes(24)).decode()}",
            )
            write_private(self.path / "secrets.json", json.dumps(asdict(generated), indent=2))
            return generated

    def read_run(self) -> Run | None:
        """The last run of this folder, alive or not."""
        try:
            raw = json.loads((self.path / "run.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return Run(**raw | {"phase": Phase(raw["phase"])})

    def write_run(self, run: Run) -> Run:
        """Replace ``run.json``. If the disk is full, write over it; if that fails too, remove it.

        So it never says what is no longer true.
        """
        path, text = self.path / "run.json", json.dumps(asdict(run), indent=2)
        try:
            write_private(path, text)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            if not _written_over(path, text):
                path.unlink(missing_ok=True)
        return run

    def remove_run(self) -> None:
        (self.path / "run.json").unlink(missing_ok=True)
        self.operator.unlink(missing_ok=True)

    def lock(self) -> IO[str]:
        """Lock the folder. The kernel releases the lock when this process ends, however it ends.

        Raises:
            AlreadyRunning: another process has the lock.
        """
        lock = (self.path / "lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise AlreadyRunning(
                f"a farebox already runs in {self.path}: `farebox status` shows it, `farebox down` stops it"
            ) from None
        return lock

    @property
    def is_locked(self) -> bool:
        try:
            self.lock().close()
        except AlreadyRunning:
            return True
        return False


def start_time(pid: int) -> float | None:
    """When a process started, in seconds since 1970; ``None`` if there is none or it is a zombie."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def write_private(path: Path, text: str) -> None:
    """Replace a file atomically; only its owner may read it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            out.write(text + "\n")
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    draft.replace(path)


def _written_over(path: Path, text: str) -> bool:
    """Write JSON over a file's content in one call, which needs no room where it is not longer; whether that worked.

    What is left of a longer content becomes spaces.
    """
    try:
        file = os.open(path, os.O_WRONLY)
    except OSError:
        return False
    try:
        content = text.encode().ljust(os.fstat(file).st_size)
        return os.pwrite(file, content, 0) == len(content)
    except OSError:
        return False
    finally:
        os.close(file)
