"""A report of a month that is over is the same to the byte, whatever is changed and sold afterwards."""

import asyncio
import csv
import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
from redis.asyncio import Redis
from typer.testing import CliRunner

from billing.catalog import publication
from billing.catalog.catalog import Catalog
from billing.catalog.plans import Pack
from billing.catalog.terms import Terms
from billing.clock import now_ms
from billing.commerce.cash import CashBook, Entry, Fee, Kind
from billing.commerce.dodo_ids import keep_ids
from billing.commerce.products import Products
from billing.ledger.account import Grant
from billing.ledger.ledger import Ledger
from billing.store.connection import connect
from billing.store.schema import open_schema
from billing.tenants.directory import Tenants
from billing.tenants.tenant import Subscription, SubscriptionStatus, Tenant
from billing.usage import OVERAGE, BucketId, Draw, TenantId, Unit
from cluster.cli.main import app
from cluster.dodo_sandbox.server import SandboxServer
from cluster.local.settings import Settings
from cluster.local.state import Home
from tests.support import past
from tests.support.cli import write_healthy_run
from tests.support.past import at
from tests.support.reports import CATALOG, USD, record
from tests.support.samples import request, settlement

pytestmark = pytest.mark.slow

T = TypeVar("T")
ACME, ZETA = TenantId("acme"), TenantId("zeta")
EXPERIMENT = {"id": "raise", "arms": [{"id": "control"}, {"id": "raised", "multiplier": "1.2"}]}
BEFORE = CATALOG.model_validate(
    CATALOG.model_dump() | {"costs": {"gpu_hour": "3.60"}, "pricing": {"experiments": [EXPERIMENT]}}
)
OCTOBER = (
    ["--month", "2026-10"],
    ["--month", "2026-10", "--json"],
    ["--month", "2026-10", "--csv"],
    ["--since", "2026-09-15", "--until", "2026-10-20", "--json"],
    ["--month", "2026-10", "--cash", "--csv"],
)
runner = CliRunner()


def changed(**more: object) -> Catalog:
    return Catalog.model_validate(BEFORE.model_dump() | more)


