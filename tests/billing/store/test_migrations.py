"""A store that version 0.1 wrote is migrated once, by this version, while no other process uses it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from billing.catalog import publication
from billing.catalog.terms import Terms
from billing.commerce.auto_refill.store import Refills
from billing.commerce.inbox import Inbox
from billing.commerce.products import Products
from billing.export.outbox import Outbox
from billing.ledger.ledger import Ledger
from billing.ledger.spool import Spool
from billing.reconcile.reconciler import Reconciler
from billing.store import migrations
from billing.store.connection import connect, reach, verify
from billing.store.errors import StoreRefused
from billing.store.keys import ALL_SHARDS, DODO_IDS, GATEWAYS, META, PLANS, PRODUCTS, SCHEMA, TENANTS, shard_for
from billing.store.migrations import Migration, migrate
from billing.store.primary import LocalConnection
from billing.store.schema import FENCES
from billing.tenants.directory import Tenants
from billing.usage import RequestId, TenantId
from cluster import valkey
from tests.support import recorded
from tests.support.clock import SteppedClock
from tests.support.samples import ACME, settlement

REWRITTEN = ("fb:key:", "fb:plans", "fb:catalogue:", "fb:meta")
PAYG, ZETA = TenantId("payg"), TenantId("zeta")


@dataclass
class Recorded:
    redis: Redis
    ledger: Ledger
    before: dict[str, object]
    """Everything in the store as it was written."""


@pytest.fixture
async def old(server: valkey.Valkey) -> AsyncIterator[Recorded]:
    """The recorded store, not migrated yet, used at the time at which it was recorded."""
    redis = await reach(server.url)
    await redis.flushall()
    await recorded.load(redis)
    yield Recorded(redis, Ledger(redis, SteppedClock(recorded.RECORDED_AT_MS)), await recorded.contents(redis))
    await redis.flushall()
    await redis.aclose()


async def shown(ledger: Ledger) -> list[dict[str, object]]:
    """Each tenant's account in the form in which version 0.1 recorded it."""
    accounts = [await ledger.account(TenantId(line["account"])) for line in recorded.lines("account")]
    return [
        {
            "account": account.tenant,
            "balance_nanos": account.balance_nanos,
            "held_nanos": account.held_nanos,
            "open_holds": account.open_holds,
            "exposure_nanos": account.overage_nanos,
            "buckets": sorted([b.id, b.unit, b.remaining] for b in account.buckets),
        }
        for account in accounts
    ]


def recorded_accounts() -> list[dict[str, object]]:
    return [line | {"buckets": sorted(line["buckets"])} for line in recorded.lines("account")]


async def test_old_store_is_refused_until_migrated(server: valkey.Valkey, old: Recorded) -> None:
    with pytest.raises(StoreRefused, match="farebox migrate"):
        await connect(server.url)
    await migrate(old.redis)
    await (await connect(server.url)).aclose()


async def test_dry_run_counts_and_changes_nothing(old: Recorded) -> None:
    planned = await migrate(old.redis, is_dry=True)
    assert [change.count for change in planned.changes] == [13, 5, 1, 4]
    assert await recorded.contents(old.redis) == old.before
    assert await migrate(old.redis) == planned


async def test_migration_keeps_every_account_and_proof(old: Recorded) -> None:
    await migrate(old.redis)
    assert await shown(old.ledger) == recorded_accounts()
    report = await Reconciler(old.redis).run()
    assert report.is_clean, report.faults


async def test_migration_rewrites_only_cheap_values(old: Recorded) -> None:
    await migrate(old.redis)
    after = await recorded.contents(old.redis)
    changed = {key for key in after.keys() | old.before.keys() if after.get(key) != old.before.get(key)}
    assert {key for key in changed if not key.startswith(REWRITTEN)} == {*FENCES, PRODUCTS}
    assert after[META] == {"schema": str(SCHEMA), "shards": "64"}
    assert "overage_cap" not in str(after[PLANS])


async def test_migrated_keys_and_catalog_are_read(old: Recorded) -> None:
    await migrate(old.redis)
    tenants = Tenants(old.redis, SteppedClock(recorded.RECORDED_AT_MS))
    throttled = (await tenants.principal("fbx_throttled_of_acme_for_the_migration_test")).key
    assert throttled.throttled is not None
    assert throttled.throttled.reason == "many_addresses"
    assert (await tenants.key(ACME, "key_successor")).counts_as == "key_rotated"
    assert (await tenants.key(ACME, "key_revoked")).revoked_at_ms is not None
    catalog = await publication.current(old.redis)
    assert catalog is not None
    assert catalog.plans["payg"].credit_limit == 25_000_000_000
    assert catalog.retired["starter"].credit_limit == 5_000_000_000
    assert await old.redis.get("fb:catalogue:current") == catalog.content_hash


