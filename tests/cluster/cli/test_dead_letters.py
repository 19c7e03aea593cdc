"""``farebox dodo dead`` and ``revive``: dead letters are listed with reasons and sent again unchanged."""

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from billing.export.checking import CheckedEntries
from billing.export.events import CHARGE, SealedEvent
from billing.export.outbox import START, Outbox
from billing.store.connection import connect
from billing.store.keys import shard_for
from billing.usage import TenantId
from cluster.cli.main import app
from tests.support.cli import write_healthy_run

runner = CliRunner()
EVENTS = [
    SealedEvent(f"id_{name}", TenantId(name), CHARGE, number, number, 100 + number, 0, {"charge_nanos": 100 + number})
    for number, name in enumerate(("acme", "zeta"))
]
REASON = "Dodo Payments refused with 422 : unknown customer"


@pytest.fixture
def farebox(store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The store of a running farebox with two dead letters."""
    monkeypatch.setenv("FAREBOX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    write_healthy_run(store_url)
    asyncio.run(_add_dead_letters(store_url))
    return store_url


async def _add_dead_letters(store_url: str) -> None:
    redis = await connect(store_url)
    await redis.flushall()
    outbox = Outbox(redis)
    for event in EVENTS:
        await outbox.seal(shard_for(event.tenant), START, "1-0", CheckedEntries({}), [event])
        await outbox.add_dead_letter(
            SealedEvent.from_json(event.to_json().replace('"reason":""', f'"reason":"{REASON}"'))
        )
    await redis.aclose()


async def _outbox(store_url: str) -> tuple[list[SealedEvent], int]:
    redis = await connect(store_url)
    try:
        return await Outbox(redis).events(), (await Outbox(redis).sums()).dead_events
    finally:
        await redis.aclose()


@pytest.mark.usefixtures("farebox")
def test_dead_lists_reasons() -> None:
    rows = json.loads(runner.invoke(app, ["dodo", "dead", "--json"]).stdout)
    assert rows[0] == {"id": "id_acme", "tenant": "acme", "event": CHARGE, "nanos": 100, "reason": REASON}
    shown = runner.invoke(app, ["dodo", "dead"]).output
    assert "id_zeta" in shown
    assert REASON in shown


def test_revive_of_one_and_of_all(farebox: str) -> None:
    assert "1 of 2" in runner.invoke(app, ["dodo", "revive", "id_zeta"]).output
    assert asyncio.run(_outbox(farebox)) == ([EVENTS[1]], 1)
    assert runner.invoke(app, ["dodo", "revive", "--all"]).exit_code == 0
    assert asyncio.run(_outbox(farebox)) == (EVENTS, 0)
    assert json.loads(runner.invoke(app, ["dodo", "dead", "--json"]).stdout) == []


@pytest.mark.parametrize(("args", "code"), [(["id_unknown"], 1), ([], 2), (["id_acme", "--all"], 2)])
def test_revive_refuses_unknown_ids(farebox: str, args: list[str], code: int) -> None:
    assert runner.invoke(app, ["dodo", "revive", *args]).exit_code == code
    assert asyncio.run(_outbox(farebox)) == ([], 2)
