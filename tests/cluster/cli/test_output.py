"""Every id, sum and date of every table is printed whole: in a pipe on one line, and in a terminal of 80 columns."""

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis
from redis.asyncio import Redis
from rich.text import Text
from typer.testing import CliRunner

from billing.catalog import publication
from billing.catalog.catalog import Catalog
from billing.commerce.inbox import Delivery, Inbox
from billing.dodo.client import Dodo
from billing.dodo.settings import DodoSettings
from billing.export.checking import CheckedEntries
from billing.export.events import CHARGE, SealedEvent
from billing.export.outbox import START, Outbox
from billing.ledger.account import Grant, Settlement
from billing.ledger.codec import snapshot_of
from billing.ledger.errors import UnresolvedSettlement
from billing.ledger.ledger import Ledger
from billing.notices.log import Notices
from billing.notices.notice import Notice, NoticeKind
from billing.store.connection import connect
from billing.store.keys import shard_for
from billing.tenants.directory import Tenants
from billing.tenants.tenant import Tenant, Throttle, new_key
from billing.usage import RequestId, TenantId, Unit
from cluster.cli.main import app
from cluster.cli.output import dollars, fields, out, table
from cluster.cli.status import Status, status_table
from cluster.dodo_sandbox.server import SandboxServer
from cluster.local import configuration, dodo_products
from cluster.local.settings import Settings
from cluster.local.state import Home
from tests.support.cli import write_healthy_run
from tests.support.movements import Scenario
from tests.support.samples import request, settlement
from tests.support.world import CATALOG

runner = CliRunner()
LONG = TenantId("northern-lights-analytics-and-research-of-the-far-north-gmbh-1")
NEVER_SERVED = TenantId(LONG[:-1] + "2")
EMAIL = "accounts-payable.department@northern-lights-analytics-and-research.example"
EVENT, DELIVERY, REQUEST = "evt_" + "5f" * 32, "msg_" + "2Kd9" * 10, RequestId("req_" + "7c" * 16)
BALANCE = 123_456_123_456_789
REASON = "Dodo refused with 422: the customer of this event has been merged into another one, ask for its new id"
AT_MS = 1_796_000_000_000
DATE = re.compile(r"\d{4}-\d\d-\d\d(?: \d\d:\d\d:\d\d)?")
BOX = re.compile(r"[─-╿]")


