"""A whole farebox on this machine, started as an operator starts it, with ports and a state folder of its own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from tests.support.waiting import eventually, free_port

REPO = Path(__file__).parent.parent.parent
UP_TIMEOUT_S = 300


@dataclass(frozen=True)
class Tenant:
    name: str
    api_key: str
    plan: str
    dodo_customer_id: str


@dataclass(frozen=True)
class Stack:
    """A running farebox: its addresses, keys and processes."""

    home: Path
    env: dict[str, str]
    base_url: str
    admin_key: str
    sandbox_url: str
    tenants: dict[str, Tenant]

    def cli(self, *words: str, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return farebox(self.env, *words, check=check, timeout=timeout)

    @property
    def metrics_url(self) -> str:
        """Ray's Prometheus endpoint of this node."""
        return str(json.loads(self.cli("status", "--json", check=False).stdout)["metrics_url"])

    def admin(self, path: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.admin_key}"}
        return httpx.get(f"{self.base_url}/admin/{path}", headers=headers, timeout=30)

    def processes(self, title: str) -> list[psutil.Process]:
        """This stack's Serve replicas whose Ray title starts with ``title``, such as ``farebox:Gateway``."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if not words or not words[0].startswith(f"ray::ServeReplica:{title}"):
                continue
            if _environ(process).get("FAREBOX_HOME") == str(self.home):
                found.append(process)
        return found

    def kill(self, title: str) -> psutil.Process:
        """SIGKILL one replica of ``title``, as the kernel does when memory runs out."""
        victim = eventually(lambda: self.processes(title), 60)[0]
        victim.send_signal(signal.SIGKILL)
        return victim


def farebox(
    env: dict[str, str], *words: str, check: bool = True, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "farebox"), *words]
    done = subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True, timeout=timeout, check=False)
    assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stdout}\n{done.stderr}"
    return done


@contextmanager
def running(home: Path, config: Path, models: Path, *, haproxy: bool = True) -> Iterator[Stack]:
    """Start a detached farebox with its own ports and folder, and stop it afterwards."""
    env = os.environ | {
        "FAREBOX_HOME": str(home),
        "FAREBOX_PORT": str(free_port()),
        "FAREBOX_DASHBOARD_PORT": str(free_port()),
        "FAREBOX_SANDBOX_PORT": str(free_port()),
        "FAREBOX_MODELS": str(models),
        "FAREBOX_HAPROXY": "1" if haproxy else "0",
        "PYTHONPATH": str(REPO),
        "COLUMNS": "160",
    }
    env.pop("REDIS_URL", None)
    try:
        farebox(env, "up", "--detach", "--config", str(config), timeout=UP_TIMEOUT_S)
        yield _read(home, env)
    finally:
        farebox(env, "down", check=False)


def _read(home: Path, env: dict[str, str]) -> Stack:
    demo = json.loads((home / "demo.json").read_text())
    tenants = {
        name: Tenant(name, raw["api_key"], raw["plan"], raw["dodo_customer_id"])
        for name, raw in demo["tenants"].items()
    }
    return Stack(home, env, demo["base_url"], demo["admin_key"], demo["dodo_sandbox_url"], tenants)


def _environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.AccessDenied, psutil.NoSuchProcess):
        return {}
