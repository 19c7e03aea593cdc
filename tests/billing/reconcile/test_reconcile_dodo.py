"""Dodo's books against ours: events, meters and invoices, asked for only as far as they are not proved yet."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from billing.archive.archive_cursor import ArchiveCursor
from billing.dodo.call_budget import CallBudget
from billing.dodo.client import Dodo, Event
from billing.dodo.wire import DodoEvent, UsagePeriod
from billing.export.events import CHARGE, USAGE
from billing.export.outbox import Outbox
from billing.ledger.account import Funding
from billing.money import Nanos
from billing.reconcile.dodo_proofs import Frozen, ShardExport, TenantAtDodo, prove_events, prove_periods
from billing.reconcile.reconciler import Reconciler, Report
from billing.reconcile.watermark import Watermarks
from billing.store.keys import shard_for
from billing.usage import TenantId
from tests.support.drifting import drifting_dodo
from tests.support.samples import request, settlement
from tests.support.world import DAY, HOUR, World, delivery

ACME = TenantId("acme")
POSTPAID = Funding(credit_limit=Nanos(10**12))
CENT = 10_000_000


async def serve(world: World, *request_ids: str) -> None:
    for request_id in request_ids:
        await world.ledger.hold(request(request_id, funding=POSTPAID))
        await world.ledger.settle(settlement(request_id))


async def flush(world: World) -> None:
    assert (await world.exporter().flush_once(force=True)).waiting == 0


async def reconcile(world: World, *, is_full: bool = False) -> Report:
    budget = CallBudget(100_000, world.clock)
    return await Reconciler(world.redis, world.dodo, None, budget, world.clock, is_full).run()


@pytest.fixture
async def subscribed(world: World) -> World:
    """A tenant on a metered plan, its subscription known."""
    await world.tenant("acme", plan="payg")
    paid = await world.buy("acme", "plan:payg")
    started = {"subscription_id": paid["subscription_id"]}
    await world.webhooks().receive(*delivery("subscription.active", started, "msg_start"))
    return world


@pytest.fixture
def tomorrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store's clock, as far as closed days go: everything so far was yesterday."""
    real = ArchiveCursor.now_ms

    async def later(self: ArchiveCursor) -> int:
        return await real(self) + DAY

    monkeypatch.setattr(ArchiveCursor, "now_ms", later)


def found(report: Report, proof: str) -> list[tuple[int, int]]:
    return [(row.expected, row.found) for row in report.rows if row.proof == proof]


async def test_meter_of_an_open_period_is_what_was_exported(subscribed: World) -> None:
    await serve(subscribed, "req_1", "req_2")
    await flush(subscribed)
    report = await reconcile(subscribed)
    assert report.is_clean, report.faults
    assert found(report, "dodo meter") == [(40_000, 40_000)]
    assert found(report, f"dodo {CHARGE}") == [(40_000, 40_000)]
    assert found(report, "invoice") == []


async def test_closed_period_is_invoiced_to_the_cent(subscribed: World) -> None:
    await serve(subscribed, "req_1")
    await flush(subscribed)
    await renew(subscribed)
    report = await reconcile(subscribed)
    assert report.is_clean, report.faults
    assert found(report, "dodo meter") == [(0, 0), (20_000, 20_000)]
    assert found(report, "invoice") == [(1, 0)], "less than a cent"


async def test_foreign_usage_differs_in_events_and_meter(subscribed: World) -> None:
    await serve(subscribed, "req_1")
    await flush(subscribed)
    tenant = await subscribed.tenants.get(ACME)
    await subscribed.dodo.ingest(
        [Event("forged", tenant.dodo_customer_id, CHARGE, subscribed.clock(), {"charge_nanos": 1})]
    )
    report = await reconcile(subscribed)
    (fault,) = report.faults
    assert (fault.proof, fault.tenant, fault.difference) == (f"dodo {CHARGE}", ACME, 1)
    assert "the newest" in fault.named


