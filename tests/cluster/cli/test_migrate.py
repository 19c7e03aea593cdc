"""``farebox migrate`` shows or does the migration of a stopped cluster's store; ``farebox up`` does its own."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from typer.testing import CliRunner

from billing.store.connection import connect, reach
from billing.store.errors import StoreRefused
from cluster import valkey
from cluster.cli.main import app
from cluster.local.configuration import StoreOptions
from cluster.local.store import migrate_store, verify_store
from tests.support import recorded

runner = CliRunner()
OPTIONS = StoreOptions(durability="strict", min_replicas_acked=0)


@pytest.fixture
def old_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a store that version 0.1 wrote; no farebox runs in this folder."""
    server = valkey.start(tmp_path / "s")
    monkeypatch.setenv("REDIS_URL", server.url)
    monkeypatch.setenv("FAREBOX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    asyncio.run(_load(server.url))
    yield server.url
    server.stop()


async def _load(url: str) -> None:
    redis = await reach(url)
    await recorded.load(redis)
    await redis.aclose()


async def _contents(url: str) -> dict[str, object]:
    redis = await reach(url)
    try:
        return await recorded.contents(redis)
    finally:
        await redis.aclose()


def test_dry_run_shows_the_changes_and_makes_none(old_store: str) -> None:
    before = asyncio.run(_contents(old_store))
    result = runner.invoke(app, ["migrate", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "schema 1 to 2" in result.output
    assert "would change" in result.output
    assert asyncio.run(_contents(old_store)) == before


def test_migrated_store_is_opened(old_store: str) -> None:
    refused = runner.invoke(app, ["usage"])
    assert (refused.exit_code, "farebox migrate" in refused.output) == (1, True)
    assert runner.invoke(app, ["migrate"]).exit_code == 0
    assert "the store has schema 2" in runner.invoke(app, ["migrate"]).output
    assert runner.invoke(app, ["usage"]).exit_code == 0


def test_migration_refused_while_a_gateway_runs(old_store: str) -> None:
    gateway = Redis.from_url(old_store, client_name="farebox:1")
    gateway.ping()
    result = runner.invoke(app, ["migrate"])
    gateway.close()
    assert result.exit_code == 1
    assert "stop these first, they use the store: farebox:1" in result.output


def test_up_migrates_the_store_that_it_starts(old_store: str) -> None:
    said: list[str] = []
    with pytest.raises(StoreRefused):
        asyncio.run(connect(old_store))
    for _ in range(2):
        asyncio.run(migrate_store(old_store, said.append))
    assert said == ["migrated the store from schema 1 to 2"]
    asyncio.run(verify_store(old_store, OPTIONS, "sandbox"))


def test_error_with_brackets_is_printed(old_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such an error is no markup of the terminal's."""
    monkeypatch.setenv("REDIS_URL", "http[/x]://")
    assert "http[/x]" in runner.invoke(app, ["migrate"]).output
