"""``farebox unresolved``: settlements after a lost store are listed, charged and dropped."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from billing.ledger.codec import snapshot_of
from billing.ledger.errors import UnresolvedSettlement
from billing.ledger.ledger import Ledger
from billing.store.connection import connect
from cluster.cli.main import app
from tests.support.cli import write_healthy_run
from tests.support.samples import ACME, money, request, settlement

runner = CliRunner()


@pytest.fixture
def farebox(store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store that lost everything while two requests ran, and was then given their credit again."""
    monkeypatch.setenv("FAREBOX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    write_healthy_run(store_url)
    asyncio.run(_lose(store_url))
    return store_url


async def _lose(store_url: str) -> None:
    redis = await connect(store_url)
    await redis.flushall()
    ledger = Ledger(redis)
    await ledger.grant(money(200_000))
    holds = [await ledger.hold(request(f"req_{number}")) for number in (1, 2)]
    await redis.flushall()
    for hold in holds:
        ended = replace(settlement(hold.request.request_id), snapshot=snapshot_of(hold, hold.held_nanos))
        with pytest.raises(UnresolvedSettlement):
            await ledger.settle(ended)
    await ledger.grant(money(200_000))
    await redis.aclose()


async def _balance(store_url: str) -> int:
    redis = await connect(store_url)
    try:
        return (await Ledger(redis).account(ACME)).balance_nanos
    finally:
        await redis.aclose()


def _listed() -> list[str]:
    return [one["request_id"] for one in json.loads(runner.invoke(app, ["unresolved", "list", "--json"]).stdout)]


def test_unresolved_are_listed_charged_and_dropped(farebox: str) -> None:
    shown = runner.invoke(app, ["unresolved", "list"]).output
    assert "req_1" in shown
    assert "credit" in shown
    assert _listed() == ["req_1", "req_2"]
    assert "rec_req_1" in runner.invoke(app, ["unresolved", "charge", "req_1"]).output
    assert runner.invoke(app, ["unresolved", "drop", "req_2"]).exit_code == 0
    assert (_listed(), asyncio.run(_balance(farebox))) == ([], 180_000)
    again = runner.invoke(app, ["unresolved", "charge", "req_1"])
    assert again.exit_code == 1
    assert "req_1" in again.output
    assert asyncio.run(_balance(farebox)) == 180_000
