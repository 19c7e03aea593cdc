"""A supervisor from start to stop, with a real store, sandbox and Ray, and a small application."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
import redis
from ray.serve.generated import serve_pb2, serve_pb2_grpc

from cluster.local import children, demo, preflight, ray_node, supervisor
from cluster.local.configuration import ConfigurationError, adapted, begin_check, end_check
from cluster.local.launch import LaunchError
from cluster.local.settings import Settings
from cluster.local.state import Home, Phase, Run
from cluster.local.supervisor import supervise
from cluster.serve_api import ServeApi, ServeConfig
from tests.support.disk import fill, small_disk
from tests.support.waiting import eventually, free_port

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
STOP_MAX_S = 15.0
"""10 s, and more for a machine that runs other tests."""


def config_of(builder: str) -> ServeConfig:
    app = {"name": "small", "route_prefix": "/", "import_path": f"tests.support.small_app:{builder}", "args": {"a": 1}}
    return {"applications": [app]}


@pytest.fixture(params=[True, False], ids=["haproxy", "default"])
def haproxy(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def settings(tmp_path: Path, repo: Path, haproxy: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(repo))
    monkeypatch.setattr(supervisor, "sync_products", lambda *_: None)
    monkeypatch.setattr(demo, "ensure_tenants", lambda *_: None)
    config = tmp_path / "serve_config.yaml"
    config.write_text("applications: []\n")
    made = Settings(
        home=tmp_path / ".farebox",
        config=config,
        port=free_port(),
        dashboard_port=free_port(),
        sandbox_port=free_port(),
        haproxy=haproxy,
    )
    yield made
    assert not children.processes_of(made.home)
    shutil.rmtree(ray_node.folder(made.home))


def serve(monkeypatch: pytest.MonkeyPatch, settings: Settings, builder: str) -> None:
    monkeypatch.setattr(supervisor, "begin_check", lambda *_: None)
    monkeypatch.setattr(supervisor, "end_check", lambda *_: adapted(config_of(builder), settings))


@dataclass
class Probe:
    """Looks at a healthy farebox in another thread, then sends SIGTERM to the supervisor."""

    settings: Settings
    look: Callable[[Run], None]
    problem: BaseException | None = None
    stopped_at: float = 0.0
    steps: list[str] = field(default_factory=list)

    def on_healthy(self) -> None:
        threading.Thread(target=self._look).start()

    def _look(self) -> None:
        try:
            run = Home(self.settings.home).read_run()
            assert run is not None
            self.look(run)
        except BaseException as problem:  # noqa: BLE001, a thread's outermost loop: the test raises it again
            self.problem = problem
        self.stopped_at = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)

    def run(self) -> None:
        supervise(self.settings, self.steps.append, self.on_healthy)
        if self.problem is not None:
            raise self.problem


def test_supervisor_from_start_to_stop(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, settings, "build")

    def look(run: Run) -> None:
        assert run.phase is Phase.HEALTHY
        assert httpx.get(f"{settings.api_url}/readyz").json() == {"ready": True}
        assert_ports_need_authentication(settings)
        assert_resources_are_known(settings)
        assert_store_is_restarted(settings, run)

    probe = Probe(settings, look)
    probe.run()
    assert time.monotonic() - probe.stopped_at < STOP_MAX_S
    assert probe.steps[-4:] == ["stopping", "stopping Ray Serve", "stopping Ray", "stopping the store"]
    assert Home(settings.home).read_run() is None
    assert not Home(settings.home).is_locked


@pytest.mark.parametrize("haproxy", [False], indirect=True, ids=["default"])
def test_start_fails_with_the_replicas_error(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, settings, "build_broken")
    with pytest.raises(LaunchError, match="the weights are of another model"):
        supervise(settings, lambda _: None, lambda: None)
    run = Home(settings.home).read_run()
    assert run is not None
    assert run.phase is Phase.FAILED
    assert "the weights are of another model" in run.problem


@pytest.mark.parametrize("haproxy", [False], indirect=True, ids=["default"])
def test_supervisor_outlives_a_full_disk(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "DISK_MIN_BYTES", 0)

    def look(run: Run) -> None:
        client = redis.Redis.from_url(run.store_url)
        client.set("fb:test", "kept")
        ballast = fill(disk)
        with pytest.raises(redis.RedisError):
            write_without_end(client)
        eventually(lambda: "the store has ended" in now(on_disk).problem)
        full = now(on_disk)
        assert (full.phase, full.is_alive) == (Phase.DEGRADED, True)
        assert f"MiB are free in {on_disk.home}: make room" in full.problem
        ballast.unlink()
        eventually(lambda: now(on_disk).phase is Phase.HEALTHY)
        assert now(on_disk).pids["store"] != run.pids["store"]
        assert client.get("fb:test") == b"kept"
        client.close()

    with small_disk(tmp_path / "disk", 256) as disk:
        on_disk = settings.model_copy(update={"home": disk / ".farebox"})
        serve(monkeypatch, on_disk, "build")
        Probe(on_disk, look).run()
        shutil.rmtree(ray_node.folder(on_disk.home))


def write_without_end(client: redis.Redis) -> None:
    while True:
        client.set("fb:more", "x" * 1_000)


def now(settings: Settings) -> Run:
    run = Home(settings.home).read_run()
    assert run is not None
    return run


def assert_ports_need_authentication(settings: Settings) -> None:
    """Beyond loopback only the replicas' gRPC ports listen. They need Ray's token, and so does the dashboard."""
    assert httpx.get(f"{settings.dashboard_url}/api/serve/applications/").status_code == 401
    open_ports = listening_beyond_loopback(settings.home)
    for port in open_ports:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = serve_pb2_grpc.ASGIServiceStub(channel)
            with pytest.raises(grpc.RpcError) as refused:
                stub.HandleRequest(serve_pb2.ASGIRequest(), timeout=5)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED, port


def assert_resources_are_known(settings: Settings) -> None:
    """By these `farebox scale` knows how many replicas fit."""
    api = ServeApi(settings.dashboard_url, Home(settings.home).secrets().ray_token)
    eventually(lambda: "CPU" in api.usage())
    used, total = api.usage()["CPU"]
    assert 0 <= used <= total
    assert total >= 4
    assert all(deployment.pids for app in api.applications().values() for deployment in app.deployments)
    api.close()


def listening_beyond_loopback(home: Path) -> list[int]:
    found = []
    for process in children.processes_of(home):
        try:
            connections = process.net_connections("tcp")
        except psutil.Error:
            continue
        for connection in connections:
            ip = connection.laddr.ip.removeprefix("::ffff:")
            if connection.status == psutil.CONN_LISTEN and not ip.startswith("127.") and ip != "::1":
                found.append(connection.laddr.port)
    return found


def assert_store_is_restarted(settings: Settings, run: Run) -> None:
    client = redis.Redis.from_url(run.store_url)
    client.set("fb:test", "kept")
    os.kill(run.pids["store"], signal.SIGKILL)

    def is_restarted() -> bool:
        now = Home(settings.home).read_run()
        return now is not None and now.pids["store"] != run.pids["store"]

    eventually(is_restarted)
    assert client.get("fb:test") == b"kept"
    client.close()


def test_check_reports_every_finding(tmp_path: Path) -> None:
    config = tmp_path / "serve_config.yaml"
    config.write_text("applications: []\nhttp_optoins: {}\n")
    settings = Settings(home=tmp_path / ".farebox", config=config)
    home = Home.open(settings)
    with pytest.raises(ConfigurationError) as refused:
        end_check(begin_check(settings, home), settings, home)
    assert "http_optoins" in str(refused.value)
    assert "billed" in str(refused.value), "all findings are in the message"
