"""``farebox dodo sync`` shows first, makes once, and asks before it touches live money."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from typer.testing import CliRunner

from billing.catalog.catalog import Catalog
from cluster.cli import main
from cluster.cli.main import app
from cluster.dodo_sandbox.server import SandboxServer
from cluster.local import commerce
from cluster.local.environment import LIVE
from cluster.local.settings import Settings
from cluster.local.state import Home
from tests.support.cli import tell
from tests.support.world import CATALOG

runner = CliRunner()


@pytest.fixture
def sandbox(store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SandboxServer]:
    """A farebox that sells a small catalog; only the reading of its adapters is left out."""
    monkeypatch.setenv("FAREBOX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(commerce, "resolved", lambda settings: {"applications": []})
    monkeypatch.setattr(commerce, "catalog_of", lambda config: Catalog.model_validate(CATALOG))
    client = Redis.from_url(store_url)
    client.flushall()
    client.close()
    with SandboxServer(tmp_path / "dodo", Home.open(Settings.from_env()).secrets().dodo_api_key) as server:
        tell(store_url, server.url)
        yield server


def test_a_plan_shows_and_makes_nothing(sandbox: SandboxServer) -> None:
    for _ in range(2):
        done = runner.invoke(app, ["dodo", "sync", "--plan"])
        assert done.exit_code == 0, done.output
        assert done.output.count("to be made") == 6


def test_a_sync_makes_it_once(sandbox: SandboxServer) -> None:
    first = runner.invoke(app, ["dodo", "sync"])
    assert "made: meter:charge, pack:small" in first.output
    second = runner.invoke(app, ["dodo", "sync"])
    assert (second.exit_code, "made:" in second.output) == (0, False)
    assert "to be made" not in second.output


def test_live_mode_asks_first(sandbox: SandboxServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "dodo_environment", lambda *_: LIVE)
    refused = runner.invoke(app, ["dodo", "sync"], input="n\n")
    assert (refused.exit_code, "made:" in refused.output) == (1, False)
    assert "made:" in runner.invoke(app, ["dodo", "sync"], input="y\n").output


def test_live_mode_does_not_ask_where_nothing_is_to_be_made_or_it_was_told_not_to(
    sandbox: SandboxServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "dodo_environment", lambda *_: LIVE)
    assert "made:" in runner.invoke(app, ["dodo", "sync", "--yes"]).output
    assert "live mode" not in runner.invoke(app, ["dodo", "sync"]).output