@pytest.fixture
def autumn(store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The store of a farebox with two tenants whose September and October are over."""
    monkeypatch.setenv("FAREBOX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "80")
    home = Home.open(Settings.from_env())
    with SandboxServer(tmp_path / "dodo", home.secrets().dodo_api_key) as sandbox:
        write_healthy_run(store_url, sandbox.url)
        run(store_url, fill)
        yield store_url


def run(store_url: str, work: Callable[[Redis], Awaitable[T]]) -> T:
    async def whole() -> T:
        redis = await connect(store_url)
        try:
            return await work(redis)
        finally:
            await redis.aclose()

    return asyncio.run(whole())


async def fill(redis: Redis) -> None:
    await redis.flushall()
    await open_schema(redis)
    await past.in_force(redis, "2026-09-01", BEFORE)
    await keep_ids(redis, {"pack:bonus": "pdt_bonus", "pack:calls": "pdt_calls", "plan:pro": "pdt_pro"})
    pack, quota = BucketId("payment:pay_1:pdt_bonus"), BucketId(f"allowance:sub_1:{at('2026-10-05')}:pro")
    subscription = Subscription(
        id="sub_1",
        plan="pro",
        status=SubscriptionStatus.ACTIVE,
        period_start_ms=at("2026-10-05"),
        period_end_ms=at("2026-11-05"),
    )
    for name in (ACME, ZETA):
        made = Tenant(id=name, email=f"{name}@example.com", plan="pro", created_at_ms=at("2026-09-01"))
        await Tenants(redis).create(made.model_copy(update={"subscription": subscription} if name == ZETA else {}))
    sale = {"price": 50 * USD, "expires_at_ms": at("2026-12-01")}
    await past.moved(redis, "2026-09-20", "grant", ACME, source=pack, bucket=pack, amount=55 * USD, **sale)
    draws = {
        "2026-09-21": (ACME, Draw(pack, Unit.NANOS, 11 * USD, 50 * USD, 55 * USD)),
        "2026-10-02": (ACME, Draw(pack, Unit.NANOS, 22 * USD, 50 * USD, 55 * USD)),
        "2026-10-03": (ACME, Draw(BucketId("payment:pay_0:pdt_bonus"), Unit.NANOS, 11 * USD)),
        "2026-10-06": (ZETA, Draw(quota, Unit.REQUESTS, 500, 100 * USD, 5_000)),
        "2026-10-07": (ZETA, Draw(OVERAGE, Unit.NANOS, 3 * USD)),
        "2026-10-08": (ZETA, Draw(BucketId("operator:gift"), Unit.NANOS, USD)),
    }
    for day, (tenant, draw) in draws.items():
        await past.settled(redis, past.of(record("", 0, plan="pro"), day, tenant, draws=(draw,)))
    for entry in (
        paid("2026-09-20", "pay_1", ACME, 5950, 950, what="pack", parts={"pack": 50 * USD}),
        paid("2026-10-05", "pay_2", ZETA, 11900, 1900, what="fee", parts={"fee": 100 * USD}, fees=(FEE,)),
        paid("2026-10-09", '=HYPERLINK("http://x")', ZETA, 119, 19, what="foreign", parts={"foreign": USD}),
    ):
        await past.booked(redis, entry)


FEE = Fee("sub_1", at("2026-10-05"), at("2026-11-05"))


def paid(day: str, payment: str, tenant: TenantId, cents: int, tax: int, **more: object) -> Entry:
    amounts = (cents, tax, "USD", cents, tax, "USD")
    made = Entry(f"payment:{payment}", Kind.PAYMENT, *amounts, at(day), tenant, payment, booked_at_ms=at(day))
    return replace(made, **more)  # type: ignore[arg-type]


def shown(*options: str) -> str:
    done = runner.invoke(app, ["report", *options])
    assert done.exit_code == 0, done.output
    return done.stdout


async def dearer_packs(redis: Redis) -> None:
    dear = {"bonus": {"price": "500", "grants": {"usd": "55"}}, "calls": {"price": "1", "grants": {"requests": 1}}}
    await publication.publish(redis, changed(packs=dear), "gw_1", now_ms())


async def no_packs(redis: Redis) -> None:
    await publication.publish(redis, changed(packs={}), "gw_1", now_ms())


async def other_plans(redis: Redis) -> None:
    plans = {"prepaid": {"kind": "prepaid"}}
    await publication.publish(redis, changed(plans=plans), "gw_1", now_ms())
    other = {"kind": "subscription", "monthly_price": "7", "allowance": {"usd": "3"}}
    await publication.publish(redis, changed(plans=plans | {"pro": other}), "gw_1", now_ms())


async def other_costs_and_experiments(redis: Redis) -> None:
    arms = [{"id": "control"}, {"id": "raised", "multiplier": "9"}, {"id": "new"}]
    experiments = {"experiments": [{"id": "raise", "arms": arms}, {"id": "other", "arms": arms}]}
    await publication.publish(redis, changed(costs={"gpu_hour": "99"}, pricing=experiments), "gw_1", now_ms())
    await publication.publish(redis, changed(costs=None, pricing={}), "gw_1", now_ms())


async def new_products(redis: Redis) -> None:
    """A new price is a new product; an old one gets terms of today."""
    dear = Pack.model_validate({"price": "500", "grants": {"usd": "55"}})
    await Products(redis).add("pdt_new", Terms.of_pack("bonus", dear))
    await Products(redis).add("pdt_bonus", Terms.of_pack("bonus", dear))


async def subscription_ends(redis: Redis) -> None:
    ended = {"status": SubscriptionStatus.CANCELLED, "period_end_ms": at("2026-10-20")}

    def end(tenant: Tenant) -> Tenant:
        assert tenant.subscription is not None
        return tenant.model_copy(
            update={"plan": "prepaid", "subscription": tenant.subscription.model_copy(update=ended)}
        )

    await Tenants(redis).update(ZETA, end)
    await Tenants(redis).create(Tenant(id=TenantId("new"), email="new@example.com", plan="pro"))


async def use_and_refunds(redis: Redis) -> None:
    """Sold, used, refunded and booked today, some of it with October's dates at Dodo."""
    pack, ledger = "payment:pay_1:pdt_bonus", Ledger(redis)
    await past.moved(redis, "2026-11-03", "clawback", ACME, source="refund:1", bucket=pack, amount=USD)
    await ledger.grant(Grant("payment:pay_9:pdt_bonus", ACME, Unit.NANOS, USD, price=USD))
    await ledger.hold(request())
    await ledger.settle(settlement())
    book = CashBook(redis)
    await book.book(paid("2026-10-30", "pay_late", ACME, 500, 0, what="pack"))
    await book.book(Entry("refund:2", Kind.REFUND, -119, -19, "USD", -119, -19, "USD", at("2026-10-30"), ZETA, "pay_2"))


CHANGES = [
    dearer_packs,
    no_packs,
    other_plans,
    other_costs_and_experiments,
    new_products,
    subscription_ends,
    use_and_refunds,
]


def test_past_month_is_the_same_to_the_byte_after_every_change(autumn: str) -> None:
    before = [shown(*options) for options in OCTOBER]
    for change in CHANGES:
        run(autumn, change)
        assert [shown(*options) for options in OCTOBER] == before, change.__name__


def test_past_month_in_figures(autumn: str) -> None:
    """22 of the 55 for 50 dollars in October, 11 of an older bonus pack by the catalog; 500 of 5,000 calls for 100.

    The differences are a dollar for another product, and ten that were earned of a pack whose sale is not recorded.
    """
    [october] = json.loads(shown("--month", "2026-10", "--json"))["months"]
    assert october == {
        "month": "2026-10",
        "paid_usd": "120.190000",
        "tax_usd": "19.190000",
        "refunds_usd": "0.000000",
        "disputes_usd": "0.000000",
        "fees_usd": "0.000000",
        "net_usd": "101.000000",
        "paid_out_usd": "0.000000",
        "prepaid_usd": "30.000000",
        "allowance_usd": "10.000000",
        "postpaid_usd": "3.000000",
        "expired_usd": "0.000000",
        "earned_usd": "43.000000",
        "given_usd": "1.000000",
        "deferred_usd": "110.000000",
        "unpaid_usd": "3.000000",
        "differences_usd": "-9.000000",
        "cost_usd": "0.005000",
        "margin_percent": 99,
    }


def test_csv_has_a_line_for_each_month_with_exact_amounts(autumn: str) -> None:
    rows = list(csv.DictReader(io.StringIO(shown("--since", "2026-09-01", "--until", "2026-10-31", "--csv"))))
    assert [row["month"] for row in rows] == ["2026-09", "2026-10"]
    assert [(row["paid_usd"], row["deferred_usd"]) for row in rows] == [
        ("59.500000", "40.000000"),
        ("120.190000", "110.000000"),
    ]
    assert json.loads(shown("--since", "2026-09-01", "--until", "2026-10-31", "--json"))["months"] == [
        {name: int(value) if name == "margin_percent" else value for name, value in row.items()} for row in rows
    ]


def test_cash_book_is_listed_and_runs_no_formula(autumn: str) -> None:
    rows = list(csv.DictReader(io.StringIO(shown("--month", "2026-10", "--cash", "--csv"))))
    assert [(row["kind"], row["for"], row["tenant"], row["settled"], row["settled_tax"]) for row in rows] == [
        ("payment", "fee", "zeta", "11900", "1900"),
        ("payment", "foreign", "zeta", "119", "19"),
    ]
    assert rows[1]["payment"] == '\'=HYPERLINK("http://x")'
    assert json.loads(shown("--month", "2026-10", "--cash", "--json"))[1]["payment"] == '=HYPERLINK("http://x")'
    run(autumn, use_and_refunds)
    amounts = {row["amount"] for row in csv.DictReader(io.StringIO(shown("--cash", "--csv")))}
    assert "-119" in amounts, "a number below zero is no formula"


@pytest.mark.parametrize("options", [(), ("--cash",)])
def test_table_reads_at_80_columns_and_whole_in_a_pipe(autumn: str, options: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "cluster.cli.main", "report", "--month", "2026-10", *options]
    environ = os.environ | {"COLUMNS": "80", "TERM": "dumb"}
    piped = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout
    narrow = on_terminal(["--month", "2026-10", *options])
    for text in (piped, narrow):
        assert "…" not in text
    assert max(len(line) for line in narrow.splitlines()) <= 80
    if not options:
        assert "$120.19" in narrow
        assert "$110.00" in piped


def on_terminal(options: list[str]) -> str:
    """What a terminal of 80 columns shows."""
    command = [sys.executable, "-m", "cluster.cli.main", "report", *options]
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb") as terminal:
        subprocess.run(command, env=os.environ | {"COLUMNS": "80", "TERM": "dumb"}, stdout=theirs, check=True)
        os.close(theirs)
        return _all_of(terminal.fileno()).decode()


def _all_of(terminal: int) -> bytes:
    found = b""
    while True:
        try:
            some = os.read(terminal, 65_536)
        except OSError:  # how a terminal says that its other end is closed
            return found
        if not some:
            return found
        found += some


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--month", "2026-13"], "not a month"),
        (["--month", "October"], "not a month"),
        (["--month", "2026-10", "--since", "2026-10-01"], "either --month or"),
        (["--csv", "--json"], "either --csv or"),
        (["--since", "2026-10-02", "--until", "2026-10-01"], "before the first"),
        (["--month", "2999-01"], "2999-01 has not begun"),
        (["--month", "9999-12"], "9999-12 has not begun"),
        (["--since", "2999-01-01"], "2999-01-01 has not begun"),
        (["--until", "2999-01-01"], "2999-01-01 has not begun"),
        (["--since", "2026-10-01", "--until", "2999-01-01", "--cash"], "2999-01-01 has not begun"),
        (["--until", "9999-12-31"], "too far away"),
        (["--until", "0001-01-01"], "too far away"),
        (["--since", "0001-01-01"], "too far away"),
        (["--month", "0001-01"], "too far away"),
        (["--gpu-hour=-1"], "above 0"),
        (["--gpu-hour", "0"], "above 0"),
        (["--gpu-hour", "cheap"], "dollars"),
        (["--cash", "--gpu-hour", "3"], "either --cash or"),
    ],
)
def test_report_refuses_invalid_options(autumn: str, options: list[str], word: str) -> None:
    done = runner.invoke(app, ["report", *options])
    assert done.exit_code in (1, 2)
    assert isinstance(done.exception, SystemExit), "an error in words and no traceback"
    assert word in done.output


