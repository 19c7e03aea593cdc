"""Settings, ports and the environment of processes."""

import os
import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import ray_node
from cluster.local.environment import OperatorEnvironment, dodo_environment, inherited, service_environment
from cluster.local.settings import RayPorts, Settings, SettingsError, free_block, taken
from cluster.local.state import Secrets

SECRETS = Secrets(admin_key="fba_x", dodo_api_key="sandbox_x", ray_token="0" * 64, webhook_secret="whsec_x")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith(("FAREBOX_", "DODO_PAYMENTS_", "REDIS_URL")):
            monkeypatch.delenv(name)


def listening() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


def test_option_wins_over_variable_and_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_PORT", "9000")
    monkeypatch.setenv("FAREBOX_SANDBOX_PORT", "9010")
    settings = Settings.from_env(port=7000)
    assert (settings.port, settings.sandbox_port, settings.dashboard_port) == (7000, 9010, 8265)


def test_empty_variable_means_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FAREBOX_PORT", "FAREBOX_HAPROXY", "FAREBOX_CONFIG", "FAREBOX_DODO_ENVIRONMENT"):
        monkeypatch.setenv(name, "")
    settings = Settings.from_env()
    assert (settings.port, settings.haproxy, settings.config.name) == (8000, True, "serve_config.yaml")
    assert dodo_environment() == "sandbox"


def test_models_folder_is_next_to_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.from_env(config=tmp_path / "c.yaml").models_folder == tmp_path / ".farebox" / "models"
    monkeypatch.setenv("FAREBOX_MODELS", str(tmp_path / "m"))
    assert Settings.from_env().models_folder == tmp_path / "m"


@pytest.mark.parametrize("text", ["0", "65536", "-1", "http", "80.5"])
def test_invalid_port_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_PORT", text)
    with pytest.raises(SettingsError, match=f"FAREBOX_PORT must be a port from 1 to 65535, not '{text}'"):
        Settings.from_env()


def test_public_ports_must_differ() -> None:
    with pytest.raises(SettingsError, match="same"):
        Settings.from_env(port=8265)


def test_haproxy_is_on_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.from_env().haproxy
    monkeypatch.setenv("FAREBOX_HAPROXY", "0")
    assert not Settings.from_env().haproxy
    assert Settings.from_env(haproxy=True).haproxy


def test_ports_of_a_block_do_not_overlap() -> None:
    ports = RayPorts(32_256)
    every = [*ports.fixed.values(), *ports.workers, *ports.replica_http, *ports.replica_grpc]
    assert len(every) == len(set(every))
    assert max(every) < 32_768
    assert len(set(ports.fixed.values())) == len(ports.fixed)


def test_folder_keeps_its_block_of_ports(tmp_path: Path) -> None:
    first = free_block(tmp_path)
    assert free_block(tmp_path) == first
    with socket.socket() as other:
        other.bind(("127.0.0.1", first.gcs))
        other.listen()
        assert free_block(tmp_path) != first
    assert free_block(tmp_path) == first


def test_taken_port() -> None:
    with listening() as listener:
        port = listener.getsockname()[1]
        assert taken([port]) == [port]
    assert taken([port]) == []


def test_sandbox_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real key in the operator's shell reaches no process."""
    monkeypatch.setenv("DODO_PAYMENTS_API_KEY", "live_secret")
    monkeypatch.setenv("DODO_PAYMENTS_WEBHOOK_KEY", "whsec_live")
    assert dodo_environment() == "sandbox"
    variables = service_environment(Settings.from_env(), SECRETS, "unix:///s", OperatorEnvironment.read())
    assert variables["DODO_PAYMENTS_API_KEY"] == "sandbox_x"
    assert variables["DODO_PAYMENTS_WEBHOOK_KEY"] == "whsec_x"
    assert variables["DODO_PAYMENTS_BASE_URL"] == "http://127.0.0.1:8010"
    assert "live_secret" not in inherited().values()