@pytest.mark.usefixtures("tomorrow")
async def test_closed_days_are_loaded_once(subscribed: World, monkeypatch: pytest.MonkeyPatch) -> None:
    since: list[int] = []
    real = Dodo.events_since

    async def asking(self: Dodo, name: str, since_ms: int, page: int) -> list[DodoEvent]:
        since.append(since_ms)
        return await real(self, name, since_ms, page)

    monkeypatch.setattr(Dodo, "events_since", asking)
    await serve(subscribed, "req_1", "req_2")
    await flush(subscribed)
    subscribed.clock.move(DAY + 2 * HOUR)
    assert (await reconcile(subscribed)).is_clean
    await serve(subscribed, "req_3")
    await flush(subscribed)
    subscribed.clock.move(DAY)
    report = await reconcile(subscribed)
    assert report.is_clean, report.faults
    assert found(report, "dodo meter") == [(60_000, 60_000)]
    assert found(report, f"dodo {CHARGE}") == [(60_000, 60_000)]
    assert since[:2] == [0, 0]
    assert 0 < subscribed.clock() - min(since[2:]) <= 3 * DAY
    full = await reconcile(subscribed, is_full=True)
    assert (full.is_clean, since[-1]) == (True, 0)
    assert full.summary() == report.summary(), "what was kept adds up to what there is"


@pytest.mark.usefixtures("tomorrow")
async def test_proved_days_are_read_again_only_in_a_full_pass(subscribed: World) -> None:
    await serve(subscribed, "req_1", "req_2")
    await flush(subscribed)
    assert (await reconcile(subscribed)).is_clean
    stream = shard_for(ACME).stream
    ((entry, _), _) = await subscribed.redis.xrange(stream)
    await subscribed.redis.xdel(stream, entry)
    assert (await reconcile(subscribed)).is_clean
    report = await reconcile(subscribed, is_full=True)
    assert any("number 1 missing between the beginning and rec_req_2" in row.named for row in report.faults)


@pytest.mark.usefixtures("tomorrow")
async def test_entries_that_are_not_exported_yet_stay_to_be_read(subscribed: World) -> None:
    await serve(subscribed, "req_1")
    assert (await reconcile(subscribed)).faults == ()
    assert (await Watermarks(subscribed.redis).all())[shard_for(ACME).number].at == "0-0"
    await flush(subscribed)
    assert (await reconcile(subscribed)).is_clean
    assert (await Watermarks(subscribed.redis).all())[shard_for(ACME).number].at != "0-0"


@pytest.mark.usefixtures("tomorrow")
async def test_unacknowledged_event_counts_once_known(subscribed: World) -> None:
    await serve(subscribed, "req_1")
    await subscribed.fault("drop_after", times=1)
    await subscribed.exporter().flush_once()
    subscribed.clock.move(DAY + 2 * HOUR)
    assert (await reconcile(subscribed)).is_clean
    shard = shard_for(ACME)
    assert (await Watermarks(subscribed.redis).all())[shard.number].dodo_ms == 0
    await flush(subscribed)
    assert (await Outbox(subscribed.redis).events()) == []
    report = await reconcile(subscribed)
    assert report.is_clean, report.faults
    assert (await Watermarks(subscribed.redis).all())[shard.number].dodo_ms > 0


@pytest.mark.usefixtures("tomorrow")
async def test_books_with_a_fault_move_no_watermark(subscribed: World) -> None:
    await serve(subscribed, "req_1")
    await flush(subscribed)
    shard = shard_for(ACME)
    await subscribed.redis.hincrby(shard.account(ACME), "overage", 1)
    assert not (await reconcile(subscribed)).is_clean
    assert (await Watermarks(subscribed.redis).all())[shard.number].at == "0-0"


@pytest.mark.parametrize("kind", ["unreadable", "refused"])
async def test_tenant_whose_periods_cannot_be_read_leaves_the_others_proved(subscribed: World, kind: str) -> None:
    await subscribed.tenant("globex", plan="payg")
    theirs = str((await subscribed.buy("globex", "plan:payg"))["subscription_id"])
    await subscribed.webhooks().receive(*delivery("subscription.active", {"subscription_id": theirs}, "msg_2"))
    await serve(subscribed, "req_1")
    await flush(subscribed)
    async with drifting_dodo(subscribed) as drifting:
        if kind == "unreadable":
            drifting.fields[f"{theirs}/usage-history"] = {"start_date": None}
        else:
            await subscribed.fault("status:404", path=f"/subscriptions/{theirs}/usage-history")
        report = await reconcile(subscribed)
    assert [name for name in report.unproven if "globex" in name] == list(report.unproven) != []
    assert [row.tenant for row in report.rows if row.proof == "dodo meter"] == [ACME]


