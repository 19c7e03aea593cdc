"""Commands on the books of a cluster: the environment alone says where its store and its Dodo are."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import yaml
from typer.testing import CliRunner

from billing.store.errors import StoreRefused
from cluster import valkey
from cluster.cli.main import app
from cluster.cli.standing import Standing
from cluster.dodo_sandbox.server import SandboxServer
from cluster.local import commerce, launch
from cluster.local.settings import Settings
from cluster.local.state import Home, Run, birth
from cluster.serve_api import ServeConfig

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
    """A store that acknowledges before its log is on disk, as managed ones do."""
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
def test_neither_a_run_nor_a_store_is_refused_with_both_ways_out() -> None:
    for words in (["usage"], ["reconcile"], ["dodo", "sync"], ["dodo", "dead"]):
        done = runner.invoke(app, words)
        assert done.exit_code == 1
        assert "farebox up" in done.stderr
        assert "REDIS_URL" in done.stderr


@pytest.mark.usefixtures("folder")
def test_the_books_of_a_cluster_are_read_without_a_run(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = redis.Redis.from_url(store_url)
    client.flushall()
    client.close()
    monkeypatch.setenv("REDIS_URL", store_url)
    assert json.loads(runner.invoke(app, ["usage", "--json"]).stdout) == []
    assert json.loads(runner.invoke(app, ["reconcile", "--no-dodo", "--json"]).stdout)["drift"] == []
    assert not Settings.from_env().home.exists(), "asking makes no folder"


def test_a_cluster_is_told_to_dodo_without_a_run(
    folder: Path, store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(settings: Settings) -> ServeConfig:
        assert settings.config == folder / "cluster.yaml"
        return dict(yaml.safe_load(settings.config.read_text()))

    monkeypatch.setattr(commerce, "resolved", read)
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
        assert "there" in again
        assert "made" not in again


def test_what_was_deployed_says_how_sure_the_store_must_be_not_the_file_beside_it(folder: Path) -> None:
    settings = Settings.from_env()
    home, pid = Home.open(settings), os.getpid()
    home.tell(
        Run(
            pid=pid, started=birth(pid) or 0.0, api_url="http://127.0.0.1:8000", dashboard_url="http://127.0.0.1:8265",
            sandbox_url="http://127.0.0.1:8010", store_url="unix:///s", config=str(settings.config),
            ports_base=10_240, haproxy=True,
        )
    )  # fmt: skip
    assert Standing.find(settings).terms["durability"] == "trusted"
    home.deployed.write_text(json.dumps(yaml.safe_load(FILE % ("strict", "strict"))))
    assert Standing.find(settings).terms["durability"] == "strict"
    assert Standing.find(settings).store_url == "unix:///s"


@pytest.mark.parametrize("text", ["", "[", "applications: 3", "applications: [x, {args: 1}]"])
def test_a_file_that_says_nothing_of_its_store_is_strict(tmp_path: Path, text: str) -> None:
    (tmp_path / "f").write_text(text)
    assert launch.store_terms_in(tmp_path / "f") == launch.store_terms_in(tmp_path / "none") == launch.store_terms({})


def test_a_trusted_store_is_taken_by_every_command_and_a_strict_one_by_none(
    folder: Path, late_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", late_store)
    assert runner.invoke(app, ["usage"]).exit_code == 0
    assert runner.invoke(app, ["dodo", "dead"]).exit_code == 0
    commerce.verify_store(late_store, launch.store_terms_in(folder / "serve_config.yaml"))
    write(folder, "strict")
    assert Standing.find(Settings.from_env()).terms["durability"] == "strict"
    assert "appendfsync everysec" in runner.invoke(app, ["usage"]).stderr
    with pytest.raises(StoreRefused):
        commerce.verify_store(late_store, launch.store_terms_in(folder / "serve_config.yaml"))