def test_cash_book_tells_ours_from_the_rest_and_what_was_refunded(autumn: str) -> None:
    """A cart of a pack for 100 dollars and an e-book for nine, 19 % tax: refunded in part, then disputed whole."""
    parts = {"pack": 100 * USD, "foreign": 9 * USD}
    cart = paid("2026-10-20", "pay_3", ACME, 12971, 2071, what="pack+foreign", parts=parts)
    back = replace(paid("2026-10-20", "pay_3", ACME, -119, -19), id="refund:1", kind=Kind.REFUND)
    gone = replace(paid("2026-10-20", "pay_3", ACME, -12971, -2071), id="open:1", kind=Kind.DISPUTE_OPENED)
    ebook = replace(paid("2026-10-20", '=HYPERLINK("http://x")', ZETA, -119, -19), id="refund:2", kind=Kind.REFUND)
    off = paid("2026-10-20", "pay_4", ACME, 5000, 0, what="pack+foreign", parts=parts | {"foreign": -50 * USD})

    async def book(redis: Redis) -> None:
        for entry in (cart, back, gone, ebook, off):
            await past.booked(redis, entry)

    run(autumn, book)
    rows = csv.DictReader(io.StringIO(shown("--month", "2026-10", "--cash", "--csv")))
    assert [(row["kind"], row["for"], row["ours"], row["foreign"]) for row in rows] == [
        ("payment", "fee", "10000", "0"),
        ("payment", "foreign", "0", "100"),
        ("payment", "pack+foreign", "10000", "900"),
        ("refund", "pack+foreign", "", ""),
        ("dispute_opened", "pack+foreign", "-10000", "-900"),
        ("refund", "foreign", "0", "-100"),
        ("payment", "pack+foreign", "", ""),
    ]
    narrow = on_terminal(["--month", "2026-10", "--cash"])
    assert max(len(line) for line in narrow.splitlines()) <= 80
    assert "hundredths" not in narrow
    assert all(text in narrow for text in ("129.71", "100.00", "9.00", "pack+foreign")), narrow


