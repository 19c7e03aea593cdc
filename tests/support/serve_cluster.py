"""A Serve cluster with both deployments in a process of its own: its configuration, environment and end."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil

from cluster import valkey
from deployments.inference.adapters import digest_adapter
from tests.support.gateway import ADMIN_KEY, bearer
from tests.support.waiting import eventually, free_port

CONTEXT = 4096
ANSWER = "ANSWER "
REPO = Path(__file__).parent.parent.parent


@dataclass
class Cluster:
    """A Serve cluster in a process of its own, and a tenant with credit."""

    process: subprocess.Popen[str]
    base_url: str
    config: dict[str, object]
    folder: Path
    key: str = ""
    _client: openai.OpenAI | None = None

    def ask(self, command: str) -> object:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        raise AssertionError((self.folder / "log").read_text()[-3000:])

    def stats(self) -> dict[str, int]:
        """The counters of the only engine."""
        [engine] = self.engines()
        return engine

    def engines(self) -> list[dict[str, int]]:
        reply = httpx.get(f"{self.base_url}/admin/engines", headers=bearer(ADMIN_KEY), timeout=10)
        return list(reply.json()["data"])

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", int(self.base_url.rpartition(":")[2])

    def client(self) -> openai.OpenAI:
        if self._client is None:
            self._client = openai.OpenAI(base_url=f"{self.base_url}/v1", api_key=self.key, max_retries=0, timeout=60)
        return self._client

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def records(self) -> list[dict[str, object]]:
        return list(httpx.get(f"{self.base_url}/v1/usage/records", headers=bearer(self.key)).json()["data"])

    def account(self) -> dict[str, object]:
        return dict(httpx.get(f"{self.base_url}/v1/account", headers=bearer(self.key)).json())

    def replica_pids(self, name: str) -> list[int]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child.pid for child in children if f"ServeReplica:farebox:{name}" in " ".join(cmdline_of(child))]

    def record(self, record_id: str) -> dict[str, object]:
        """Wait for the record."""
        found = eventually(lambda: next((r for r in self.records() if r["record_id"] == record_id), None))
        assert found is not None
        return found


def cmdline_of(process: psutil.Process) -> list[str]:
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return process.cmdline()
    return []


def config_of(base: Path, adapters: dict[str, Path], folder: Path) -> dict[str, object]:
    entries = [
        {
            "id": name,
            "path": str(path),
            "digest": digest_adapter(path),
            "price": {"input_per_1m": "1.00", "output_per_1m": "2.00"},
        }
        for name, path in adapters.items()
    ]
    farebox = {
        "name": "farebox",
        "route_prefix": "/",
        "import_path": "deployments.app:build",
        "args": {
            "model": {"id": "farebox-base", "path": str(base)},
            "engine": {"max_context_tokens": CONTEXT, "max_batched_tokens": 256},
            "spool_dir": str(folder / "spool"),
            "lease_s": 4.0,
            "checkpoint_s": 0.5,
        },
        "deployments": [
            {
                "name": "Gateway",
                "num_replicas": 1,
                "max_ongoing_requests": 1000,
                "graceful_shutdown_timeout_s": 2,
                "graceful_shutdown_wait_loop_s": 0.1,
                "ray_actor_options": {"num_cpus": 0.1},
                "user_config": {
                    "base": {"id": "farebox-base", "price": {"input_per_1m": "1.00", "output_per_1m": "2.00"}},
                    "adapters": entries,
                    "plans": {"prepaid": {"kind": "prepaid"}},
                    "default_plan": "prepaid",
                },
            },
            {
                "name": "LoraReplica",
                "num_replicas": 1,
                "max_ongoing_requests": 272,
                "graceful_shutdown_timeout_s": 2,
                "graceful_shutdown_wait_loop_s": 0.1,
                "ray_actor_options": {"num_cpus": 0.5},
            },
        ],
    }
    return {"applications": [farebox]}


def environment(store_url: str, folder: Path, haproxy: bool) -> dict[str, str]:
    made = os.environ | {
        "REDIS_URL": store_url,
        "FAREBOX_ADMIN_KEY": ADMIN_KEY,
        "PYTHONPATH": str(REPO),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": str(folder / "r"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.05",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.gateway.edge:middlewares",
    }
    if haproxy:
        place = folder / "h"
        place.mkdir()
        ports = free_port(), free_port(), free_port()
        made |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_HAPROXY_STATS_PORT": str(ports[0]),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports[1]),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports[2]),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(place / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(place / "admin.sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(place / "metrics.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(place),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(place / "state"),
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": "18300",
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": "18399",
            "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": "18400",
            "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": "18499",
        }
    return made


def await_start(cluster: Cluster) -> None:
    assert cluster.process.stdout is not None
    for line in cluster.process.stdout:
        if line.strip() == "READY":
            break
    else:
        raise AssertionError((cluster.folder / "log").read_text()[-5000:])
    eventually(lambda: httpx.get(f"{cluster.base_url}/readyz", timeout=5).status_code == 200, 90)
    admin = httpx.Client(base_url=cluster.base_url, headers=bearer(ADMIN_KEY), timeout=10)
    with admin:
        assert admin.post("/admin/tenants", json={"id": "acme", "email": "a@example.com"}).status_code == 201
        assert admin.post("/admin/tenants/acme/grants", json={"source": "t", "usd": "100.00"}).json()["granted"]
        cluster.key = admin.post("/admin/tenants/acme/keys", json={}).json()["api_key"]


@contextmanager
def serving(config: dict[str, object], folder: Path, haproxy: bool) -> Iterator[Cluster]:
    """Start a cluster on a store of its own, and end both."""
    port = free_port()
    (folder / "config.json").write_text(json.dumps(config))
    store = valkey.start(folder / "v")
    log = (folder / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.serve_process", str(folder / "config.json"), str(port), ANSWER],
        env=environment(store.url, folder, haproxy),
        cwd=REPO,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
    )
    made = Cluster(process, f"http://127.0.0.1:{port}", config, folder)
    try:
        await_start(made)
        yield made
    finally:
        made.close()
        stop(process)
        log.close()
        store.stop()


def with_context(base: Path, out: Path) -> Path:
    """The tests' base model with a context that is long enough for long streams."""
    shutil.copytree(base, out)
    shape = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(shape | {"max_position_embeddings": CONTEXT}))
    return out


def stop(process: subprocess.Popen[str]) -> None:
    family = psutil.Process(process.pid).children(recursive=True)
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
    assert process.stdout is not None
    process.stdout.close()
    for child in family:
        with suppress(psutil.NoSuchProcess):
            child.kill()
