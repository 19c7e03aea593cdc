"""What one farebox keeps in its folder: secrets, the demo's keys, who runs, and how far they got.

Knows files and their modes; starts no process. The folder and all that is secret in it are
readable by their owner only.
"""

import fcntl
import json
import os
import secrets
from base64 import b64encode
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import IO, Self

import psutil

from cluster.local.settings import RayPorts, Settings


class AlreadyRunning(Exception):
    """Another supervisor holds this folder."""


class Phase(StrEnum):
    """How far a run has got."""

    STARTING = "starting"
    HEALTHY = "healthy"
    STOPPING = "stopping"
    FAILED = "failed"


@dataclass(frozen=True)
class Run:
    """One supervisor's run, as it tells others. ``started`` is the process's birth in seconds since 1970."""

    pid: int
    started: float
    api_url: str
    dashboard_url: str
    sandbox_url: str
    store_url: str
    config: str
    ports_base: int
    haproxy: bool
    phase: Phase = Phase.STARTING
    step: str = ""
    """What is being done now, for people who wait."""
    problem: str = ""
    """Why it failed."""
    pids: dict[str, int] = field(default_factory=dict)
    """Name of each child to its process id."""

    @property
    def ports(self) -> RayPorts:
        return RayPorts(self.ports_base)

    @property
    def metrics_url(self) -> str:
        """Ray's Prometheus endpoint, which has our metrics too."""
        return f"http://127.0.0.1:{self.ports.fixed['metrics-export-port']}/metrics"

    @property
    def is_alive(self) -> bool:
        """Is it still this very process, and not another that was given its number?"""
        return birth(self.pid) == self.started


@dataclass(frozen=True)
class Secrets:
    """Made at the first start, kept for the life of the folder."""

    admin_key: str = field(repr=False)
    dodo_api_key: str = field(repr=False)
    ray_token: str = field(repr=False)
    webhook_secret: str = field(repr=False)
    """What the offline Dodo signs its webhooks with."""


@dataclass(frozen=True)
class Home:
    """The folder of one farebox."""

    path: Path

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """The folder, made where it is missing, closed to everyone else."""
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
        """The configuration as its check resolved it, before it was sent."""
        return self.path / "checked.json"

    @property
    def deployed(self) -> Path:
        """The configuration last sent to Serve, as it was sent."""
        return self.path / "deployed.json"

    def secrets(self) -> Secrets:
        """The secrets of this folder, made on first use."""
        try:
            return Secrets(**json.loads((self.path / "secrets.json").read_text()))
        except FileNotFoundError:
            made = Secrets(
                admin_key=f"fba_{secrets.token_urlsafe(24)}",
                dodo_api_key=f"sandbox_{secrets.token_urlsafe(24)}",
                ray_token=secrets.token_hex(32),
                webhook_secret=f"whsec_{b64encode(secrets.token_bytes(24)).decode()}",
            )
            write_private(self.path / "secrets.json", json.dumps(asdict(made), indent=2))
            return made

    def run(self) -> Run | None:
        """The run that this folder last told of, alive or not."""
        try:
            raw = json.loads((self.path / "run.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return Run(**raw | {"phase": Phase(raw["phase"])})

    def tell(self, run: Run) -> Run:
        write_private(self.path / "run.json", json.dumps(asdict(run), indent=2))
        return run

    def advance(self, run: Run, step: str) -> Run:
        return self.tell(replace(run, step=step))

    def forget_run(self) -> None:
        (self.path / "run.json").unlink(missing_ok=True)

    def lock(self) -> IO[str]:
        """Take the folder for this process's life; the kernel gives it back however the process ends.

        Raises:
            AlreadyRunning: a supervisor has it.
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


def birth(pid: int) -> float | None:
    """When a process started, in seconds since 1970; ``None`` when there is none or only its corpse."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def write_private(path: Path, text: str) -> None:
    """Replace a file in one step, readable by its owner only."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write(text + "\n")
    draft.replace(path)
