"""The books are proved to the nano: right they pass, and whatever is altered is found and named."""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from redis.asyncio import Redis

from billing.clock import now_ms
from billing.dodo.call_budget import CallBudget
from billing.dodo.client import PAGE, Dodo, Event
from billing.dodo.settings import DodoSettings
from billing.export.events import CHARGE, USAGE, SealedEvent
from billing.export.outbox import Outbox
from billing.ledger.account import Bucket, Clawback, Grant
from billing.reconcile.books import AccountState
from billing.reconcile.fold import Fold
from billing.reconcile.proofs import prove_tenant
from billing.reconcile.reconciler import Reconciler
from billing.store.keys import shard_for
from billing.tenants.directory import Tenants
from billing.usage import BucketId, Unit
from tests.support.movements import ACME, SANDBOX_KEY, ZETA, Scenario, played


@pytest.fixture
async def scenario(redis: Redis, tmp_path: Path) -> AsyncIterator[Scenario]:
    """Mixed movements, all of them exported and acknowledged."""
    async with played(redis, tmp_path / "dodo") as scenario:
        yield scenario


async def assert_found(scenario: Scenario, proof: str, named: str, difference: int | None = None) -> None:
    report = await scenario.reconcile()
    assert not report.is_clean
    found = [row for row in report.faults if row.proof == proof]
    assert found, report.faults
    assert any(named in row.named for row in found), found
    if difference is not None:
        assert difference in [row.difference for row in found], found


async def test_books_of_every_kind_of_movement_are_clean(scenario: Scenario) -> None:
    report = await scenario.reconcile()
    assert report.faults == ()
    assert report.is_clean
    proofs = {line.proof: line for line in report.summary()}
    assert {"records", "sequence", "credit", "held", "exposure", f"exported {CHARGE}", f"dodo {CHARGE}"} < proofs.keys()
    assert proofs[f"dodo {USAGE}"].found > 0
    assert proofs["exposure"].found > 0
    assert proofs["held"].found > 0


async def test_books_are_clean_while_usage_waits_sealed_and_unsealed(scenario: Scenario) -> None:
    await scenario.serve("req_unsealed")
    assert (await scenario.reconcile()).is_clean
    await scenario.redis.hset(shard_for(ACME).cursor, "unrelated", 1)
    assert (await scenario.reconcile()).is_clean


async def test_credit_that_pays_a_debt_is_no_drift(scenario: Scenario) -> None:
    await scenario.refund()
    report = await scenario.reconcile()
    assert report.faults == ()


@pytest.mark.parametrize(("paid", "is_right"), [(0, True), (5, True), (4, True), (6, False)])
def test_debt_may_be_paid_from_another_bucket_and_no_more(paid: int, is_right: bool) -> None:
    fold = Fold(granted=Counter({BucketId("a"): 10, BucketId("b"): 20}), drawn=Counter({BucketId("a"): 15}))
    left = [(_bucket("a", 10, -5 + min(paid, 5)), 0), (_bucket("b", 20, 20 - paid), 0)]
    account = AccountState(0, "", 0, 0, 0, tuple(left))
    assert all(row.is_exact for row in prove_tenant(ACME, account, fold, [])) is is_right


def _bucket(name: str, granted: int, remaining: int) -> Bucket:
    return Bucket(BucketId(name), Unit.NANOS, remaining, granted)


async def test_credit_restored_after_it_paid_a_debt_is_no_drift(scenario: Scenario) -> None:
    await scenario.refund()
    await scenario.ledger.restore(Clawback("refund:3", ZETA, "payment:3", 60_000))
    assert (await scenario.reconcile()).faults == ()


async def test_altered_correction_is_named(scenario: Scenario) -> None:
    key = shard_for(ACME).retired(ACME)
    text = await scenario.redis.hget(key, "adjustment:1")
    unit, remaining, rest = text.split("|", 2)
    await scenario.redis.hset(key, "adjustment:1", f"{unit}|{int(remaining) + 1}|{rest}")
    await assert_found(scenario, "credit", "adjustment:1", difference=1)


