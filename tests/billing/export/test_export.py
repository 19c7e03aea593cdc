"""What is exported equals what the ledger drew, to the nano, whatever fails on the way."""

import asyncio
import hashlib

import pytest

from billing.dodo.client import Dodo, Event
from billing.dodo.errors import DodoUnavailable
from billing.dodo.settings import DodoSettings
from billing.export.checking import CheckedEntries
from billing.export.events import SealedEvent
from billing.export.exporter import Exporter
from billing.export.outbox import Outbox
from billing.ledger.account import Grant
from billing.ledger.journal import CHAIN_DIGITS
from billing.store import connection
from billing.store.errors import StoreUnavailable
from billing.store.keys import shard_for
from billing.usage import TenantId, Unit, Usage
from tests.support.world import HOUR, SECOND, World, assert_same, is_clear


class Killed(BaseException):
    """The process ends here, as with SIGKILL: nothing after it runs."""


async def test_usage_is_exported_once_in_two_kinds(world: World) -> None:
    for name in ("acme", "zeta"):
        await world.tenant(name)
        await world.use(name, charged=1000)
        await world.use(name, charged=700, overage=700)
        await world.use(name, charged=500, overage=200)
    report = await world.exporter().flush_once()
    assert (report.sealed, report.sent, report.waiting) == (4, 4, 0)
    assert_same(await world.exported(), world.sums)
    assert (await world.exporter().flush_once()).sent == 0


async def test_tenant_that_cannot_be_read_keeps_no_other_from_being_exported(world: World) -> None:
    for name in ("aaa", "acme"):
        await world.tenant(name)
        await world.use(name)
    stored = str(await world.redis.get(shard_for(TenantId("aaa")).tenant(TenantId("aaa"))))
    await world.spoil("aaa")
    exporter = world.exporter()
    report = await exporter.flush_once()
    assert (report.sealed, report.sent, report.held) == (2, 1, 1)
    assert report.error.startswith("aaa is not exported: ValidationError")
    await world.redis.set(shard_for(TenantId("aaa")).tenant(TenantId("aaa")), stored)
    report = await exporter.flush_once()
    assert (report.sent, report.error) == (1, "")
    assert_same(await world.exported(), world.sums)


async def test_tokens_of_a_split_record_are_counted_once(world: World) -> None:
    await world.tenant("acme")
    await world.use("acme", charged=500, overage=200)
    await world.exporter().flush_once()
    by_name = {event["event_name"]: event["metadata"] for event in await world.events()}
    assert by_name["farebox.charge"]["charge_nanos"] == 200
    assert by_name["farebox.charge"]["completion_tokens"] == 0
    assert by_name["farebox.usage"]["covered_nanos"] == 300
    assert by_name["farebox.usage"]["completion_tokens"] == 5
    assert by_name["farebox.usage"]["class.default.tokens"] == 15


async def test_event_id_is_the_hash_of_shard_range_tenant_and_name(world: World) -> None:
    await world.tenant("acme")
    await world.use("acme")
    shard = shard_for(TenantId("acme"))
    ((last, _),) = await world.redis.xrange(shard.stream)
    await world.exporter().flush_once()
    expected = hashlib.sha256(f"{shard.number}|0-0|{last}|acme|farebox.usage".encode()).hexdigest()[:32]
    assert [event["event_id"] for event in await world.events()] == [expected]


async def test_request_that_used_and_cost_nothing_makes_no_event(world: World) -> None:
    await world.tenant("acme")
    await world.use("acme", charged=0, usage=Usage(requests=0))
    report = await world.exporter().flush_once()
    assert (report.sealed, report.sent) == (0, 0)
    assert is_clear(await Outbox(world.redis).backlog())