async def test_products_keep_the_terms_that_were_in_force(old: Recorded) -> None:
    """0.1 granted by the catalog in force, so that its terms are what each product sold."""
    await migrate(old.redis)
    catalog, products = await publication.current(old.redis), await Products(old.redis).all()
    assert catalog is not None
    expected = [Terms.of_pack(name, catalog.packs[name]) for name in ("small", "calls")]
    expected += [Terms.of_plan(name, catalog.plans[name]) for name in ("payg", "pro")]
    assert [products[await old.redis.hget(DODO_IDS, terms.name)] for terms in expected] == expected
    assert [await Products(old.redis).id_for(terms) for terms in expected] == [
        await old.redis.hget(DODO_IDS, terms.name) for terms in expected
    ]


async def test_unchanged_forms_are_read_after_migration(old: Recorded) -> None:
    await migrate(old.redis)
    assert len(await Outbox(old.redis).events()) == 1
    assert len(await Outbox(old.redis).dead()) == 1
    assert [one.id for one in await Inbox(old.redis).parked()] == ["msg_parked"]
    refill = await Refills(old.redis).get(ACME)
    assert refill is not None
    assert refill.open_attempt is not None


async def test_old_holds_settle_after_migration(old: Recorded) -> None:
    await migrate(old.redis)
    for request_id in ("req_open", "req_open_extended"):
        receipt = await old.ledger.settle(settlement(request_id))
        assert receipt.record.charged_nanos == 20_000
    account = await old.ledger.account(ACME)
    assert (account.open_holds, account.held_nanos) == (1, 50_000)
    assert (await Reconciler(old.redis).run()).faults == ()


async def test_old_spool_lines_replay_after_migration(old: Recorded, tmp_path: Path) -> None:
    await migrate(old.redis)
    before = (await old.ledger.account(ACME)).balance_nanos
    (tmp_path / "settles-old.jsonl").write_text("".join(f"{line}\n" for line in recorded.spool_lines()))
    spool = Spool(tmp_path)
    assert await spool.replay(old.ledger) == 4
    assert (spool.pending, spool.refused) == (0, 0)
    # One open hold of 50,000 is charged 18,000, one that was charged already costs nothing, and a lost one 20,000.
    assert (await old.ledger.account(ACME)).balance_nanos - before == 50_000 - 18_000 - 20_000
    assert (await Reconciler(old.redis).run()).faults == ()
    spool.close()


async def test_old_unresolved_settlement_is_charged_after_migration(old: Recorded) -> None:
    await migrate(old.redis)
    recovery = old.ledger.recovery
    assert [one.settlement.request_id for one in await recovery.kept()] == ["req_lost"]
    assert (await recovery.charge(RequestId("req_lost"))).record.charged_nanos == 20_000
    assert await recovery.kept() == []
    assert (await Reconciler(old.redis).run()).faults == ()


async def test_version_0_1_is_refused_by_a_migrated_store(old: Recorded) -> None:
    """What version 0.1 did at start, and whenever its store was replaced."""

    async def verify_of_version_0_1(redis: Redis) -> bool:
        await redis.hsetnx("fb:meta", "schema", "1")
        await redis.hsetnx("fb:meta", "shards", "64")
        return list(await redis.hmget("fb:meta", ["schema", "shards"])) == ["1", "64"]

    assert await verify_of_version_0_1(old.redis)
    await migrate(old.redis)
    assert not await verify_of_version_0_1(old.redis)


async def test_migration_is_repeatable(old: Recorded) -> None:
    await migrate(old.redis)
    after = await recorded.contents(old.redis)
    again = await migrate(old.redis)
    assert (again.is_needed, again.changes) == (False, ())
    assert await recorded.contents(old.redis) == after


