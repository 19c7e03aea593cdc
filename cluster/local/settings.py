"""The settings of one farebox on this machine: its folder, its configuration file and its ports."""

import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self, TypedDict, Unpack
from zlib import crc32

from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from cluster.errors import ClusterError

LOOPBACK = "127.0.0.1"
API_PORT, DASHBOARD_PORT, SANDBOX_PORT = 8000, 8265, 8010

_FIRST_BLOCK, _BLOCK_SIZE, _BLOCKS = 10_240, 512, 44
"""Blocks end at 32,767: Linux gives higher ports to outgoing connections."""


class SettingsError(ClusterError):
    """An option or an environment variable has a value that cannot be used."""


Port = Annotated[int, Field(ge=1, le=65_535)]
AbsolutePath = Annotated[Path, AfterValidator(Path.absolute)]


class Options(TypedDict, total=False):
    """Options of the command line; ``None`` leaves the environment variable or the default."""

    config: Path | None
    port: int | None
    dashboard_port: int | None
    sandbox_port: int | None
    haproxy: bool | None


class Settings(BaseSettings):
    """One farebox. Each field is also read from ``FAREBOX_`` and its name, such as ``FAREBOX_DASHBOARD_PORT``."""

    model_config = SettingsConfigDict(env_prefix="FAREBOX_", env_ignore_empty=True, frozen=True, validate_default=True)

    home: AbsolutePath = Path(".farebox")
    config: AbsolutePath = Path("serve_config.yaml")
    port: Port = API_PORT
    """Of the API."""
    dashboard_port: Port = DASHBOARD_PORT
    """Of Ray's dashboard."""
    sandbox_port: Port = SANDBOX_PORT
    """Of the Dodo sandbox."""
    haproxy: bool = True
    models: Path | None = None
    """Where the demo models are made; see ``models_folder``."""

    @classmethod
    def from_env(cls, **options: Unpack[Options]) -> Self:
        """Settings from options, each of which falls back to its environment variable and then to its default.

        Raises:
            SettingsError: a value is invalid, or two ports are the same.
        """
        try:
            settings = cls.model_validate({name: value for name, value in options.items() if value is not None})
        except ValidationError as error:
            raise SettingsError(_explain(error)) from error
        if len(set(settings.public_ports.values())) < len(settings.public_ports):
            ports = ", ".join(f"{name}={port}" for name, port in settings.public_ports.items())
            raise SettingsError(f"two public ports are the same: {ports}; give each a port of its own")
        return settings

    @property
    def public_ports(self) -> Mapping[str, int]:
        """Each public port by the environment variable that sets it."""
        return {
            "FAREBOX_PORT": self.port,
            "FAREBOX_DASHBOARD_PORT": self.dashboard_port,
            "FAREBOX_SANDBOX_PORT": self.sandbox_port,
        }

    @property
    def api_url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def dashboard_url(self) -> str:
        return f"http://{LOOPBACK}:{self.dashboard_port}"

    @property
    def sandbox_url(self) -> str:
        return f"http://{LOOPBACK}:{self.sandbox_port}"

    @property
    def models_folder(self) -> Path:
        """Where the demo models are made: by default next to the configuration, which names them by relative path."""
        return (self.models or self.config.parent / ".farebox" / "models").absolute()


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    field = str(first["loc"][0])
    expected = "a port from 1 to 65535" if "port" in field else "1 or 0" if field == "haproxy" else "a path"
    return f"FAREBOX_{field.upper()} must be {expected}, not {first['input']!r}"


@dataclass(frozen=True, slots=True)
class RayPorts:
    """The ports that Ray and HAProxy open besides the three public ones: one block for each farebox."""

    base: int

    @property
    def gcs(self) -> int:
        return self.base

    @property
    def fixed(self) -> Mapping[str, int]:
        """The ports that one process listens on, by Ray's name for each."""
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


def free_block(home: Path) -> RayPorts:
    """The block of ports for the farebox in ``home``: the same one each time, unless another process uses it.

    Raises:
        SettingsError: every block is in use.
    """
    first = crc32(str(home).encode()) % _BLOCKS
    for offset in range(_BLOCKS):
        ports = RayPorts(_FIRST_BLOCK + (first + offset) % _BLOCKS * _BLOCK_SIZE)
        if not taken(ports.fixed.values()):
            return ports
    raise SettingsError(
        f"no block of {_BLOCK_SIZE} ports from {_FIRST_BLOCK} to 32767 is free for Ray: "
        "`ss -ltnp` shows the processes that use them"
    )


def taken(ports: Iterable[int]) -> list[int]:
    """Those of ``ports`` on which a process of this machine listens."""
    return [port for port in ports if not _is_free(port)]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True
