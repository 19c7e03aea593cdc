"""Where one farebox lives and which ports it takes, decided before anything starts.

Knows options, environment variables and the layout of ports; opens nothing but probes.
"""

import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from zlib import crc32

LOOPBACK = "127.0.0.1"
API_PORT, DASHBOARD_PORT, SANDBOX_PORT = 8000, 8265, 8010

_FIRST_BLOCK, _BLOCK_SIZE, _BLOCKS = 10_240, 512, 44
"""Blocks end at 32,767: Linux gives out higher ports to outgoing connections."""


class SettingsError(Exception):
    """An option or environment variable cannot be used; the message says which and why."""


@dataclass(frozen=True, slots=True)
class RayPorts:
    """Every port that Ray and HAProxy open besides the three public ones: one block per checkout."""

    base: int

    @property
    def gcs(self) -> int:
        return self.base

    @property
    def fixed(self) -> Mapping[str, int]:
        """Ports with one holder each, by Ray's own name for them."""
        names = (
            "port",
            "node-manager-port",
            "object-manager-port",
            "dashboard-agent-listen-port",
            "dashboard-agent-grpc-port",
            "runtime-env-agent-port",
            "metrics-export-port",
            "ray-client-server-port",
            "dashboard-metrics",
            "autoscaler-metrics",
            "haproxy-stats",
            "haproxy-metrics",
            "fallback-http",
            "fallback-grpc",
        )
        return {name: self.base + offset for offset, name in enumerate(names)}

    @property
    def workers(self) -> range:
        return range(self.base + 32, self.base + 192)

    @property
    def replica_http(self) -> range:
        return range(self.base + 192, self.base + 352)

    @property
    def replica_grpc(self) -> range:
        return range(self.base + 352, self.base + 512)


@dataclass(frozen=True, slots=True)
class Settings:
    """One farebox: its folder, its configuration file and its public ports, all on loopback."""

    home: Path
    config: Path
    api_port: int = API_PORT
    dashboard_port: int = DASHBOARD_PORT
    sandbox_port: int = SANDBOX_PORT
    haproxy: bool = True

    @classmethod
    def from_env(
        cls,
        env: Mapping[str, str] = os.environ,
        *,
        config: Path | None = None,
        api_port: int | None = None,
        dashboard_port: int | None = None,
        sandbox_port: int | None = None,
        haproxy: bool | None = None,
    ) -> Self:
        """Settings from options, each falling back to its environment variable and then its default.

        Raises:
            SettingsError: a port is not one, or two are the same.
        """
        settings = cls(
            home=Path(env.get("FAREBOX_HOME") or ".farebox").absolute(),
            config=(config or Path(env.get("FAREBOX_CONFIG") or "serve_config.yaml")).absolute(),
            api_port=api_port or _port(env, "FAREBOX_PORT", API_PORT),
            dashboard_port=dashboard_port or _port(env, "FAREBOX_DASHBOARD_PORT", DASHBOARD_PORT),
            sandbox_port=sandbox_port or _port(env, "FAREBOX_SANDBOX_PORT", SANDBOX_PORT),
            haproxy=haproxy if haproxy is not None else env.get("FAREBOX_HAPROXY", "1") != "0",
        )
        if len(set(settings.public_ports.values())) < len(settings.public_ports):
            ports = ", ".join(f"{name}={port}" for name, port in settings.public_ports.items())
            raise SettingsError(f"two public ports are the same: {ports}; give each its own")
        return settings

    @property
    def public_ports(self) -> Mapping[str, int]:
        """Environment variable to the port that it sets."""
        return {
            "FAREBOX_PORT": self.api_port,
            "FAREBOX_DASHBOARD_PORT": self.dashboard_port,
            "FAREBOX_SANDBOX_PORT": self.sandbox_port,
        }

    @property
    def api_url(self) -> str:
        return f"http://{LOOPBACK}:{self.api_port}"

    @property
    def dashboard_url(self) -> str:
        return f"http://{LOOPBACK}:{self.dashboard_port}"

    @property
    def sandbox_url(self) -> str:
        return f"http://{LOOPBACK}:{self.sandbox_port}"

    @property
    def models(self) -> Path:
        """Where the demo models are made: next to the configuration, which names them relative to itself."""
        return Path(os.environ.get("FAREBOX_MODELS") or self.config.parent / ".farebox" / "models").absolute()


def free_block(home: Path) -> RayPorts:
    """The ports of the checkout at ``home``: always the same block unless somebody else sits in it.

    Raises:
        SettingsError: every block is taken.
    """
    first = crc32(str(home).encode()) % _BLOCKS
    for offset in range(_BLOCKS):
        ports = RayPorts(_FIRST_BLOCK + (first + offset) % _BLOCKS * _BLOCK_SIZE)
        if not taken(ports.fixed.values()):
            return ports
    raise SettingsError(f"no free ports from {_FIRST_BLOCK} to 32767 for Ray: end what holds them (`ss -ltnp`)")


def taken(ports: Iterable[int]) -> list[int]:
    """Those of ``ports`` on which something listens on this machine."""
    return [port for port in ports if not _is_free(port)]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def _port(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name) or str(default)
    if not text.isdigit() or not 0 < int(text) < 65_536:
        raise SettingsError(f"{name} must be a port from 1 to 65535, not {text!r}")
    return int(text)
