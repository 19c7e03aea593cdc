"""``farebox webhooks``: webhooks that wait or were set aside are listed, applied again, booked and dropped."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from billing.commerce.inbox import Delivery, Inbox, Outcome
from billing.store.connection import connect
from billing.tenants.directory import Tenants
from billing.tenants.tenant import Tenant
from billing.usage import TenantId
from cluster.cli.main import app
from tests.support.cli import write_healthy_run

runner = CliRunner()
LATER_MS = 9_000_000_000_000
PAYMENT = {
    "payment_id": "pay_4",
    "status": "succeeded",
    "customer": {"customer_id": "cus_4"},
    "product_cart": [{"product_id": "pdt_book", "quantity": 1}],
    "total_amount": 900,
    "currency": "USD",
}
REASON = "NotYet: product pdt_1 of payment pay_1 is no pack of ours"


@pytest.fixture
def farebox(store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two webhooks wait until far in the future; a third was applied, and a payment of $9 is set aside."""
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
    aside = Delivery("msg_4", "payment.succeeded", json.dumps({"data": PAYMENT}), 1_000)
    await inbox.receive(aside, LATER_MS)
    await inbox.finish(replace(aside, outcome=Outcome.SET_ASIDE, reason="not sold here", attempts=1))
    await Tenants(redis).create(Tenant(id=TenantId("acme"), email="it@acme.example", plan="prepaid"))
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
    assert [(one["id"], one["outcome"], one["attempts"], one["reason"]) for one in listed] == [
        ("msg_1", "waiting", 1, REASON),
        ("msg_2", "waiting", 2, REASON),
        ("msg_4", "set_aside", 1, "not sold here"),
    ]
    assert (listed[2]["payment_id"], listed[2]["total_amount"]) == ("pay_4", "900")


def test_replay_of_one_and_of_all(farebox: str) -> None:
    assert due(farebox) == []
    assert "1 of 3" in runner.invoke(app, ["webhooks", "replay", "msg_2"]).output
    assert due(farebox) == ["msg_2"]
    assert runner.invoke(app, ["webhooks", "replay", "--all"]).exit_code == 0
    assert sorted(due(farebox)) == ["msg_1", "msg_2"]
    assert runner.invoke(app, ["webhooks", "replay", "msg_4"]).exit_code == 0
    assert sorted(due(farebox)) == ["msg_1", "msg_2", "msg_4"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [(["msg_3"], 1, "no webhook with the id msg_3 waits"), ([], 2, "--all"), (["msg_1", "--all"], 2, "--all")],
)
def test_replay_refuses_unknown_ids(farebox: str, words: list[str], code: int, said: str) -> None:
    done = runner.invoke(app, ["webhooks", "replay", *words])
    assert (done.exit_code, said in done.output) == (code, True)
    assert due(farebox) == []


def listed(*ids: str) -> bool:
    shown = json.loads(runner.invoke(app, ["webhooks", "list", "--json"]).stdout)
    return [one["id"] for one in shown] == list(ids)


def test_drop_asks_for_a_reason_and_keeps_it(farebox: str) -> None:
    assert runner.invoke(app, ["webhooks", "drop", "msg_4"]).exit_code == 2
    assert runner.invoke(app, ["webhooks", "drop", "msg_4", "--reason", " "]).exit_code == 2
    broken = runner.invoke(app, ["webhooks", "drop", "msg_4", "--reason", "an\ne-book"])
    assert (broken.exit_code, "without line breaks" in broken.output) == (1, True)
    assert listed("msg_1", "msg_2", "msg_4")
    for id_ in ("msg_4", "msg_1"):
        assert runner.invoke(app, ["webhooks", "drop", id_, "--reason", "an e-book"]).exit_code == 0
    assert listed("msg_2")
    shown = json.loads(runner.invoke(app, ["notices", "--json"]).stdout)
    assert [(one["kind"], one["facts"]["webhook"], one["facts"]["reason"]) for one in shown] == [
        ("webhook.dropped", "msg_1", "an e-book"),
        ("webhook.dropped", "msg_4", "an e-book"),
    ]


def test_book_grants_once(farebox: str) -> None:
    words = ["webhooks", "book", "msg_4", "--tenant", "acme", "--usd", "9"]
    done = runner.invoke(app, words)
    assert (done.exit_code, "payment:pay_4:pdt_book" in done.output) == (0, True)
    assert listed("msg_1", "msg_2")
    assert runner.invoke(app, words).exit_code == 1
    shown = json.loads(runner.invoke(app, ["tenants", "show", "acme", "--json"]).stdout)
    assert shown["account"]["balance_usd"] == "9.000000"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["msg_4", "--tenant", "acme"], 2, "either --usd or"),
        (["msg_4", "--tenant", "acme", "--usd", "9", "--requests", "9"], 2, "either --usd or"),
        (["msg_4", "--tenant", "acme", "--usd", "nine"], 2, "nine"),
        (["msg_4", "--tenant", "acme", "--usd", "2000000"], 2, "the most is 1000000.00 dollars"),
        (["msg_4", "--tenant", "acme", "--usd", "999999999999"], 2, "the most is 1000000.00 dollars"),
        (["msg_4", "--tenant", "acme", "--usd", "0"], 2, "is nothing, or more than the $1000000.00"),
        (["msg_4", "--tenant", "nobody", "--usd", "9"], 1, "nobody"),
        (["msg_1", "--tenant", "acme", "--usd", "9"], 1, "cannot be read"),
        (["msg_3", "--tenant", "acme", "--usd", "9"], 1, "is applied"),
        (["msg_9", "--tenant", "acme", "--usd", "9"], 1, "is unknown"),
    ],
)
def test_book_refuses_what_it_cannot_grant(farebox: str, words: list[str], code: int, said: str) -> None:
    done = runner.invoke(app, ["webhooks", "book", *words])
    assert (done.exit_code, said in done.output) == (code, True)
    assert listed("msg_1", "msg_2", "msg_4")
