"""Checks this machine before a start: Python's version, the configuration file, free disk space and free ports."""

import shutil
import sys
from pathlib import Path

from cluster.errors import ClusterError
from cluster.local import children
from cluster.local.settings import Settings, taken

PYTHON_MIN = (3, 11)
DISK_MIN_BYTES = 1024**3
_OPTIONS = {
    "FAREBOX_PORT": "--port",
    "FAREBOX_DASHBOARD_PORT": "--dashboard-port",
    "FAREBOX_SANDBOX_PORT": "--sandbox-port",
}


class PreflightError(ClusterError):
    """This machine is not ready for a start."""


def check_machine(settings: Settings) -> None:
    """Check Python, the configuration file and the disk.

    Raises:
        PreflightError: a wrong version of Python, no such file, or less than 1 GiB of free space.
    """
    if sys.version_info < PYTHON_MIN:
        raise PreflightError(f"this is Python {sys.version.split()[0]}, but farebox needs 3.11 or later: install that")
    if not settings.config.is_file():
        raise PreflightError(
            f"{settings.config} does not exist: run this in farebox's folder, or name a file with --config"
        )
    for place in {_existing(settings.home), Path("/tmp")}:
        check_disk(place)


def check_disk(place: Path) -> None:
    """Raises PreflightError if less than 1 GiB is free: a store that cannot write its log accepts no request."""
    free = shutil.disk_usage(place).free
    if free < DISK_MIN_BYTES:
        raise PreflightError(
            f"only {free // 1024**2} MiB are free at {place}, but farebox needs 1 GiB: make room first"
        )


def check_ports(settings: Settings, needs_sandbox: bool) -> None:
    """Raises PreflightError if a public port is taken; the message names the process and how to choose another port."""
    wanted = {name: port for name, port in settings.public_ports.items() if needs_sandbox or "SANDBOX" not in name}
    for name, port in wanted.items():
        if taken([port]):
            holder = children.holder_of(port) or "another process"
            raise PreflightError(
                f"port {port} is taken by {holder}: end that, or choose another port with {_OPTIONS[name]} or {name}"
            )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
