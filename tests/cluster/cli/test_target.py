"""The farebox that a command works on: of this folder, or of the environment."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import yaml
from typer.testing import CliRunner

from cluster import valkey
from cluster.cli.main import app
from cluster.cli.target import Target
from cluster.dodo_sandbox.server import SandboxServer
from cluster.local import configuration
from cluster.local.settings import Settings
from cluster.local.state import Home
from cluster.serve_api import ServeConfig
from tests.support.cli import run_of

runner = CliRunner()
FILE = """
applications:
  - name: farebox
    import_path: deployments.app:build
    args: {durability: %s}
    deployments:
      - name: Gateway
        user_config:
          base: {id: base, price: {output_per_1m: "1.00"}}
          default_plan: prepaid
          plans: {prepaid: {kind: prepaid}}
          packs: {small: {price: "5.00", grants: {usd: "5.00"}}}
  - name: billing
    import_path: deployments.app:build_billing
    args: {durability: %s}
"""


@pytest.fixture
def late_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A store that acknowledges writes before they are on disk, as managed stores do."""
    server = valkey.start(tmp_path_factory.mktemp("v"))
    client = redis.Redis.from_url(server.url)
    client.config_set("appendfsync", "everysec")
    client.close()
    yield server.url
    server.stop()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setenv("FAREBOX_HOME", str(tmp_path / ".farebox"))
    write(tmp_path, "trusted")
    return tmp_path


def write(folder: Path, durability: str) -> None:
    (folder / "serve_config.yaml").write_text(FILE % (durability, durability))


@pytest.mark.usefixtures("folder")
def test_no_target_names_both_remedies() -> None:
    for words in (["usage"], ["reconcile"], ["dodo", "sync"], ["dodo", "dead"]):
        done = runner.invoke(app, words)
        assert done.exit_code == 1
        assert "farebox up" in done.stderr
        assert "REDIS_URL" in done.stderr


@pytest.mark.usefixtures("folder")
def test_target_is_a_cluster(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = redis.Redis.from_url(store_url)
    client.flushall()
    client.close()
    monkeypatch.setenv("REDIS_URL", store_url)
    assert json.loads(runner.invoke(app, ["usage", "--json"]).stdout) == []
    assert json.loads(runner.invoke(app, ["reconcile", "--no-dodo", "--json"]).stdout)["drift"] == []
    assert not Settings.from_env().home.exists(), "reading creates no folder"


def test_sync_of_a_cluster(folder: Path, store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(settings: Settings) -> ServeConfig:
        assert settings.config == folder / "cluster.yaml"
        return dict(yaml.safe_load(settings.config.read_text()))

    monkeypatch.setattr(configuration, "checked", read)
    with SandboxServer(tmp_path / "dodo", "key") as sandbox:
        env = {"REDIS_URL": store_url, "DODO_PAYMENTS_API_KEY": "key", "DODO_PAYMENTS_BASE_URL": sandbox.url}
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        (folder / "serve_config.yaml").rename(folder / "cluster.yaml")
        words = ["dodo", "sync", "--config", "cluster.yaml"]
        assert "FAREBOX_PUBLIC_URL" in runner.invoke(app, words).stderr
        monkeypatch.setenv("FAREBOX_PUBLIC_URL", "https://api.example.com")
        assert "small" in runner.invoke(app, words).stdout
        again = runner.invoke(app, words).stdout
        assert "Dodo has everything" in again
        assert "created" not in again


def test_store_options_are_those_in_force(folder: Path) -> None:
    settings = Settings.from_env()
    home = Home.open(settings)
    home.write_run(run_of(os.getpid(), store_url="unix:///s", config=str(settings.config)))
    assert Target.find(settings).store_options["durability"] == "trusted"
    home.deployed.write_text(json.dumps(yaml.safe_load(FILE % ("strict", "strict"))))
    assert Target.find(settings).store_options["durability"] == "strict"
    assert Target.find(settings).store_url == "unix:///s"


@pytest.mark.parametrize("text", ["", "[", "applications: 3", "applications: [x, {args: 1}]"])
def test_store_options_default_to_strict(tmp_path: Path, text: str) -> None:
    (tmp_path / "f").write_text(text)
    strict = {"durability": "strict", "min_replicas_acked": 0}
    assert configuration.store_options_in(tmp_path / "f") == strict
    assert configuration.store_options_in(tmp_path / "none") == strict


def test_trusted_store_is_accepted_only_if_configured(
    folder: Path, late_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", late_store)
    assert runner.invoke(app, ["usage"]).exit_code == 0
    assert runner.invoke(app, ["dodo", "dead"]).exit_code == 0
    write(folder, "strict")
    assert "appendfsync everysec" in runner.invoke(app, ["usage"]).stderr