async def test_unreplicated_events_are_not_sent(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.tenant("acme")
    await world.use("acme")
    exporter = world.exporter()
    with monkeypatch.context() as patched:
        patched.setitem(connection._replicas_needed, world.redis, 1)
        for _ in range(2):  # sealed by the first, and still on one server
            with pytest.raises(StoreUnavailable, match="0 of 1 replicas"):
                await exporter.flush_once()
    assert await world.events() == []
    assert (await exporter.flush_once()).sent == 1


POINTS = ["seal", "sealed", "mark", "marked", "ingest", "ingested", "ack", "acked"]


@pytest.mark.parametrize("point", POINTS)
async def test_kill_at_any_point_loses_and_doubles_nothing(
    world: World, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.tenant("acme")
    await world.use("acme", charged=500, overage=200)
    owner, name = (Dodo, "ingest") if point.startswith("ingest") else (Outbox, point.removesuffix("ed"))
    real = getattr(owner, name)

    async def dies(*args: object) -> object:
        if point.endswith("ed"):
            await real(*args)
        raise Killed

    monkeypatch.setattr(owner, name, dies)
    with pytest.raises(Killed):
        await world.exporter().flush_once()
    monkeypatch.undo()
    await world.use("acme", charged=40)
    await world.exporter().flush_once()
    assert_same(await world.exported(), world.sums)
    sums = await Outbox(world.redis).sums()
    assert sums.sealed_charge == sums.acked_charge == 200
    assert sums.sealed_covered == sums.acked_covered == 340


async def test_exporters_at_once_are_harmless(world: World) -> None:
    for number in range(8):
        await world.tenant(f"tenant-{number}")
    exporters = [world.exporter() for _ in range(4)]
    for _ in range(5):
        for number in range(8):
            await world.use(f"tenant-{number}", charged=1000 + number, overage=number)
        await asyncio.gather(*(exporter.flush_once() for exporter in exporters))
    await exporters[0].flush_once()
    assert_same(await world.exported(), world.sums)
    sums = await Outbox(world.redis).sums()
    assert sums.sealed_events == sums.acked_events


FAULTS = ["status:500", "status:429", "status:408", "drop_before", "drop_after", "status_after:503", "garbage"]


@pytest.mark.parametrize("kind", FAULTS)
async def test_after_a_fault_the_same_event_is_sent_again(world: World, kind: str) -> None:
    await world.tenant("acme")
    await world.use("acme")
    exporter = world.exporter()
    await world.fault(kind, times=1)
    first = await exporter.flush_once()
    assert (first.state, first.sent, first.waiting) == ("backing_off", 0, 1)
    assert first.error
    world.clock.move(61 * SECOND)
    second = await exporter.flush_once()
    assert (second.state, second.sent, second.error) == ("running", 1, "")
    assert_same(await world.exported(), world.sums)


async def test_sums_are_equal_after_many_faults(world: World) -> None:
    names = [f"tenant-{number}" for number in range(6)]
    for name in names:
        await world.tenant(name)
    kinds = [kind for kind in FAULTS if kind != "status:429"]
    await world.fault(*kinds, rate=0.7)
    for step in range(30):
        await world.use(names[step % 6], charged=997 * step, overage=step)
        await world.exporter().flush_once()
    await world.heal()
    await world.exporter().flush_once()
    assert_same(await world.exported(), world.sums)
    assert is_clear(await Outbox(world.redis).backlog())


async def test_slow_dodo_is_given_up_and_asked_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.tenant("acme")
    await world.use("acme")
    monkeypatch.setattr("billing.dodo.client.TIMEOUT", 0.2)
    hasty = Dodo(DodoSettings("dodo_test_key", base_url=str(world.operator.base_url)))
    await world.fault("timeout_after_commit", times=1)
    exporter = Exporter(world.redis, hasty, world.tenants, world.clock)
    assert (await exporter.flush_once()).state == "backing_off"
    assert (await exporter.flush_once(force=True)).sent == 1
    assert_same(await world.exported(), world.sums)
    await hasty.close()


async def test_refused_event_becomes_a_dead_letter_alone(world: World) -> None:
    for number in range(9):
        await world.tenant(f"tenant-{number}")
        await world.use(f"tenant-{number}")
    poisoned = await world.tenants.set_customer(TenantId("tenant-4"), "cus_unknown")
    report = await world.exporter().flush_once()
    assert (report.sent, report.dead_letters, report.waiting) == (8, 1, 0)
    (dead,) = await Outbox(world.redis).dead()
    assert dead.tenant == poisoned.id
    assert "cus_unknown" in dead.reason
    sums = await Outbox(world.redis).sums()
    assert (sums.sealed_events, sums.acked_events, sums.dead_events) == (9, 8, 1)
    assert (await world.exporter().flush_once()).sent == 0


async def test_dead_letter_can_be_sent_again(world: World) -> None:
    tenant = await world.tenant("acme")
    await world.tenants.set_customer(tenant.id, "cus_unknown")
    await world.use("acme", overage=60)
    await world.exporter().flush_once()
    await world.tenants.set_customer(tenant.id, tenant.dodo_customer_id)
    outbox = Outbox(world.redis)
    for dead in await outbox.dead():
        assert await outbox.revive(dead)
        assert not await outbox.revive(dead)
    assert (await world.exporter().flush_once()).sent == 2
    assert_same(await world.exported(), world.sums)
    assert (await outbox.sums()).dead_events == 0


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_wrong_key_or_address_stops_export_without_dead_letters(world: World, status: int) -> None:
    await world.tenant("acme")
    await world.use("acme")
    exporter = world.exporter()
    await world.fault(f"status:{status}", times=1)
    assert (await exporter.flush_once()).state == "stopped"
    assert (await Outbox(world.redis).shown()).state == "stopped"
    assert (await exporter.flush_once()).sent == 0, "it waits before it tries again"
    assert (await Outbox(world.redis).dead()) == []
    assert (await exporter.flush_once(force=True)).sent == 1
    assert_same(await world.exported(), world.sums)


@pytest.mark.parametrize("status", [401, 404])
async def test_events_refused_for_a_wrong_key_are_not_looked_up(
    world: World, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        await world.tenant(f"tenant-{number}")
        await world.use(f"tenant-{number}")
    await world.fault(f"status:{status}", path="*")
    for _ in range(3):
        assert (await world.exporter().flush_once()).state == "stopped"
        world.clock.move(2 * HOUR)
    await world.heal()
    asked: list[str] = []
    monkeypatch.setattr(Dodo, "has_event", lambda _, id_: asked.append(id_))
    assert (await world.exporter().flush_once()).sent == 20
    assert asked == [], "a refusal says that nothing was taken"
    assert_same(await world.exported(), world.sums)


async def test_wrong_address_does_not_prove_an_event_missing(world: World) -> None:
    await world.tenant("acme")
    await world.use("acme")
    await world.fault("drop_after", times=1)
    await world.exporter().flush_once()
    world.clock.move(2 * HOUR)
    await world.fault("status:404", path="*")
    assert (await world.exporter().flush_once()).state == "stopped"
    await world.heal()
    await world.fault("status:500", path="/events/ingest")
    assert (await world.exporter().flush_once()).sent == 1, "it is looked up, and Dodo has it"


async def test_usage_of_a_tenant_without_customer_waits_alone(world: World) -> None:
    await world.tenant("late", has_customer=False)
    await world.tenant("acme")
    await world.use("late", overage=30)
    await world.use("acme")
    exporter = world.exporter()
    report = await exporter.flush_once()
    assert (report.sent, report.held, report.waiting) == (1, 2, 0)
    assert (await Outbox(world.redis).shown()).held_events == 2
    await world.give_customer(TenantId("late"))
    assert (await exporter.flush_once()).sent == 2
    assert_same(await world.exported(), world.sums)


async def test_call_carries_at_most_a_thousand_events(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"tenant-{number}" for number in range(1_001)]
    tenant = await world.tenant("acme")
    sizes: list[int] = []
    real = Dodo.ingest

    async def counting(self: Dodo, events: list[Event]) -> int:
        sizes.append(len(events))
        return await real(self, events)

    monkeypatch.setattr(Dodo, "ingest", counting)
    outbox = Outbox(world.redis)
    for number, name in enumerate(names):
        event = SealedEvent(name, tenant.id, "farebox.usage", world.clock(), number, 0, 1, {"covered_nanos": 1})
        shard = shard_for(tenant.id)
        await outbox.seal(shard, f"{number}-0", f"{number + 1}-0", CheckedEntries({}), [event])
    assert (await world.exporter().flush_once()).sent == 1_001
    assert sizes == [1_000, 1]


async def test_unreadable_entry_stops_its_shard_alone(world: World) -> None:
    for name in ("acme", "zeta"):
        await world.tenant(name)
    assert shard_for(TenantId("acme")) != shard_for(TenantId("zeta"))
    chain = hashlib.sha1(b"usage{}").hexdigest()[:CHAIN_DIGITS]
    await world.redis.xadd(shard_for(TenantId("acme")).stream, {"k": "usage", "t": "acme", "p": "{}", "c": chain})
    await world.use("zeta")
    report = await world.exporter().flush_once()
    assert report.sent == 1
    assert "cannot be exported" in report.error
    assert (await Outbox(world.redis).backlog()).unsealed_entries == 1


async def test_grants_move_the_cursor_and_export_nothing(world: World) -> None:
    await world.ledger.grant(Grant("payment:1", TenantId("acme"), Unit.NANOS, 1))
    assert (await world.exporter().flush_once()).sealed == 0
    assert is_clear(await Outbox(world.redis).backlog())


async def test_reply_without_a_count_is_no_delivery(world: World) -> None:
    await world.fault("garbage", times=1)
    tenant = await world.tenant("acme")
    with pytest.raises(DodoUnavailable):
        await world.dodo.ingest([Event("id", tenant.dodo_customer_id, "farebox.usage", world.clock(), {})])
