"""Entries move to Parquet and off the stream; every sum stays the same, whatever fails on the way."""

import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pyarrow.dataset as ds
import pytest
from redis.asyncio import Redis

from billing.archive.archive_cursor import ArchiveCursor, archive_url
from billing.archive.archiver import Archiver, ChainBroken, advance
from billing.archive.files import Archive, ArchiveUnavailable
from billing.ledger.journal import Entry, Link
from billing.reconcile.reconciler import Reconciler
from billing.reports import history
from billing.store.keys import Shard, shard_for
from billing.sweep import Sweep
from tests.support.movements import ACME, ZETA, Scenario, played

FOREVER_MS = 2**52


@pytest.fixture
async def scenario(store: Redis, tmp_path: Path) -> AsyncIterator[Scenario]:
    async with played(store, tmp_path / "dodo") as scenario:
        yield scenario


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(str(tmp_path / "archive"))


def archiver(scenario: Scenario, archive: Archive, keep_ms: int = 0) -> Archiver:
    return Archiver(scenario.redis, archive, keep_ms)


async def live(scenario: Scenario) -> int:
    return sum([await scenario.redis.xlen(shard_for(tenant).stream) for tenant in (ACME, ZETA)])


async def test_archive_reads_back_the_stream(scenario: Scenario, archive: Archive) -> None:
    stream = await scenario.redis.xrange(shard_for(ACME).stream)
    before = await live(scenario)
    report = await archiver(scenario, archive).run_once(Sweep("archive"))
    assert (report.archived, report.trimmed, report.problems) == (before, before, ())
    assert await live(scenario) == 0
    assert archive.read(shard_for(ACME)) == [Entry(i, f["k"], f["t"], f["p"], f["c"]) for i, f in stream]


async def usage(scenario: Scenario) -> list[object]:
    """All that a tenant can ask about what it used, of both tenants."""
    kinds: tuple[history.GroupBy | None, ...] = (None, "model", "day")
    totals = [await history.totals(scenario.redis, t, 0, FOREVER_MS, kind) for t in (ACME, ZETA) for kind in kinds]
    return [totals, [await history.records(scenario.redis, t) for t in (ACME, ZETA)]]


async def test_usage_is_the_same_before_and_after_trimming(scenario: Scenario, archive: Archive) -> None:
    before = await usage(scenario)
    await archiver(scenario, archive).run_once(Sweep("archive"))
    assert await live(scenario) == 0
    assert await usage(scenario) == before


async def test_stream_and_archive_add_up(scenario: Scenario, archive: Archive) -> None:
    (before,) = await history.totals(scenario.redis, ACME, 0, FOREVER_MS)
    await archiver(scenario, archive).run_once(Sweep("archive"))
    await scenario.serve("req_after")
    (after,) = await history.totals(scenario.redis, ACME, 0, FOREVER_MS)
    assert after.records == before.records + 1
    assert after.charged_nanos == before.charged_nanos + 20_000
    (newest, *older) = (await history.records(scenario.redis, ACME)).records
    assert newest.request_id == "req_after"
    assert len(older) == before.records


async def test_pages_go_on_from_the_stream_into_the_archive(scenario: Scenario, archive: Archive) -> None:
    whole = (await history.records(scenario.redis, ACME)).records
    await archiver(scenario, archive).run_once(Sweep("archive"))
    found: list[object] = []
    cursor = ""
    for _ in range(len(whole) + 1):
        page = await history.records(scenario.redis, ACME, cursor, 3)
        found += page.records
        cursor = page.next_cursor
        if not cursor:
            break
    assert tuple(found) == whole


async def test_books_are_proved_over_stream_and_archive_together(scenario: Scenario, archive: Archive) -> None:
    await archiver(scenario, archive).run_once(Sweep("archive"))
    await scenario.serve("req_after")
    await scenario.flush()
    report = await Reconciler(scenario.redis, scenario.dodo, archive).run()
    assert report.faults == ()
    assert report.is_clean


async def test_missing_archive_file_is_a_fault(scenario: Scenario, archive: Archive, tmp_path: Path) -> None:
    await archiver(scenario, archive).run_once(Sweep("archive"))
    for file in (tmp_path / "archive").glob(f"date=*/s{shard_for(ACME).number:02d}_*.parquet"):
        file.unlink()
    report = await Reconciler(scenario.redis, None, archive).run()
    assert any(row.tenant == ACME and row.proof == "sequence" for row in report.faults)


async def test_unsealed_entries_stay(scenario: Scenario, archive: Archive) -> None:
    await scenario.serve("req_unsealed")
    await archiver(scenario, archive).run_once(Sweep("archive"))
    assert await live(scenario) == 1
    assert "rec_req_unsealed" not in {e.payload for e in archive.read(shard_for(ACME))}
    await scenario.flush()
    await archiver(scenario, archive).run_once(Sweep("archive"))
    assert await live(scenario) == 0


