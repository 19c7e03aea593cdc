"""Ports, folders and environments: what is decided before anything starts."""

import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import ray_node
from cluster.local.environment import dodo_environment, inherited, service_environment
from cluster.local.settings import RayPorts, Settings, SettingsError, free_block, taken
from cluster.local.state import Secrets

SECRETS = Secrets(admin_key="fba_x", dodo_api_key="sandbox_x", ray_token="0" * 64, webhook_secret="whsec_x")


def listening() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


def test_an_option_goes_before_its_variable_and_that_before_the_default() -> None:
    env = {"FAREBOX_PORT": "9000", "FAREBOX_SANDBOX_PORT": "9010"}
    settings = Settings.from_env(env, api_port=7000)
    assert (settings.api_port, settings.sandbox_port, settings.dashboard_port) == (7000, 9010, 8265)


@pytest.mark.parametrize("text", ["0", "65536", "-1", "http", "80.5"])
def test_a_variable_that_is_no_port_is_refused_by_name(text: str) -> None:
    with pytest.raises(SettingsError, match="FAREBOX_PORT"):
        Settings.from_env({"FAREBOX_PORT": text})


def test_public_ports_must_differ() -> None:
    with pytest.raises(SettingsError, match="same"):
        Settings.from_env({"FAREBOX_PORT": "8265"})


def test_haproxy_is_on_unless_told_otherwise() -> None:
    assert Settings.from_env({}).haproxy
    assert not Settings.from_env({"FAREBOX_HAPROXY": "0"}).haproxy
    assert Settings.from_env({"FAREBOX_HAPROXY": "0"}, haproxy=True).haproxy


def test_a_block_of_ports_overlaps_neither_itself_nor_the_ports_of_outgoing_connections() -> None:
    ports = RayPorts(32_256)
    every = [*ports.fixed.values(), *ports.workers, *ports.replica_http, *ports.replica_grpc]
    assert len(every) == len(set(every))
    assert max(every) < 32_768
    assert len(set(ports.fixed.values())) == len(ports.fixed)


def test_a_checkout_keeps_its_block_and_gives_way_to_a_stranger_in_it(tmp_path: Path) -> None:
    first = free_block(tmp_path)
    assert free_block(tmp_path) == first
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", first.gcs))
        stranger.listen()
        assert free_block(tmp_path) != first
    assert free_block(tmp_path) == first


def test_a_port_is_taken_while_somebody_listens_on_it() -> None:
    with listening() as listener:
        port = listener.getsockname()[1]
        assert taken([port]) == [port]
    assert taken([port]) == []


def test_the_sandbox_is_the_default_and_a_real_key_in_the_shell_never_reaches_it() -> None:
    env = {"DODO_PAYMENTS_API_KEY": "live_secret", "DODO_PAYMENTS_WEBHOOK_KEY": "whsec_live"}
    assert dodo_environment(env) == "sandbox"
    made = service_environment(Settings.from_env({}), SECRETS, "unix:///s", env)
    assert made["DODO_PAYMENTS_API_KEY"] == "sandbox_x"
    assert made["DODO_PAYMENTS_WEBHOOK_KEY"] == "whsec_x"
    assert made["DODO_PAYMENTS_BASE_URL"] == "http://127.0.0.1:8010"
    assert "live_secret" not in inherited(env).values()


def test_real_dodo_needs_its_key_and_no_base_url() -> None:
    for wrong in ({}, {"DODO_PAYMENTS_API_KEY": "k", "DODO_PAYMENTS_BASE_URL": "http://127.0.0.1:8010"}):
        with pytest.raises(SettingsError):
            dodo_environment({"FAREBOX_DODO_ENVIRONMENT": "test_mode"} | wrong)
    env = {"FAREBOX_DODO_ENVIRONMENT": "test_mode", "DODO_PAYMENTS_API_KEY": "k"}
    made = service_environment(Settings.from_env({}), SECRETS, "redis://r", env)
    assert made["DODO_PAYMENTS_API_KEY"] == "k"
    assert "DODO_PAYMENTS_BASE_URL" not in made


def test_a_misspelt_environment_is_refused_instead_of_guessed() -> None:
    with pytest.raises(SettingsError, match="live"):
        dodo_environment({"FAREBOX_DODO_ENVIRONMENT": "live"})


def test_a_child_inherits_no_other_cluster_store_or_dodo() -> None:
    env = {
        "REDIS_URL": "r",
        "RAY_ADDRESS": "a",
        "DODO_PAYMENTS_BASE_URL": "d",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "A": "b",
    }
    assert inherited(env) == {"A": "b"}


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Path]:
    made = ray_node.folder(tmp_path)
    yield made
    shutil.rmtree(made)


def test_ray_gets_a_folder_inside_ours_and_nothing_that_we_run_lies_in_it(ours: Path) -> None:
    """Ray opens its own folder to every user of the machine."""
    settings, ports = Settings.from_env({}), RayPorts(10_240)
    ray = ray_node.ray_folder(ours)
    env = ray_node.environment(settings, ports, ours, "token")
    assert env["RAY_TMPDIR"] == str(ray)
    assert f"--temp-dir={ray}" in ray_node.command(settings, ports, ours)
    assert ray.parent == ours
    assert stat.S_IMODE(ours.stat().st_mode) == 0o700
    places = [value for name, value in env.items() if name.startswith("RAY_SERVE_HAPROXY") and "/" in value]
    assert bool(places) == (sys.platform == "linux")
    assert not [place for place in places if Path(place).is_relative_to(ray)]


def test_the_sockets_of_ray_and_haproxy_fit(ours: Path) -> None:
    session = "session_2026-11-23_13-00-08_123456_4194304"
    assert len(str(ray_node.ray_folder(ours) / session / "sockets" / "plasma_store.12345")) < 107
    assert len(str(ours / "h" / ("0" * 56) / "metrics.sock")) < 97


@pytest.mark.skipif(sys.platform != "linux", reason="HAProxy is Linux's")
def test_the_wrapper_of_haproxy_is_ours_alone(ours: Path) -> None:
    wrapper = ray_node.environment(Settings.from_env({}), RayPorts(10_240), ours, "t")["RAY_SERVE_HAPROXY_BINARY_PATH"]
    assert stat.S_IMODE(Path(wrapper).stat().st_mode) == 0o700
    assert stat.S_IMODE(Path(wrapper).parent.stat().st_mode) == 0o700