def test_what_is_settled_in_another_currency_is_named_and_not_added(autumn: str) -> None:
    euros = replace(paid("2026-10-20", "pay_3", ACME, 900, 0, what="pack"), settled_currency="EUR")
    before = json.loads(shown("--month", "2026-10", "--json"))
    run(autumn, lambda redis: past.booked(redis, euros))
    after = json.loads(shown("--month", "2026-10", "--json"))
    assert (before.pop("not_in_usd"), after.pop("not_in_usd")) == ({}, {"EUR": 1})
    assert after == before
    assert "1 in EUR" in runner.invoke(app, ["report", "--month", "2026-10"]).stderr


def test_arms_of_an_experiment_read_at_80_columns(autumn: str) -> None:
    """Ten tenants or so in each arm, so that there are intervals; long names fold."""

    async def more_tenants(redis: Redis) -> None:
        for number in range(24):
            made = Tenant(id=TenantId(f"tenant-{number}-{'x' * 40}"), email="a@example.com", plan="pro")
            await Tenants(redis).create(made.model_copy(update={"created_at_ms": at("2026-09-01")}))

    run(autumn, more_tenants)
    wide = shown("--month", "2026-10")
    assert " to " in wide
    with_width = on_terminal(["--month", "2026-10"])
    assert max(len(line) for line in with_width.splitlines()) <= 80
    assert "…" not in with_width
    squeezed = "".join(with_width.split())
    ranges = [cell for line in wide.splitlines() for cell in line.split("  ") if " to " in cell]
    assert ranges
    assert all(part in squeezed for cell in ranges for part in cell.split())