async def test_each_batch_has_a_time_limit_of_its_own(old: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store with many tenants takes longer than one call may."""
    limits: list[float | None] = []
    guarded = migrations.guarded

    def recording(silence_s: float | None = None) -> AbstractAsyncContextManager[None]:
        limits.append(silence_s)
        return guarded(silence_s)

    monkeypatch.setattr(migrations, "guarded", recording)
    monkeypatch.setattr(migrations, "BATCH", 1)
    await old.redis.sadd(TENANTS, *(f"tenant_{number}" for number in range(50)))
    assert [change.count for change in (await migrate(old.redis)).changes] == [13, 5, 1, 4]
    assert len(limits) > 50


class Killed(BaseException):
    """The process ended here."""


async def test_migration_killed_at_any_command_ends_well(
    old: Recorded, server: valkey.Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrate(old.redis)
    wanted, kills = await recorded.contents(old.redis), 0
    await _write_anew(old.redis)
    while await _killed_after(kills, server.url, monkeypatch):
        found = await old.redis.hget(META, "schema")
        assert found in ("1", f"1>{SCHEMA}")
        with pytest.raises(StoreRefused, match="farebox migrate"):
            await verify(old.redis)
        await _until_alone(old.redis)
        await migrate(old.redis)
        assert await recorded.contents(old.redis) == wanted
        await _write_anew(old.redis)
        kills += 1
    assert kills > 10


async def _write_anew(redis: Redis) -> None:
    await redis.flushall()
    await recorded.load(redis)
    await redis.connection_pool.disconnect()


async def _killed_after(commands: int, url: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Migrate with a client that dies instead of sending one more; False where that was enough."""
    redis = await reach(url)
    await _until_alone(redis)
    left, send = commands, LocalConnection.send_packed_command

    async def counted(self: object, command: object, *args: Any, **options: Any) -> None:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        await send(self, command, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LocalConnection, "send_packed_command", counted)
        try:
            await migrate(redis)
        except Killed:
            return True
        finally:
            await redis.connection_pool.disconnect()
    return False


async def _until_alone(redis: Redis) -> None:
    """Wait until the server has seen that other connections were closed."""
    for _ in range(500):
        if len(await redis.client_list()) == 1:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("another connection stays open")


@pytest.mark.parametrize("name", ["farebox:1", "farebox:2", None])
async def test_migration_refused_while_a_farebox_is_connected(
    old: Recorded, server: valkey.Valkey, name: str | None
) -> None:
    other = Redis.from_url(server.url, client_name=name)
    await other.ping()
    with pytest.raises(StoreRefused, match="stop these first"):
        await migrate(old.redis)
    assert await recorded.contents(old.redis) == old.before
    assert len((await migrate(old.redis, is_dry=True)).connected) == 1
    if name is None:
        await migrate(old.redis, ignore_unnamed=True)
    await other.aclose()


async def test_migration_ignores_connections_of_other_programs(old: Recorded, server: valkey.Valkey) -> None:
    monitoring = Redis.from_url(server.url, client_name="exporter")
    await monitoring.ping()
    assert (await migrate(old.redis)).is_needed
    await monitoring.aclose()


async def test_migration_asks_reports_where_clients_may_not_be_listed(old: Recorded, server: valkey.Valkey) -> None:
    await old.redis.acl_setuser(
        "hosted", enabled=True, passwords=["+pw"], keys=["*"], categories=["+@all"], commands=["-client"]
    )
    hosted = await reach(server.url.replace("unix://", "unix://hosted:pw@"))
    seconds, _ = await old.redis.time()
    report = '{{"hash": "", "quarantined": [], "at_ms": {}}}'
    try:
        await old.redis.hset(GATEWAYS, "gateway-1", report.format((seconds - 10) * 1_000))
        with pytest.raises(StoreRefused, match="gateway-1, which reported"):
            await migrate(hosted)
        await old.redis.hset(GATEWAYS, "gateway-1", report.format((seconds - 60) * 1_000))
        assert (await migrate(hosted)).is_needed
    finally:
        await hosted.aclose()
        await old.redis.acl_deluser("hosted")


@pytest.mark.parametrize("found", ["3", "1>3", "2>3"])
async def test_store_of_a_later_version_is_neither_opened_nor_migrated(old: Recorded, found: str) -> None:
    await old.redis.hset(META, "schema", found)
    for call in (verify(old.redis), migrate(old.redis)):
        with pytest.raises(StoreRefused, match="3"):
            await call
    assert await old.redis.hget(META, "schema") == found


async def test_new_store_gets_the_schema_at_once(old: Recorded) -> None:
    await old.redis.flushall()
    assert await migrate(old.redis, is_dry=True) == Migration(None)
    assert await old.redis.dbsize() == 0
    await verify(old.redis)
    assert await old.redis.hgetall(META) == {"schema": str(SCHEMA), "shards": str(len(ALL_SHARDS))}
    assert await old.redis.get(shard_for(ACME).schema) == str(SCHEMA)


async def test_migration_refused_beside_another_leaves_the_finished_one(
    old: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one finishes after this one has seen that it is connected."""

    async def connected(redis: Redis, ignore_unnamed: bool) -> tuple[str, ...]:
        await redis.hset(META, "schema", str(SCHEMA))
        return ("farebox:2",)

    await old.redis.hset(META, "schema", f"1>{SCHEMA}")
    monkeypatch.setattr(migrations, "_connected", connected)
    with pytest.raises(StoreRefused, match="stop these first"):
        await migrate(old.redis)
    assert await old.redis.hget(META, "schema") == str(SCHEMA)


async def test_migration_refused_after_another_finished(old: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one finishes after this one has read the version."""
    read = migrations.read_version

    async def read_before_the_other_finished(redis: Redis) -> object:
        found = await read(redis)
        await redis.hset(META, "schema", str(SCHEMA))
        return found

    monkeypatch.setattr(migrations, "read_version", read_before_the_other_finished)
    with pytest.raises(StoreRefused, match="another `farebox migrate`"):
        await migrate(old.redis)
    assert await old.redis.hget(META, "schema") == str(SCHEMA)