async def test_every_page_is_asked_for_within_one_budget(subscribed: World) -> None:
    await serve(subscribed, "req_1")
    await flush(subscribed)
    tries = 0

    class Slow:
        async def take(self) -> bool:
            nonlocal tries
            tries += 1
            return tries % 2 == 0

    assert (await Reconciler(subscribed.redis, subscribed.dodo, None, Slow(), subscribed.clock).run()).is_clean
    assert tries == 6, "two lists and one usage history, each after a wait"


MAY = 1_777_593_600_000
AT = ShardExport((5, 0), frozenset({"waiting"}), frozenset({"dead"}), {ACME: {CHARGE: 7, USAGE: 0}})


def event(id_: str, nanos: int, until: str = "5-0", at_ms: int = MAY) -> DodoEvent:
    return DodoEvent(id_, CHARGE, "cus", at_ms, {"charge_nanos": nanos, "until": until})


def at_dodo(*events: DodoEvent, periods: Sequence[UsagePeriod] = (), frozen: Frozen | None = None) -> TenantAtDodo:
    return TenantAtDodo(events, 0, frozen or Frozen(), "mtr", periods)


def test_later_and_waiting_events_are_left_out() -> None:
    events = (event("a", 7), event("waiting", 9), event("later", 11, "5-1"))
    (row,) = prove_events(AT, ACME, at_dodo(*events))
    assert (row.found, row.is_exact) == (7, True)
    assert not at_dodo(*events).may_freeze(AT, MAY + 1)
    assert at_dodo(event("a", 7)).may_freeze(AT, MAY + 1)


def test_dead_letter_that_dodo_has_is_named() -> None:
    (row,) = prove_events(AT, ACME, at_dodo(event("dead", 7)))
    assert (row.difference, row.named) == (0, "event dead is a dead letter here and at Dodo")


@pytest.mark.parametrize(("nanos", "cents", "is_right"), [
    (5 * CENT, 5, True), (5 * CENT, 6, True), (5 * CENT, 4, True), (5 * CENT, 7, False), (5 * CENT, 3, False),
    (5 * CENT + 1, 5, True), (5 * CENT - 1, 4, True), (0, 0, True), (0, 2, False),
])  # fmt: skip
def test_invoice_is_right_within_one_minor_unit(nanos: int, cents: int, is_right: bool) -> None:
    period = UsagePeriod(MAY - DAY, MAY + DAY, {"mtr": nanos}, {"mtr": cents})
    meter, invoice = prove_periods(ACME, at_dodo(event("a", nanos), periods=[period]), MAY + DAY)
    assert meter.is_exact
    assert invoice.is_exact is is_right
    assert prove_periods(ACME, at_dodo(event("a", nanos), periods=[period]), MAY)[1:] == [], "it is not closed yet"


def test_event_counts_in_the_period_of_its_date() -> None:
    period = UsagePeriod(MAY, MAY + DAY, {"mtr": 7}, {"mtr": 0})
    events = (event("a", 7), event("before", 1, at_ms=MAY - 1), event("behind", 1, at_ms=MAY + DAY))
    assert prove_periods(ACME, at_dodo(*events, periods=[period]), MAY)[0].is_exact
    late = replace(at_dodo(*events, periods=[period]), since_ms=MAY + 1)
    assert prove_periods(ACME, late, MAY) == []
    kept = replace(late, frozen=at_dodo(*events, periods=[period]).freeze(MAY + 1))
    assert prove_periods(ACME, kept, MAY)[0].is_exact
    assert Frozen.read(kept.frozen.to_wire()) == kept.frozen  # type: ignore[arg-type]


async def renew(world: World) -> None:
    world.clock.move(32 * DAY)
    (await world.operator.post("/_sandbox/clock", json={"advance_s": 0})).raise_for_status()
