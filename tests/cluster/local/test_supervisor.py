"""One supervisor from start to stop, with a real store, a real sandbox and a real Ray around a small application."""

import os
import shutil
import signal
import socket
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

from cluster.local import children, commerce, ray_node
from cluster.local.launch import LaunchError, addressed
from cluster.local.settings import Settings
from cluster.local.state import Home, Phase, Run
from cluster.local.supervisor import supervise
from cluster.serve_api import ServeConfig

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
STOP_MAX_S = 15.0
"""Ten on a machine that is not busy with other tests."""


def config_of(builder: str) -> ServeConfig:
    app = {"name": "small", "route_prefix": "/", "import_path": f"tests.support.small_app:{builder}", "args": {"a": 1}}
    return {"applications": [app]}


@pytest.fixture(params=[True, False], ids=["haproxy", "default"])
def haproxy(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def settings(tmp_path: Path, repo: Path, haproxy: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    ports = []
    for _ in range(3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(repo))
    monkeypatch.setattr(commerce, "register", lambda *_: None)
    monkeypatch.setattr(commerce, "seed_demo", lambda *_: None)
    config = tmp_path / "serve_config.yaml"
    config.write_text("applications: []\n")
    made = Settings(tmp_path / ".farebox", config, *ports, haproxy=haproxy)
    yield made
    assert not children.strays(made.home)
    shutil.rmtree(ray_node.folder(made.home))


def serve(monkeypatch: pytest.MonkeyPatch, settings: Settings, builder: str) -> None:
    monkeypatch.setattr(commerce, "begin_check", lambda *_: None)
    monkeypatch.setattr(commerce, "end_check", lambda *_: addressed(config_of(builder), settings))


@dataclass
class Probe:
    """What somebody outside sees of a healthy farebox; asks for its end when it has seen enough."""

    settings: Settings
    look: Callable[[Run], None]
    problem: BaseException | None = None
    asked_at: float = 0.0
    steps: list[str] = field(default_factory=list)

    def ready(self, _: str) -> None:
        threading.Thread(target=self._look).start()

    def _look(self) -> None:
        try:
            run = Home(self.settings.home).run()
            assert run is not None
            self.look(run)
        except BaseException as problem:  # noqa: BLE001, a thread's outermost loop: the test raises it again
            self.problem = problem
        self.asked_at = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)

    def run(self) -> None:
        supervise(self.settings, self.steps.append, self.ready)
        if self.problem is not None:
            raise self.problem


def test_it_serves_on_loopback_heals_its_store_and_leaves_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, settings, "build")

    def look(run: Run) -> None:
        assert run.phase is Phase.HEALTHY
        assert httpx.get(f"{settings.api_url}/readyz").json() == {"ready": True}
        assert_nobody_is_served_unauthenticated(settings)
        assert_store_comes_back(settings, run)

    probe = Probe(settings, look)
    probe.run()
    assert time.monotonic() - probe.asked_at < STOP_MAX_S
    assert probe.steps[-4:] == ["asked to stop", "ending Ray Serve", "ending Ray", "ending the store"]
    assert Home(settings.home).run() is None
    assert not Home(settings.home).is_locked


@pytest.mark.parametrize("haproxy", [False], indirect=True, ids=["default"])
def test_an_application_that_cannot_start_is_told_in_its_own_words(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, settings, "build_broken")
    with pytest.raises(LaunchError, match="the weights are of another model"):
        supervise(settings, lambda _: None, lambda _: None)
    told = Home(settings.home).run()
    assert told is not None
    assert told.phase is Phase.FAILED
    assert "the weights are of another model" in told.problem


def assert_nobody_is_served_unauthenticated(settings: Settings) -> None:
    """Off loopback only gRPC ports of replicas listen, and they ask for Ray's token, as the dashboard does."""
    assert httpx.get(f"{settings.dashboard_url}/api/serve/applications/").status_code == 401
    open_ports = listening_beyond_loopback(settings.home)
    for port in open_ports:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = serve_pb2_grpc.ASGIServiceStub(channel)
            with pytest.raises(grpc.RpcError) as refused:
                stub.HandleRequest(serve_pb2.ASGIRequest(), timeout=5)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED, port


def listening_beyond_loopback(home: Path) -> list[int]:
    found = []
    for process in children.strays(home):
        try:
            connections = process.net_connections("tcp")
        except psutil.Error:
            continue
        for connection in connections:
            ip = connection.laddr.ip.removeprefix("::ffff:")
            if connection.status == psutil.CONN_LISTEN and not ip.startswith("127.") and ip != "::1":
                found.append(connection.laddr.port)
    return found


def assert_store_comes_back(settings: Settings, run: Run) -> None:
    client = redis.Redis.from_url(run.store_url)
    client.set("fb:test", "kept")
    os.kill(run.pids["store"], signal.SIGKILL)
    deadline = time.monotonic() + 20
    while True:
        healed = Home(settings.home).run()
        if healed is not None and healed.pids["store"] != run.pids["store"]:
            break
        assert time.monotonic() < deadline, "the store was not started again"
        time.sleep(0.1)
    assert client.get("fb:test") == b"kept"
    client.close()


def test_a_wrong_configuration_is_told_with_every_finding(tmp_path: Path) -> None:
    config = tmp_path / "serve_config.yaml"
    config.write_text("applications: []\nhttp_optoins: {}\n")
    settings = Settings(tmp_path / ".farebox", config)
    home = Home.open(settings)
    with pytest.raises(LaunchError) as refused:
        commerce.end_check(commerce.begin_check(settings, home), settings, home)
    assert "http_optoins" in str(refused.value)
    assert "billed" in str(refused.value), "more than the first finding is told"