def test_real_dodo_needs_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_DODO_ENVIRONMENT", "test_mode")
    with pytest.raises(SettingsError, match="needs DODO_PAYMENTS_API_KEY"):
        dodo_environment()
    monkeypatch.setenv("DODO_PAYMENTS_API_KEY", "k")
    variables = service_environment(Settings.from_env(), SECRETS, "redis://r", OperatorEnvironment.read())
    assert variables["DODO_PAYMENTS_API_KEY"] == "k"
    assert "DODO_PAYMENTS_BASE_URL" not in variables


@pytest.mark.parametrize("environment", ["sandbox", "test_mode"])
def test_calls_to_dodo_may_go_through_a_proxy(environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_DODO_ENVIRONMENT", environment)
    monkeypatch.setenv("DODO_PAYMENTS_API_KEY", "k")
    monkeypatch.setenv("DODO_PAYMENTS_BASE_URL", "http://127.0.0.1:8020")
    variables = service_environment(Settings.from_env(), SECRETS, "unix:///s", OperatorEnvironment.read())
    assert variables["DODO_PAYMENTS_BASE_URL"] == "http://127.0.0.1:8020"
    assert variables["DODO_PAYMENTS_API_KEY"] == ("k" if environment == "test_mode" else "sandbox_x")


def test_live_mode_goes_to_dodo_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_DODO_ENVIRONMENT", "live_mode")
    monkeypatch.setenv("DODO_PAYMENTS_API_KEY", "k")
    monkeypatch.setenv("DODO_PAYMENTS_BASE_URL", "http://127.0.0.1:8020")
    with pytest.raises(SettingsError, match="unset one"):
        dodo_environment()


def test_unknown_dodo_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_DODO_ENVIRONMENT", "live")
    with pytest.raises(SettingsError, match="must be sandbox, test_mode or live_mode, not 'live'"):
        dodo_environment()


def test_inherited_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REDIS_URL", "RAY_ADDRESS", "DODO_PAYMENTS_BASE_URL", "RAY_SERVE_ENABLE_HA_PROXY", "FAREBOX_A"):
        monkeypatch.setenv(name, "x")
    assert inherited()["FAREBOX_A"] == "x"
    assert not inherited().keys() & {"REDIS_URL", "RAY_ADDRESS", "DODO_PAYMENTS_BASE_URL", "RAY_SERVE_ENABLE_HA_PROXY"}


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Path]:
    made = ray_node.folder(tmp_path)
    yield made
    shutil.rmtree(made)


def test_rays_folder_holds_no_program(ours: Path) -> None:
    """Every user of the machine can read Ray's own folder."""
    settings, ports = Settings.from_env(), RayPorts(10_240)
    ray = ray_node.ray_folder(ours)
    env = ray_node.environment(settings, ports, ours, "token")
    assert env["RAY_TMPDIR"] == str(ray)
    assert f"--temp-dir={ray}" in ray_node.command(settings, ports, ours)
    assert ray.parent == ours
    assert stat.S_IMODE(ours.stat().st_mode) == 0o700
    places = [value for name, value in env.items() if name.startswith("RAY_SERVE_HAPROXY") and "/" in value]
    assert bool(places) == (sys.platform == "linux")
    assert not [place for place in places if Path(place).is_relative_to(ray)]


def test_socket_paths_fit(ours: Path) -> None:
    session = "session_2026-11-23_13-00-08_123456_4194304"
    assert len(str(ray_node.ray_folder(ours) / session / "sockets" / "plasma_store.12345")) < 107
    assert len(str(ours / "h" / ("0" * 56) / "metrics.sock")) < 97


@pytest.mark.skipif(sys.platform != "linux", reason="HAProxy is used on Linux only")
def test_haproxy_wrapper_is_private(ours: Path) -> None:
    wrapper = ray_node.environment(Settings.from_env(), RayPorts(10_240), ours, "t")["RAY_SERVE_HAPROXY_BINARY_PATH"]
    assert stat.S_IMODE(Path(wrapper).stat().st_mode) == 0o700
    assert stat.S_IMODE(Path(wrapper).parent.stat().st_mode) == 0o700