async def test_empty_store_is_clean(redis: Redis) -> None:
    assert (await Reconciler(redis).run()).rows == ()


async def test_books_that_move_while_they_are_read_are_clean(scenario: Scenario) -> None:
    done = asyncio.Event()
    await scenario.ledger.grant(Grant("payment:busy", ACME, Unit.NANOS, 10_000_000))

    async def work() -> None:
        for n in range(60):
            await scenario.serve(f"req_busy_{n}")
            if n % 20 == 0:
                await scenario.flush()
        done.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(work())
        while not done.is_set():
            assert (await scenario.reconcile()).faults == ()
    await scenario.flush()
    assert (await scenario.reconcile()).is_clean


@pytest.mark.parametrize("by", [1, -1])
async def test_one_nano_in_a_bucket_is_found_and_named(scenario: Scenario, by: int) -> None:
    name = shard_for(ACME).buckets(ACME)
    unit, remaining, *rest = str(await scenario.redis.hget(name, "payment:1")).split("|")
    await scenario.redis.hset(name, "payment:1", "|".join([unit, str(int(remaining) + by), *rest]))
    await assert_found(scenario, "credit", "bucket payment:1", by)


async def test_credit_moved_from_one_bucket_to_another_is_found(scenario: Scenario) -> None:
    await scenario.ledger.grant(Grant("payment:9", ACME, Unit.NANOS, 1_000))
    name = shard_for(ACME).buckets(ACME)
    for bucket, by in (("payment:1", 7), ("payment:9", -7)):
        unit, remaining, *rest = str(await scenario.redis.hget(name, bucket)).split("|")
        await scenario.redis.hset(name, bucket, "|".join([unit, str(int(remaining) + by), *rest]))
    await assert_found(scenario, "credit", "bucket payment:9", 0)


async def test_bucket_that_is_gone_is_named(scenario: Scenario) -> None:
    await scenario.redis.hdel(shard_for(ACME).buckets(ACME), "payment:1")
    await assert_found(scenario, "credit", "bucket payment:1 has 0 of")


async def test_deleted_record_is_named_by_its_neighbours(scenario: Scenario) -> None:
    entry = await _entry_of(scenario, "rec_req_money")
    await scenario.redis.xdel(shard_for(ACME).stream, entry)
    await assert_found(scenario, "sequence", "missing between rec_req_last_call and rec_req_allowed", -1)


async def test_last_record_deleted_is_found_too(scenario: Scenario) -> None:
    entry = await _entry_of(scenario, "rec_req_gone_late")
    await scenario.redis.xdel(shard_for(ACME).stream, entry)
    await assert_found(scenario, "sequence", "missing after rec_req_gone")


async def test_doubled_record_is_named(scenario: Scenario) -> None:
    stream = shard_for(ACME).stream
    entry = await _entry_of(scenario, "rec_req_money")
    ((_, fields),) = await scenario.redis.xrange(stream, entry, entry)
    await scenario.redis.xadd(stream, fields)
    await assert_found(scenario, "sequence", "rec_req_money has the number", 1)
    await assert_found(scenario, "credit", "bucket payment:1")


async def test_record_whose_charge_was_altered_is_named(scenario: Scenario) -> None:
    def raise_charge(record: dict[str, object]) -> None:
        record["charged_nanos"] = int(str(record["charged_nanos"])) + 1

    await _rewrite(scenario, "rec_req_money", raise_charge)
    await assert_found(scenario, "records", "rec_req_money charges", 1)
    await assert_found(scenario, f"exported {USAGE}", "its records sum to", -1)