async def test_young_entries_stay(scenario: Scenario, archive: Archive) -> None:
    report = await archiver(scenario, archive, keep_ms=60_000).run_once(Sweep("archive"))
    assert (report.archived, report.trimmed) == (0, 0)


async def test_unarchived_entries_are_not_trimmed(scenario: Scenario) -> None:
    before = await live(scenario)
    assert await ArchiveCursor(scenario.redis).trim(shard_for(ACME), 0) == 0
    assert await live(scenario) == before


async def test_shard_with_an_unreadable_link_keeps_no_other_from_the_archive(
    scenario: Scenario, archive: Archive
) -> None:
    bad, good = sorted((ACME, ZETA), key=lambda tenant: shard_for(tenant).number)
    await scenario.redis.hset(shard_for(bad).archived, bad, "no link")
    report = await archiver(scenario, archive).run_once(Sweep("archive"))
    assert report.problems[0].startswith(f"shard {shard_for(bad).number} is not archived further: ValueError")
    assert await scenario.redis.xlen(shard_for(good).stream) == 0
    assert await scenario.redis.xlen(shard_for(bad).stream) > 0


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("point", ["move", "trim"])
async def test_archiving_repeats_harmlessly_after_a_kill(
    scenario: Scenario, archive: Archive, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def die(*_: object) -> int:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ArchiveCursor, point, die)
        for _ in range(2):
            with pytest.raises(Killed):
                await archiver(scenario, archive).run_once(Sweep("archive"))
    await scenario.serve("req_between")
    await scenario.flush()
    await archiver(scenario, archive).run_once(Sweep("archive"))
    report = await Reconciler(scenario.redis, scenario.dodo, archive).run()
    assert report.faults == ()
    ids = [entry.id for entry in archive.read(shard_for(ACME))]
    assert len(ids) == len(set(ids))


async def test_of_two_archivers_one_moves_the_cursor(scenario: Scenario) -> None:
    cursor, shard = ArchiveCursor(scenario.redis), shard_for(ACME)
    assert await cursor.move(shard, "0-0", "5-0", {ACME: Link(2, "ab")})
    assert not await cursor.move(shard, "0-0", "9-0", {ACME: Link(3, "cd")})
    assert (await cursor.position(shard))[0] == "5-0"
    assert await cursor.links(shard) == {ACME: Link(2, "ab")}


async def test_gap_keeps_its_shard_alone_in_the_stream(scenario: Scenario, archive: Archive) -> None:
    stream = shard_for(ACME).stream
    entries = await scenario.redis.xrange(stream)
    await scenario.redis.xdel(stream, entries[3][0])
    report = await archiver(scenario, archive).run_once(Sweep("archive"))
    assert "acme" in report.problems[0]
    assert await scenario.redis.xlen(stream) == len(entries) - 1
    assert await scenario.redis.xlen(shard_for(ZETA).stream) == 0


async def test_altered_entry_keeps_its_shard_alone_in_the_stream(scenario: Scenario, archive: Archive) -> None:
    stream = shard_for(ACME).stream
    *_, (entry, fields) = await scenario.redis.xrange(stream)
    await scenario.redis.xdel(stream, entry)
    await scenario.redis.xadd(stream, {**fields, "p": fields["p"].replace('"list_nanos":', '"list_nanos": ')}, id="*")
    await scenario.flush()
    report = await archiver(scenario, archive).run_once(Sweep("archive"))
    assert "not as it was written" in report.problems[0]
    assert await scenario.redis.xlen(shard_for(ZETA).stream) == 0


@pytest.mark.parametrize("numbers", [(1, 3), (1, 1), (2,)])
def test_numbers_go_on_by_one(numbers: Sequence[int]) -> None:
    entries = [_linked(f"{n}-{place}", n, "") for place, n in enumerate(numbers)]
    with pytest.raises(ChainBroken, match="number"):
        advance({}, entries)
    assert advance({ACME: Link(numbers[0] - 1)}, entries[:1]) == {ACME: Link(numbers[0], entries[0].chain)}


def test_altered_or_moved_entry_breaks_the_chain() -> None:
    first = _linked("1-0", 1, "")
    second = _linked("2-0", 2, first.chain)
    assert advance({}, [first, second]) == {ACME: Link(2, second.chain)}
    for wrong in (
        replace(second, payload=second.payload + " "),
        replace(second, kind="clawback"),
        _linked("2-0", 2, ""),
    ):
        with pytest.raises(ChainBroken, match="not as it was written"):
            advance({}, [first, wrong])


