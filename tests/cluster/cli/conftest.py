"""A farebox with a store and a sandbox for commands, without Ray."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from billing.archive.archiver import Archiver
from billing.archive.files import Archive
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.store.connection import connect
from billing.sweep import Sweep
from cluster.dodo_sandbox.server import SandboxServer
from cluster.local.settings import Settings
from cluster.local.state import Home
from tests.support.cli import write_healthy_run
from tests.support.movements import Scenario


@pytest.fixture
def ledger_with_usage(store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The store of a farebox that has served, exported and archived requests; one record is not archived yet."""
    monkeypatch.setenv("FAREBOX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    home = Home.open(Settings.from_env())
    with SandboxServer(tmp_path / "dodo", home.secrets().dodo_api_key) as sandbox:
        write_healthy_run(store_url, sandbox.url)
        asyncio.run(_fill(store_url, sandbox, tmp_path / "archive"))
        yield store_url


async def _fill(store_url: str, sandbox: SandboxServer, archive: Path) -> None:
    redis, dodo = await connect(store_url), Dodo(DodoSettings(sandbox.api_key, base_url=sandbox.url))
    try:
        await redis.flushall()
        scenario = Scenario(redis, dodo)
        await scenario.open()
        await scenario.move()
        await scenario.flush()
        await Archiver(redis, Archive(str(archive)), 0).run_once(Sweep("archive"))
        await scenario.serve("req_live")
    finally:
        await dodo.close()
        await redis.aclose()
