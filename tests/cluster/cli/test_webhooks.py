"""``farebox webhooks``: webhooks that could not be applied are listed and applied again."""

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from billing.commerce.inbox import Delivery, Inbox, Outcome
from billing.store.connection import connect
from cluster.cli.main import app
from tests.support.cli import write_healthy_run

runner = CliRunner()
LATER_MS = 9_000_000_000_000
REASON = "NotYet: product pdt_1 of payment pay_1 is no pack of ours"


@pytest.fixture
def farebox(store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two webhooks wait until far in the future; a third was applied."""
    monkeypatch.setenv("FAREBOX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    write_healthy_run(store_url)
    asyncio.run(_park(store_url))
    return store_url


async def _park(store_url: str) -> None:
    redis = await connect(store_url)
    await redis.flushall()
    inbox = Inbox(redis)
    for number in (1, 2, 3):
        one = Delivery(f"msg_{number}", "payment.succeeded", "{}", 1_000, reason=REASON, attempts=number)
        await inbox.receive(one, LATER_MS)
    await inbox.finish(Delivery("msg_3", "payment.succeeded", "{}", 1_000, Outcome.APPLIED))
    await redis.aclose()


def due(store_url: str) -> list[str]:
    async def read() -> list[str]:
        redis = await connect(store_url)
        found = await Inbox(redis).due(LATER_MS - 1, 50)
        await redis.aclose()
        return found

    return asyncio.run(read())


def test_list_shows_the_reasons(farebox: str) -> None:
    shown = runner.invoke(app, ["webhooks", "list"])
    assert shown.exit_code == 0
    assert "no pack of ours" in shown.output
    listed = json.loads(runner.invoke(app, ["webhooks", "list", "--json"]).stdout)
    assert [(one["id"], one["attempts"], one["reason"]) for one in listed] == [
        ("msg_1", 1, REASON),
        ("msg_2", 2, REASON),
    ]


def test_replay_of_one_and_of_all(farebox: str) -> None:
    assert due(farebox) == []
    assert "1 of 2" in runner.invoke(app, ["webhooks", "replay", "msg_2"]).output
    assert due(farebox) == ["msg_2"]
    assert runner.invoke(app, ["webhooks", "replay", "--all"]).exit_code == 0
    assert sorted(due(farebox)) == ["msg_1", "msg_2"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [(["msg_3"], 1, "no webhook with the id msg_3 waits"), ([], 2, "--all"), (["msg_1", "--all"], 2, "--all")],
)
def test_replay_refuses_unknown_ids(farebox: str, words: list[str], code: int, said: str) -> None:
    done = runner.invoke(app, ["webhooks", "replay", *words])
    assert (done.exit_code, said in done.output) == (code, True)
    assert due(farebox) == []