def _linked(entry_id: str, number: int, before: str) -> Entry:
    payload = f'{{"seq":{number}}}'
    chain = hashlib.sha1(f"{before}grant{payload}".encode()).hexdigest()[:16]
    return Entry(entry_id, "grant", ACME, payload, chain)


async def test_any_tool_can_sum_the_files(scenario: Scenario, archive: Archive, tmp_path: Path) -> None:
    (total,) = await history.totals(scenario.redis, ACME, 0, FOREVER_MS)
    await archiver(scenario, archive).run_once(Sweep("archive"))
    table = ds.dataset(tmp_path / "archive", partitioning="hive").to_table(filter=ds.field("tenant") == ACME)
    assert sum(table.column("charged_nanos").to_pylist()) == total.charged_nanos
    assert sum(table.column("completion_tokens").to_pylist()) == total.completion_tokens
    assert "date" in table.column_names


def test_entries_lie_by_their_date_and_a_range_reads_only_its_days(archive: Archive, tmp_path: Path) -> None:
    shard = Shard(7)
    day_ms = 86_400_000
    entries = [Entry(f"{n * day_ms}-0", "grant", ACME, "{}") for n in (20_000, 20_001, 20_002)]
    assert archive.write(shard, entries) == 3
    assert sorted(p.name for p in (tmp_path / "archive").iterdir()) == [
        "date=2024-10-04",
        "date=2024-10-05",
        "date=2024-10-06",
    ]
    assert archive.read(shard, 20_001 * day_ms, 20_002 * day_ms) == entries[1:2]
    assert archive.read(shard, tenant=ZETA) == []
    assert archive.read(Shard(8)) == []
    assert archive.last(shard) == entries[-1].id


def test_unfinished_file_is_ignored(archive: Archive, tmp_path: Path) -> None:
    archive.write(Shard(7), [Entry("1-0", "grant", ACME, "{}")])
    (tmp_path / "archive/date=1970-01-01/.s07_2-0_3-0.parquet.draft").write_bytes(b"PAR1")
    assert [entry.id for entry in archive.read(Shard(7))] == ["1-0"]


def test_broken_file_is_an_error(archive: Archive, tmp_path: Path) -> None:
    archive.write(Shard(7), [Entry("1-0", "grant", ACME, "{}")])
    (tmp_path / "archive/date=1970-01-01/s07_2-0_3-0.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(ArchiveUnavailable):
        archive.read(Shard(7))


def test_archive_on_any_filesystem() -> None:
    archive = Archive("memory://farebox-archive")
    entry = Entry("1-0", "grant", ACME, "{}")
    archive.write(Shard(7), [entry])
    assert archive.read(Shard(7)) == [entry]


async def test_usage_and_books_are_the_same_over_an_archive_of_any_filesystem(scenario: Scenario) -> None:
    before = await usage(scenario)
    name = f"books-{uuid4().hex}"
    elsewhere = Archive(f"memory://{name}")
    report = await archiver(scenario, elsewhere).run_once(Sweep("archive"))
    assert report.archived == report.trimmed > 0
    assert await live(scenario) == 0
    assert await archive_url(scenario.redis) == f"memory:///{name}"
    assert await usage(scenario) == before
    assert (await Reconciler(scenario.redis, scenario.dodo, await history.archive_of(scenario.redis)).run()).is_clean


async def test_entry_altered_in_the_stream_after_it_was_archived_is_named(
    scenario: Scenario, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    await archiver(scenario, archive).run_once(Sweep("archive"))
    await scenario.serve("req_after")
    await scenario.flush()
    stream = shard_for(ACME).stream
    monkeypatch.setattr(ArchiveCursor, "trim", _nothing)
    await archiver(scenario, archive).run_once(Sweep("archive"))
    ((entry, fields),) = await scenario.redis.xrange(stream)
    await scenario.redis.delete(stream)
    await scenario.redis.xadd(
        stream, fields | {"p": fields["p"].replace('"status":"complete"', '"status":"failed"')}, id=entry
    )
    report = await Reconciler(scenario.redis, None, archive).run()
    assert any("rec_req_after differs between stream and archive" in row.named for row in report.faults)


async def _nothing(*_: object) -> int:
    return 0


def test_unknown_kind_of_url_is_refused() -> None:
    with pytest.raises(ArchiveUnavailable):
        Archive("carrier-pigeon://roost")


async def test_archive_address_is_in_the_store(scenario: Scenario, archive: Archive) -> None:
    assert await archive_url(scenario.redis) == ""
    await archiver(scenario, archive).run_once(Sweep("archive"))
    assert await archive_url(scenario.redis) == archive.url
