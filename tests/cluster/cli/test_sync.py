"""``farebox dodo sync``: shows what Dodo lacks, creates it once, and asks first in live mode."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from typer.testing import CliRunner

from billing.catalog.catalog import Catalog
from cluster.cli import selling
from cluster.cli.main import app
from cluster.cli.target import Target
from cluster.dodo_sandbox.server import SandboxServer
from cluster.local import configuration, dodo_products
from cluster.local.environment import SANDBOX
from cluster.local.launch import LaunchError
from cluster.local.settings import Settings
from cluster.local.state import Home
from tests.support.cli import write_healthy_run
from tests.support.world import CATALOG

runner = CliRunner()


@pytest.fixture
def sandbox(store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SandboxServer]:
    """A farebox with a small catalog, whose configuration is not checked."""
    monkeypatch.setenv("FAREBOX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(configuration, "checked", lambda settings: {"applications": []})
    monkeypatch.setattr(dodo_products, "catalog_of", lambda config: Catalog.model_validate(CATALOG))
    client = Redis.from_url(store_url)
    client.flushall()
    client.close()
    with SandboxServer(tmp_path / "dodo", Home.open(Settings.from_env()).secrets().dodo_api_key) as server:
        write_healthy_run(store_url, server.url)
        yield server


def test_sync_plan_creates_nothing(sandbox: SandboxServer) -> None:
    for _ in range(2):
        done = runner.invoke(app, ["dodo", "sync", "--plan"])
        assert done.exit_code == 0, done.output
        assert done.output.count("to be created") == 6


def test_sync_creates_once(sandbox: SandboxServer) -> None:
    first = runner.invoke(app, ["dodo", "sync"])
    assert "created at Dodo: meter:charge, pack:small" in first.output
    second = runner.invoke(app, ["dodo", "sync"])
    assert (second.exit_code, "created at" in second.output) == (0, False)
    assert "Dodo has everything" in second.output
    assert "to be created" not in second.output


def test_sync_asks_in_live_mode(sandbox: SandboxServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selling, "LIVE", SANDBOX)
    refused = runner.invoke(app, ["dodo", "sync"], input="n\n")
    assert (refused.exit_code, "created at" in refused.output) == (1, False)
    assert "created at" in runner.invoke(app, ["dodo", "sync"], input="y\n").output


def test_sync_does_not_ask_without_need(sandbox: SandboxServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selling, "LIVE", SANDBOX)
    assert "created at" in runner.invoke(app, ["dodo", "sync", "--yes"]).output
    assert "live mode" not in runner.invoke(app, ["dodo", "sync"]).output


def test_without_dodo_only_what_was_created_before_is_deployable(
    sandbox: SandboxServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prices cannot be compared, and what is missing cannot be created."""
    target = Target.find(Settings.from_env())
    assert selling.make_at_dodo({"applications": []}, target.environment, is_agreed=False) is not None
    away = {**target.environment, "DODO_PAYMENTS_BASE_URL": "http://127.0.0.1:9"}
    assert selling.make_at_dodo({"applications": []}, away, is_agreed=False) is None
    assert "not compared with Dodo" in capsys.readouterr().out
    dearer = CATALOG | {"packs": {"small": {"price": "6", "grants": {"usd": "5"}, "expires_days": 30}}}
    monkeypatch.setattr(dodo_products, "catalog_of", lambda config: Catalog.model_validate(dearer))
    with pytest.raises(LaunchError, match="created there yet: pack:small"):
        selling.make_at_dodo({"applications": []}, away, is_agreed=False)
