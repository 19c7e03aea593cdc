"""A record that is not as it was written is withheld and named; everything else is exported."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from billing.export.checking import check_entries
from billing.export.outbox import Outbox
from billing.ledger.account import Grant
from billing.ledger.journal import Stream
from billing.notices.log import Notices
from billing.notices.notice import NoticeKind
from billing.reconcile.reconciler import Reconciler
from billing.store.keys import shard_for
from billing.usage import TenantId, Unit, Usage
from tests.support.samples import PER_TOKEN, request, settlement
from tests.support.world import World, assert_same, is_clear

ACME = TenantId("acme")
STREAM = shard_for(ACME).stream
Entries = list[tuple[str, dict[str, str]]]


def neighbour() -> str:
    """Another tenant of acme's shard."""
    return next(f"t{n}" for n in range(10_000) if shard_for(TenantId(f"t{n}")) == shard_for(ACME))


async def put(world: World, entries: Entries) -> None:
    """The stream as an intruder in the store leaves it."""
    pipe = world.redis.pipeline(transaction=True)
    pipe.delete(STREAM)
    for id_, fields in entries:
        pipe.xadd(STREAM, fields, id=id_)  # type: ignore[arg-type]
    await pipe.execute()


def raised(fields: dict[str, str]) -> dict[str, str]:
    record = json.loads(fields["p"])
    record["charged_nanos"] += 900
    record["draws"][0]["amount"] += 900
    return fields | {"p": json.dumps(record, separators=(",", ":"))}


def without(world: World, charged: int) -> dict[tuple[str, str], int]:
    """What is exported while one record of acme's that cost so much is withheld."""
    less = {(ACME, "covered_nanos"): charged, (ACME, "completion_tokens"): 5, (ACME, "requests"): 1}
    return {what: total - less.get((TenantId(what[0]), what[1]), 0) for what, total in world.sums.items()}


@pytest.fixture
async def three(world: World) -> Entries:
    """Acme's records of 100, 200 and 400 nanos, in one window with a neighbour's; not exported yet."""
    for name in ("acme", neighbour(), "zeta"):
        await world.tenant(name)
    for charged in (100, 200, 400):
        await world.use("acme", charged=charged)
        await world.use(neighbour(), charged=charged)
        await world.use("zeta", charged=charged)
    return list(await world.redis.xrange(STREAM))


def nth(entries: Entries, number: int) -> int:
    """Where acme's record of that number stands."""
    return [place for place, (_, fields) in enumerate(entries) if fields["t"] == ACME][number]


@pytest.mark.parametrize(("number", "charged"), [(0, 100), (1, 200), (2, 400)])
async def test_altered_record_is_withheld_alone_until_put_right(
    world: World, three: Entries, number: int, charged: int
) -> None:
    place = nth(three, number)
    id_, fields = three[place]
    name = json.loads(fields["p"])["record_id"]
    await put(world, [*three[:place], (id_, raised(fields)), *three[place + 1 :]])
    exporter = world.exporter()
    for _ in range(2):
        report = await exporter.flush_once()
        assert (report.state, report.withheld) == ("running", 1)
        assert f"{name} of acme is not as it was written" in report.error
        assert_same(await world.exported(), without(world, charged))
    await world.use("acme", charged=800)
    assert (await exporter.flush_once()).sent == 1
    assert_same(await world.exported(), without(world, charged))
    assert (await Outbox(world.redis).backlog()).withheld_records == 1
    (notice,) = await Notices(world.redis).newest()
    assert (notice.kind, notice.tenant, notice.facts) == (NoticeKind.RECORD_WITHHELD, ACME, {"record": name})

    await put(world, [*three, *(await world.redis.xrange(STREAM))[len(three) :]])
    reports = await asyncio.gather(*(world.exporter().flush_once() for _ in range(3)))
    assert sum(report.sealed for report in reports) == 1, "one exporter seals it"
    report = await exporter.flush_once()
    assert (report.withheld, report.error) == (0, "")
    assert_same(await world.exported(), world.sums)
    assert is_clear(await Outbox(world.redis).backlog())


@pytest.mark.usefixtures("three")
async def test_record_is_checked_against_what_was_sealed_before(world: World) -> None:
    assert (await world.exporter().flush_once()).withheld == 0
    await world.use("acme", charged=800)
    *before, (id_, fields) = await world.redis.xrange(STREAM)
    await put(world, [*before, (id_, raised(fields))])
    assert (await world.exporter().flush_once()).withheld == 1
    assert_same(await world.exported(), without(world, 800))


