"""What can stand in the way of a start, each with what to do about it, found before anything runs.

Knows this machine's Python, disk and ports; changes nothing.
"""

import shutil
import sys
from pathlib import Path

from cluster.local import children
from cluster.local.settings import Settings, taken

PYTHON_MIN = (3, 11)
DISK_MIN_BYTES = 1024**3
_OPTIONS = {
    "FAREBOX_PORT": "--port",
    "FAREBOX_DASHBOARD_PORT": "--dashboard-port",
    "FAREBOX_SANDBOX_PORT": "--sandbox-port",
}


class Obstacle(Exception):
    """Something is in the way; the message says what, and what to do."""


def check_machine(settings: Settings) -> None:
    """The checks that hold whatever else runs.

    Raises:
        Obstacle: wrong Python, no configuration file, or no room on the disk.
    """
    if sys.version_info < PYTHON_MIN:
        raise Obstacle(f"this is Python {sys.version.split()[0]}: farebox needs 3.11 or later")
    if not settings.config.is_file():
        raise Obstacle(f"{settings.config} does not exist: run this in farebox's folder, or name one with --config")
    for place in {_existing(settings.home), Path("/tmp")}:
        check_disk(place)


def check_disk(place: Path) -> None:
    """Raises Obstacle where less than 1 GiB is free: a store that cannot write serves nobody."""
    free = shutil.disk_usage(place).free
    if free < DISK_MIN_BYTES:
        raise Obstacle(f"only {free // 1024**2} MiB are free at {place}: farebox needs 1 GiB, make room first")


def check_ports(settings: Settings, needs_sandbox: bool) -> None:
    """Raises Obstacle when a public port is taken, with its holder and how to choose another."""
    wanted = {name: port for name, port in settings.public_ports.items() if needs_sandbox or "SANDBOX" not in name}
    for name, port in wanted.items():
        if taken([port]):
            holder = children.holder_of(port) or "another process"
            raise Obstacle(
                f"port {port} is taken by {holder}: end it, or choose another port with {_OPTIONS[name]} or {name}"
            )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