async def test_consistently_altered_record_differs_from_its_bucket(scenario: Scenario) -> None:
    def raise_charge(record: dict[str, object]) -> None:
        draws = record["draws"]
        assert isinstance(draws, list)
        draws[0]["amount"] += 1
        record["charged_nanos"] = record["list_nanos"] = int(str(record["charged_nanos"])) + 1

    await _rewrite(scenario, "rec_req_money", raise_charge)
    await assert_found(scenario, "credit", "bucket payment:1", 1)
    await assert_found(scenario, "records", "rec_req_money is not as it was written")


async def test_whatever_is_altered_in_a_record_names_it(scenario: Scenario) -> None:
    def kinder(record: dict[str, object]) -> None:
        record["status"] = "failed"

    await _rewrite(scenario, "rec_req_money", kinder)
    report = await scenario.reconcile()
    (fault,) = report.faults
    assert (fault.proof, fault.tenant, fault.named) == ("records", ACME, "rec_req_money is not as it was written")


async def test_record_removed_and_added_altered_is_named(scenario: Scenario) -> None:
    stream = shard_for(ACME).stream
    entry = await _entry_of(scenario, "rec_req_money")
    ((_, fields),) = await scenario.redis.xrange(stream, entry, entry)
    await scenario.redis.xdel(stream, entry)
    await scenario.redis.xadd(
        stream, fields | {"p": fields["p"].replace('"completion_tokens":20', '"completion_tokens":2')}
    )
    await assert_found(scenario, "records", "rec_req_money is not as it was written")
    await assert_found(scenario, "sequence", "rec_req_money has the number")


async def test_last_record_altered_with_its_digest_is_named(scenario: Scenario) -> None:
    stream = shard_for(ACME).stream
    (_, before), (entry, last) = reversed(await scenario.redis.xrevrange(stream, count=2))
    forged = last["p"].replace('"status":"', '"status":"" ,"status":"')
    chain = hashlib.sha1(f"{before['c']}usage{forged}".encode()).hexdigest()[:16]
    await scenario.redis.xdel(stream, entry)
    await scenario.redis.xadd(stream, {**last, "p": forged, "c": chain})
    await assert_found(scenario, "sequence", "does not end in the digest that the account has")


async def test_foreign_entry_is_named(scenario: Scenario) -> None:
    entry = await scenario.redis.xadd(shard_for(ACME).stream, {"k": "usage", "t": ACME, "p": "{}"})
    await assert_found(scenario, "records", f"entry {entry} cannot be read")


async def test_hold_deleted_by_hand_is_found(scenario: Scenario) -> None:
    await scenario.redis.hdel(shard_for(ACME).holds, "req_open")
    await assert_found(scenario, "held", "bucket payment:1 counts 70000 held of 0", 70_000)
    await assert_found(scenario, "open holds", "field open", 1)


async def test_hold_without_lease_is_named(scenario: Scenario) -> None:
    await scenario.redis.zrem(shard_for(ACME).leases, "req_open")
    await assert_found(scenario, "open holds", "hold req_open has no lease", 0)


async def test_one_nano_of_exposure_is_found(scenario: Scenario) -> None:
    await scenario.redis.hincrby(shard_for(ZETA).account(ZETA), "overage", 1)
    await assert_found(scenario, "exposure", "field overage", 1)


@pytest.mark.parametrize("field", ["acked_charge", "acked_covered", "dead_charge", "sealed_covered"])
async def test_one_nano_in_a_running_sum_is_found(scenario: Scenario, field: str) -> None:
    shard = shard_for(ZETA)
    await scenario.redis.hincrby(shard.cursor, field, 1)
    await assert_found(scenario, f"exported {CHARGE if 'charge' in field else USAGE}", f"shard {shard.number} counts")