Harm = Callable[[Entries, int], Entries]


def taken_out(entries: Entries, place: int) -> Entries:
    return [*entries[:place], *entries[place + 1 :]]


def another_tenant_s(entries: Entries, place: int) -> Entries:
    id_, fields = entries[place]
    return [*entries[:place], (id_, fields | {"t": neighbour()}), *entries[place + 1 :]]


def another_kind(entries: Entries, place: int) -> Entries:
    id_, fields = entries[place]
    return [*entries[:place], (id_, fields | {"k": "grant"}), *entries[place + 1 :]]


def unreadable(entries: Entries, place: int) -> Entries:
    id_, fields = entries[place]
    return [*entries[:place], (id_, fields | {"p": "{}"}), *entries[place + 1 :]]


def doubled(entries: Entries, place: int) -> Entries:
    return [*entries, (_next_id(entries), entries[place][1])]


def put_in(entries: Entries, place: int) -> Entries:
    """By an intruder who does not know of digests."""
    return [*entries, (_next_id(entries), {"k": "usage", "t": ACME, "p": entries[place][1]["p"]})]


def _next_id(entries: Entries) -> str:
    return f"{int(entries[-1][0].partition('-')[0]) + 1}-0"


@pytest.mark.parametrize(
    ("harm", "withheld", "not_exported"),
    [
        (taken_out, 1, 600),
        (another_tenant_s, 2, 600),
        (another_kind, 1, 200),
        (unreadable, 1, 200),
        (doubled, 1, 0),
        (put_in, 1, 0),
    ],
)
async def test_any_alteration_exports_no_more_than_was_written(
    world: World, three: Entries, harm: Harm, withheld: int, not_exported: int
) -> None:
    """What follows a record that is gone cannot be judged, and is withheld with it."""
    await put(world, harm(three, nth(three, 1)))
    exporter = world.exporter()
    assert (await exporter.flush_once()).withheld == withheld
    await world.use("acme", charged=800)
    assert (await exporter.flush_once()).withheld == withheld
    exported = await world.exported()
    assert exported[neighbour(), "covered_nanos"] == exported["zeta", "covered_nanos"] == 700
    assert world.sums["acme", "covered_nanos"] - exported["acme", "covered_nanos"] == not_exported


async def test_reconcile_names_withheld_records_only(world: World) -> None:
    await world.tenant("acme")
    await world.ledger.grant(Grant("payment:1", ACME, Unit.NANOS, 10**6))
    for number in range(3):
        await world.ledger.hold(request(f"req_{number}"))
        await world.ledger.settle(settlement(f"req_{number}"))
    entries = list(await world.redis.xrange(STREAM))
    id_, fields = entries[2]
    failed = fields | {"p": fields["p"].replace('"status":"complete"', '"status":"failed"')}
    await put(world, [*entries[:2], (id_, failed), *entries[3:]])
    exporter = world.exporter()
    await exporter.flush_once()
    report = await Reconciler(world.redis, world.dodo, clock=world.clock).run()
    assert [(row.proof, row.named) for row in report.faults] == [("records", "rec_req_1 is not as it was written")]
    await put(world, entries)
    assert (await Reconciler(world.redis, world.dodo, clock=world.clock).run()).is_clean, "it waits"
    await exporter.flush_once()
    assert (await Reconciler(world.redis, world.dodo, clock=world.clock).run()).is_clean
    exported = await world.exported()
    assert exported["acme", "covered_nanos"] == 3 * PER_TOKEN.charge(Usage(prompt_tokens=10, completion_tokens=5))


@pytest.mark.usefixtures("three")
async def test_tenant_sealed_before_checks_existed_begins_where_it_stands(world: World) -> None:
    entries = [entry for entry in await Stream(world.redis).within(shard_for(ACME)) if entry.tenant == ACME]
    checked = check_entries(entries[1:], {})
    assert (checked.sound, checked.withheld) == (entries[1:], [])
    altered = replace(entries[2], payload="{}")
    assert [one.id for one in check_entries([entries[1], altered], {}).withheld] == [altered.id]


async def test_window_begins_where_the_last_one_ended(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billing.export.exporter.WINDOW_ENTRIES", 2)
    await world.tenant("acme")
    for _ in range(7):
        await world.use("acme")
    assert (await world.exporter().flush_once()).withheld == 0
    assert_same(await world.exported(), world.sums)