@pytest.fixture
def farebox(store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A farebox with the longest values in every list; returns the id of a key."""
    monkeypatch.setenv("FAREBOX_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(configuration, "checked", lambda settings: {"applications": []})
    monkeypatch.setattr(dodo_products, "catalog_of", lambda config: Catalog.model_validate(CATALOG))
    home = Home.open(Settings.from_env())
    with SandboxServer(tmp_path / "dodo", home.secrets().dodo_api_key) as sandbox:
        write_healthy_run(store_url, sandbox.url)
        yield asyncio.run(fill(store_url, sandbox))


async def fill(store_url: str, sandbox: SandboxServer) -> str:
    redis, dodo = await connect(store_url), Dodo(DodoSettings(sandbox.api_key, base_url=sandbox.url))
    try:
        await redis.flushall()
        lost = await lose_a_hold(redis)
        scenario = Scenario(redis, dodo)
        await scenario.open()
        await scenario.move()
        tenants = Tenants(redis)
        made = await tenants.create(Tenant(id=LONG, email=EMAIL, plan="prepaid", name="Northern Lights"))
        await tenants.set_customer(LONG, await dodo.create_customer(made))
        await scenario.ledger.grant(Grant("payment:9", LONG, Unit.NANOS, BALANCE))
        await scenario.serve("req_long_name", LONG)
        await scenario.flush()
        with pytest.raises(UnresolvedSettlement):
            await scenario.ledger.settle(lost)
        costs = {"costs": {"gpu_hour": "2.00"}}
        await publication.publish(redis, Catalog.model_validate(CATALOG | costs), "gateway-1", 0)
        await add_what_waits(redis)
        key = new_key(LONG, AT_MS, "the nightly batch of the research department", ("pirate", "haiku", "base"))[1]
        why = Throttle(reason="many_addresses", detail="about 120 client addresses this hour", since_ms=AT_MS)
        await tenants.add_key(key.model_copy(update={"throttled": why, "daily_cap": 98_765_432_100_000}))
        return key.id
    finally:
        await dodo.close()
        await redis.aclose()


async def lose_a_hold(redis: Redis) -> Settlement:
    """A settlement whose hold the store has lost."""
    ledger = Ledger(redis)
    await ledger.grant(Grant("payment:1", LONG, Unit.NANOS, 200_000))
    hold = await ledger.hold(request(REQUEST, tenant=LONG))
    await redis.flushall()
    return replace(settlement(REQUEST), tenant=LONG, snapshot=snapshot_of(hold, hold.held_nanos))


async def add_what_waits(redis: Redis) -> None:
    """A dead letter, a parked webhook and a notice."""
    event = SealedEvent(EVENT, NEVER_SERVED, CHARGE, 1, 1, BALANCE, 0, {"charge_nanos": BALANCE})
    outbox = Outbox(redis)
    await outbox.seal(shard_for(NEVER_SERVED), START, "1-0", CheckedEntries({}), [event])
    await outbox.add_dead_letter(replace(event, reason=REASON))
    await Inbox(redis).receive(Delivery(DELIVERY, "payment.succeeded", "{}", AT_MS, reason=REASON, attempts=3), AT_MS)
    facts = {"payment_id": "pay_" + "9a" * 14, "usd": "123456.123456789"}
    await Notices(redis).record(Notice(NoticeKind.BALANCE_LOW, LONG, "once", AT_MS, facts))


TABLES = [
    ["usage"],
    ["usage", "--by", "day"],
    ["tenants", "list"],
    ["tenants", "show", LONG],
    ["keys", "list", LONG],
    ["report"],
    ["price", "--gpu-hour", "3.60", "--tokens-per-second", "1000"],
    ["notices"],
    ["reconcile"],
    ["unresolved", "list"],
    ["webhooks", "list"],
    ["dodo", "dead"],
    ["dodo", "sync", "--plan"],
    ["dodo", "verify"],
]


def in_pipe(words: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    monkeypatch.setattr(out, "width", 80)
    return runner.invoke(app, words).stdout


def in_terminal(words: list[str], monkeypatch: pytest.MonkeyPatch, columns: int = 80) -> str:
    """What a terminal shows, without colours."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setattr(out, "width", columns)
    return Text.from_ansi(runner.invoke(app, words).stdout).plain


@pytest.mark.usefixtures("farebox")
@pytest.mark.parametrize("words", TABLES, ids=" ".join)
def test_table_is_whole_at_80_columns(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every id, sum and date that a pipe shows stands in the terminal too, in one piece."""
    piped, shown = in_pipe(words, monkeypatch), in_terminal(words, monkeypatch)
    assert piped.strip()
    assert "$0…" not in piped + shown
    expected = {*DATE.findall(piped), *filter(re.compile(r"[\d@$]").search, piped.split())}
    assert expected - {*DATE.findall(shown), *BOX.sub(" ", shown).split()} == set()


PIPED: list[tuple[list[str], tuple[str, ...]]] = [
    (["usage"], (LONG, "$0.000020")),
    (["tenants", "list"], (LONG, EMAIL, "$123456.123436789", "cus_")),
    (["keys", "list", LONG], ("key_", "fbx_", "$98765.4321", "2026-11-30 00:53:20", "about 120 client addresses")),
    (["unresolved", "list"], (REQUEST, LONG, "$0.000020")),
    (["webhooks", "list"], (DELIVERY, "2026-11-30 00:53:20", REASON)),
    (["notices"], (LONG, "2026-11-30 00:53:20", "pay_" + "9a" * 14, "123456.123456789")),
    (["dodo", "dead"], (EVENT, NEVER_SERVED, "$123456.123456789", REASON)),
    (["reconcile"], (f"+{BALANCE}", f"counts {BALANCE} sealed, its records sum to 0")),
]


@pytest.mark.usefixtures("farebox")
@pytest.mark.parametrize(("words", "values"), PIPED, ids=[" ".join(words) for words, _ in PIPED])
def test_row_is_one_line_in_a_pipe(words: list[str], values: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = in_pipe(words, monkeypatch).splitlines()
    assert any(all(value in line for value in values) for line in lines), "\n".join(lines)
    assert not any(BOX.search(line) for line in lines)


def test_key_id_from_the_list_revokes_it(farebox: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = in_terminal(["keys", "list", LONG], monkeypatch)
    found = re.search(r"key_\w+", shown)
    assert found is not None
    assert found.group() == farebox
    monkeypatch.delenv("TTY_COMPATIBLE")
    revoked = runner.invoke(app, ["keys", "revoke", LONG, found.group(), "--json"])
    assert json.loads(revoked.stdout)["revoked_at_ms"]


@pytest.mark.parametrize("words", [["webhooks", "list"], ["dodo", "dead"], ["unresolved", "list"], ["notices"]])
def test_empty_list_says_none_in_a_terminal(
    words: list[str], store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAREBOX_HOME", str(tmp_path / "home"))
    write_healthy_run(store_url)
    client = redis.Redis.from_url(store_url)
    client.flushall()
    client.close()
    assert in_terminal(words, monkeypatch) == "none\n"
    assert in_pipe(words, monkeypatch).count("\n") == 1, "the names of its columns"


def test_status_is_not_folded_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setattr(out, "width", 80)
    with out.capture() as captured:
        out.print(status_table(Status("failed", REASON, None, {}, {"backlog": 0})))
    shown = Text.from_ansi(captured.get()).plain.splitlines()
    assert REASON in shown
    assert any(line.startswith("needs attention: ") and line.endswith("unreadable settlements") for line in shown)


def test_minus_stands_before_the_dollar_sign() -> None:
    assert (dollars(-65_400), dollars(65_400), dollars(-5_000_000_000, 2)) == ("-$0.0000654", "$0.0000654", "-$5.00")


def test_prose_is_folded_before_rows_become_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    rows = table("id", "reason", "usd", right=("usd",), prose=("reason",))
    rows.add_row("id_1", REASON, "$1.00")
    widths = {}
    for columns in (160, 80, 20):
        monkeypatch.setattr(out, "width", columns)
        with out.capture() as captured:
            out.print(rows)
        widths[columns] = Text.from_ansi(captured.get()).plain
    assert REASON in widths[160]
    assert "│" in widths[80]
    assert REASON not in widths[80]
    assert "│" not in widths[20]
    assert "id      id_1" in widths[20]


def test_line_breaks_in_a_value_do_not_break_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    rows = table("name", "usd")
    rows.add_row("two\nlines\x1b[31m", "$1.00")
    with out.capture() as captured:
        out.print(rows)
        out.print(fields([("name", "two\r\nlines")]))
    assert captured.get().splitlines()[1:] == ["two lines [31m  $1.00", "name  two lines"]


def test_colours_in_a_pipe_do_not_make_it_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(out, "width", 20)
    rows = table("id", "usd")
    rows.add_row(EVENT, "$1.00")
    with out.capture() as captured:
        out.print(rows)
    assert f"{EVENT}  $1.00" in captured.get()


def test_sentence_is_one_line_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    with out.capture() as captured:
        out.print(REASON * 3)
    assert captured.get() == REASON * 3 + "\n"