async def test_sealed_event_altered_in_the_outbox_is_named(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    (event,) = await _left_in_outbox(scenario, monkeypatch)
    shard = shard_for(ACME)
    await scenario.redis.hset(shard.outbox, event.id, replace(event, covered_nanos=event.covered_nanos + 1).to_json())
    await assert_found(scenario, "sealed event", f"event {event.id}", -1)
    await assert_found(scenario, f"exported {USAGE}", "sealed", 1)


async def test_unknown_event_at_dodo_is_found(scenario: Scenario) -> None:
    customer = (await Tenants(scenario.redis).get(ACME)).dodo_customer_id
    await scenario.dodo.ingest([Event("forged", customer, CHARGE, now_ms(), {"charge_nanos": 1})])
    await assert_found(scenario, f"dodo {CHARGE}", "1 events at Dodo", 1)


async def test_event_taken_without_acknowledgement_waits(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    await _left_in_outbox(scenario, monkeypatch)
    assert (await scenario.reconcile()).faults == ()
    await scenario.flush()
    assert (await scenario.reconcile()).is_clean


async def test_every_page_of_dodos_events_is_counted(scenario: Scenario) -> None:
    customer = (await Tenants(scenario.redis).get(ACME)).dodo_customer_id
    events = [Event(f"e{n}", customer, CHARGE, now_ms(), {"charge_nanos": 1}) for n in range(2 * PAGE + 1)]
    await scenario.dodo.ingest(events)
    await assert_found(scenario, f"dodo {CHARGE}", "201 events at Dodo", 201)


async def test_unavailable_dodo_is_unproven(scenario: Scenario) -> None:
    dodo = Dodo(DodoSettings(SANDBOX_KEY, base_url="http://127.0.0.1:9"))
    report = await Reconciler(scenario.redis, dodo, budget=CallBudget(1_000)).run()
    await dodo.close()
    assert report.faults == ()
    assert report.unproven
    assert not report.is_clean


async def test_unreadable_shard_is_unproven_and_the_others_are_proved(scenario: Scenario) -> None:
    await scenario.redis.hset(shard_for(ACME).holds, "req_odd", "{}")
    report = await scenario.reconcile()
    assert f"shard {shard_for(ACME).number} holds what farebox does not write" in report.unproven[0]
    assert {row.tenant for row in report.rows} >= {ZETA}
    assert not report.is_clean


async def test_unreadable_tenant_leaves_its_shard_without_a_watermark(scenario: Scenario) -> None:
    name = shard_for(ACME).tenant(ACME)
    stored = await scenario.redis.get(name)
    await scenario.redis.set(name, "{}")
    report = await scenario.reconcile()
    assert report.unproven[0] == "tenant acme cannot be read"
    assert not await scenario.redis.exists(shard_for(ACME).proved)
    await scenario.redis.set(name, str(stored))
    assert (await scenario.reconcile()).is_clean


class Killed(BaseException):
    """The process ends here."""


async def _left_in_outbox(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> list[SealedEvent]:
    """Send one event of acme, and die before it is acknowledged."""

    async def die(*_: object) -> int:
        raise Killed

    await scenario.serve("req_again")
    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "ack", die)
        with pytest.raises(Killed):
            await scenario.flush()
    return await Outbox(scenario.redis).events()


async def _entry_of(scenario: Scenario, record_id: str) -> str:
    for id_, fields in await scenario.redis.xrange(shard_for(ACME).stream):
        if f'"{record_id}"' in fields["p"]:
            return str(id_)
    raise AssertionError(f"no {record_id}")


async def _rewrite(scenario: Scenario, record_id: str, change: Callable[[dict[str, object]], None]) -> None:
    """Alter one record as an intruder would: every entry is written again under its own id."""
    stream = shard_for(ACME).stream
    entries = await scenario.redis.xrange(stream)
    await scenario.redis.delete(stream)
    for id_, fields in entries:
        payload = json.loads(fields["p"])
        if payload.get("record_id") == record_id:
            change(payload)
            fields["p"] = json.dumps(payload, separators=(",", ":"))
        await scenario.redis.xadd(stream, fields, id=id_)
