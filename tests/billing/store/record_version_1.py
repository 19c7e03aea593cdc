"""Make a store with the code of version 0.1 and write it down: the store that the migration tests open.

Run once, at the last commit of version 0.1 (e60dd1b), with the wheel of that time's dependencies::

    cd CHECKOUT_OF_VERSION_0_1 && PYTHONPATH=. python .../tests/billing/store/record_version_1.py OUT.jsonl

The lines of the file are JSON objects. First one ``about`` line, then one line for each key (``key``, ``type``,
``value``, ``ttl_ms``), each line of a spool file (``spool``) and each tenant's account as version 0.1 showed it
(``account``). Keys that hold sketches of client addresses are binary and are left out.

It holds, all on one server:

* tenants on a plan of each kind: free, prepaid, pay as you go, and subscription; one without a Dodo customer
* API keys: plain, throttled, rotated (old and new), revoked, with limits and caps of its own, and a licence key
* packs of money and of calls, allowances of two periods, an adjustment, a repayment of exposure
* a refund that leaves a debt, a refund that waits for its payment, and a dispute that was won
* holds: open, extended, checkpointed, settled, voided, expired, settled late, free, drawn from exposure, under a cap
* usage records: archived, acknowledged, sealed in the outbox, a dead letter, and unsealed
* an unresolved settlement, an idempotency key with its answer, notices, an auto-refill with attempts
* webhooks applied and parked, the credit that a payment fixed, proofs, a published catalog with a plan of before
"""

# mypy: ignore-errors
# ruff: noqa: I001

import asyncio
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from redis.asyncio import Redis

from billing.account import Adjustment, Bucket, Clawback, Funding, Grant, Progress
from billing.archive.archiver import Archiver
from billing.archive.files import Archive
from billing.catalogue import Catalogue
from billing.clock import now_ms
from billing.dodo.budget import CallBudget
from billing.dodo.client import Dodo, DodoSettings
from billing.dodo.sync import sync
from billing.dodo.webhooks import Webhooks
from billing.caps import SpendCap, Window
from billing.errors import BillingError
from billing.export.exporter import Exporter
from billing.money import Nanos
from billing.notices import Notice, NoticeKind
from billing.plans import Limits
from billing.reconcile.reconciler import Reconciler
from billing.refills import Attempt, AttemptState, Refill
from billing.store import board
from billing.store.answers import Answers, Asked
from billing.store.archive_cursor import ArchiveCursor
from billing.store.connection import connect
from billing.store.holds import Ledger
from billing.store.keys import shard_for
from billing.store.notices import Notices
from billing.store.outbox import Outbox
from billing.store.packing import origin_of, pack_settlement
from billing.store import proof_state
from billing.store.refills import Refills
from billing.store.tenants import Tenants
from billing.tenants import ApiKey, Quarantine, Subscription, SubscriptionStatus, Tenant, hash_key
from billing.usage import BucketId, Status, TenantId, Unit
from cluster import valkey
from cluster.dodo_sandbox.server import SandboxServer
from tests.billing.dodo.world import SECRET, delivery
from tests.billing.samples import FREE, request, settlement

API_KEY = "dodo_test_key"
DAY_MS = 86_400_000
NOW = now_ms()
ACME, ZETA, PAYG, TEAM, FREDA, LATER = (TenantId(n) for n in ("acme", "zeta", "payg", "team", "freda", "later"))
CATALOGUE = {
    "models": [
        {"id": "base", "price": {"input_per_1m": "1", "output_per_1m": "2"}},
        {
            "id": "pirate",
            "price": {"per_request": "0.001"},
            "path": "adapters/pirate",
            "digest": "0123456789ab" + "0" * 52,
        },
    ],
    "plans": {
        "free": {"kind": "free", "allowance": {"usd": "0.00006"}},
        "prepaid": {"kind": "prepaid"},
        "payg": {"kind": "pay_as_you_go", "overage_cap": "25", "grace_days": 2},
        "pro": {"kind": "subscription", "allowance": {"usd": "10"}, "overage_cap": "50", "monthly_price": "20"},
    },
    "packs": {
        "small": {"price": "5", "grants": {"usd": "5"}, "expires_days": 30},
        "calls": {"price": "7", "grants": {"requests": 1000, "adapters": ["base"]}},
    },
    "default_plan": "prepaid",
}
ALLOWANCES = [
    Bucket(BucketId(f"allowance:free:{month}"), Unit.NANOS, 60_000, 60_000, ends, is_allowance=True)
    for month, ends in (("2026-10", NOW - DAY_MS), ("2026-11", NOW + DAY_MS))
]


def asked(request_id, tenant=ACME, **changes):
    return request(request_id, tenant=tenant, **changes)


def done(request_id, tenant=ACME, tokens=5):
    return replace(settlement(request_id, tokens), tenant=tenant)


async def serve(ledger, request_id, tenant=ACME, tokens=5, **changes):
    hold = await ledger.hold(asked(request_id, tenant, **changes))
    await ledger.settle(replace(done(request_id, tenant, tokens), origin=origin_of(hold, hold.held_nanos)))


async def make_tenants(tenants, dodo):
    carried = Subscription(
        id="sub_1",
        plan="pro",
        status=SubscriptionStatus.ACTIVE,
        period_start_ms=NOW - DAY_MS,
        period_end_ms=NOW + DAY_MS,
    )
    owed = replace_model(carried, id="sub_2", plan="payg", status=SubscriptionStatus.PAST_DUE, past_due_ends_at_ms=NOW)
    for name, plan, subscription in (
        (ACME, "prepaid", None),
        (ZETA, "prepaid", None),
        (PAYG, "payg", owed),
        (TEAM, "pro", carried),
        (FREDA, "free", None),
        (LATER, "prepaid", None),
    ):
        tenant = Tenant(id=name, email=f"{name}@example.com", plan=plan, subscription=subscription, created_at_ms=NOW)
        await tenants.create(tenant)
        if name is not LATER:
            await tenants.set_customer(name, await dodo.create_customer(tenant))


def replace_model(value, **changes):
    return value.model_copy(update=changes)


def api_key(name, tenant=ACME, **changes):
    secret = f"fbx_{name}_of_{tenant}_for_the_migration_test"
    base = ApiKey(
        id=f"key_{name}", tenant=tenant, hash=hash_key(secret), shown=secret[:12], name=name, created_at_ms=NOW
    )
    return replace_model(base, **changes)


async def make_keys(tenants):
    for tenant in (ACME, ZETA, PAYG, TEAM, FREDA, LATER):
        await tenants.add_key(api_key("plain", tenant))
    why = Quarantine(reason="many_addresses", detail="used from 40 addresses in one hour", since_ms=NOW)
    await tenants.add_key(api_key("throttled", quarantine=why))
    await tenants.add_key(api_key("lifted", lifted_at_ms=NOW))
    await tenants.add_key(api_key("revoked", revoked_at_ms=NOW))
    await tenants.add_key(api_key("rotated"))
    await tenants.add_key(api_key("successor", counts_as="key_rotated"))
    await tenants.expire_key(ACME, "key_rotated", NOW + DAY_MS)
    limits = Limits(requests_per_minute=60, burst=20, tokens_per_minute=10_000, concurrent_requests=4)
    await tenants.add_key(
        api_key(
            "limited", models=("base",), limits=limits, daily_cap=5_000_000, monthly_cap=90_000_000, manages_keys=True
        )
    )
    await tenants.add_key(api_key("licence", TEAM, shown="LIC-0001", hash=hash_key("LIC-0001-0002-0003-0004")))


async def move(ledger, redis):
    """Every movement of credit there is."""
    credit = Funding(overage_cap=Nanos(500_000))
    await ledger.grant(Grant("payment:1", ACME, Unit.NANOS, 1_000_000, NOW + 30 * DAY_MS))
    await ledger.grant(Grant("payment:2", ACME, Unit.REQUESTS, 3, adapters=("pirate",)))
    await ledger.grant(Grant("payment:3", ZETA, Unit.NANOS, 60_000))
    for number in range(4):
        await serve(ledger, f"req_call_{number}")
    caps = (SpendCap(Window.DAY, NOW - NOW % DAY_MS, Nanos(5_000_000)),)
    limits = Limits(requests_per_minute=60, tokens_per_minute=10_000, concurrent_requests=4)
    await serve(ledger, "req_capped", caps=caps, limits=limits, month_start_ms=NOW - 29 * DAY_MS)
    last_period = Ledger(redis, lambda: NOW - 2 * DAY_MS)
    await serve(last_period, "req_allowed_before", FREDA, 7, funding=Funding(ALLOWANCES[0]))
    await serve(ledger, "req_allowed", FREDA, 4, funding=Funding(ALLOWANCES[1]))
    await serve(ledger, "req_overage", PAYG, 20, funding=credit)
    await serve(
        ledger, "req_team", TEAM, 20, funding=replace(credit, allowance=replace(ALLOWANCES[1], id="allowance:sub_1:1"))
    )
    await serve(ledger, "req_free", ZETA, price=FREE)
    await ledger.repay_overage("payment:4", PAYG, 10_000)
    await ledger.adjust(Adjustment("adjustment:1", ACME, Unit.NANOS, 5_000, "billed twice"))
    await ledger.hold(asked("req_long", step_tokens=4))
    await ledger.extend(asked("req_long"), Nanos(30_000), Nanos(0))
    await ledger.settle(done("req_long", tokens=8))
    await ledger.hold(asked("req_void"))
    await ledger.void("req_void", ACME)
    await ledger.hold(asked("req_left"))
    await ledger.settle(replace(done("req_left", tokens=2), status=Status.CANCELLED))
    for request_id in ("req_expired", "req_expired_late"):
        await ledger.hold(asked(request_id, lease_ms=1))
    await asyncio.sleep(0.01)
    assert await ledger.expire() == 2
    await ledger.settle(done("req_expired_late", tokens=3))
    # ZETA: what it bought was spent and is refunded, so it owes; a refund came before its payment; a dispute was won.
    await serve(ledger, "req_spent", ZETA, 20)
    await ledger.claw_back(Clawback("refund:3", ZETA, "payment:3", 60_000))
    await ledger.claw_back(Clawback("refund:6", ZETA, "payment:6", 7_000))
    await ledger.grant(Grant("payment:5", ACME, Unit.NANOS, 90_000))
    dispute = Clawback("dispute:1", ACME, "payment:5", 90_000)
    await ledger.claw_back(dispute)
    await ledger.restore(dispute)
    await ledger.claw_back(Clawback("dispute:2", ACME, "payment:5", 40_000))


async def leave_holds(ledger):
    """Requests that run while the store is written down, and what spool files have of others."""
    lines, hour = [], 3_600_000
    credit = Funding(overage_cap=Nanos(500_000))
    opened = {
        "req_open": asked("req_open", lease_ms=hour),
        "req_open_extended": asked("req_open_extended", lease_ms=hour, step_tokens=4),
        "req_open_exposure": asked("req_open_exposure", PAYG, lease_ms=hour, funding=credit),
        "req_open_allowance": asked(
            "req_open_allowance", FREDA, lease_ms=hour, max_tokens=5, funding=Funding(ALLOWANCES[1])
        ),
        "req_spooled": asked("req_spooled", lease_ms=hour),
        "req_spooled_settled": asked("req_spooled_settled", lease_ms=hour),
        "req_spooled_lost": asked("req_spooled_lost", lease_ms=hour),
        "req_lost": asked("req_lost", lease_ms=hour),
    }
    holds = {id_: await ledger.hold(one) for id_, one in opened.items()}
    held = await ledger.extend(opened["req_open_extended"], Nanos(40_000), Nanos(0))
    assert held == 40_000
    running = done("req_open_extended", tokens=9)
    await ledger.checkpoint([Progress(running.request_id, ACME, running.usage, running.list_nanos)])

    def settles(id_, tokens):
        return replace(done(id_, tokens=tokens), origin=origin_of(holds[id_], holds[id_].held_nanos))

    # A settle whose reply was lost waits in a spool although it took effect.
    await ledger.settle(settles("req_spooled_settled", 6))
    for id_, tokens in (("req_spooled", 4), ("req_spooled_settled", 6)):
        lines.append(pack_settlement(settles(id_, tokens)))
    # And one of the form before spools kept where a hold came from.
    old = json.loads(lines[-1])
    del old["origin"], old["is_withdrawn"]
    lines.append(json.dumps(old, separators=(",", ":")))
    return lines, settles


async def lose(redis, ledger, settles):
    """A hold that the store has lost, too long ago to be sure that it was never charged: a person decides.

    The hold is voided, so that nothing stays held for it, and its marker is taken away.
    """
    shard = shard_for(ACME)
    await ledger.void("req_lost", ACME)
    await ledger.void("req_spooled_lost", ACME)
    for ring in shard.settled:
        await redis.hdel(ring, "req_lost", "req_spooled_lost")
    lost = settles("req_lost", 5)
    lost = replace(lost, origin=replace(lost.origin, held_at_ms=lost.origin.held_at_ms - 3 * 3_600_000))
    try:
        await ledger.settle(lost)
        raise AssertionError("it is kept for a person")
    except BillingError as error:
        print("unresolved:", error)
    return pack_settlement(settles("req_spooled_lost", 5))


async def export(redis, dodo, tenants):
    """Two flushes: the first is acknowledged but for a dead letter, the second stays in the outbox."""
    exporter = Exporter(redis, dodo, tenants, budget=CallBudget(100_000), jitter=lambda: 0.0)
    await exporter.flush_once(force=True)


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="v1-") as folder:
        server = valkey.start(Path(folder) / "s")
        try:
            with SandboxServer(Path(folder) / "dodo", API_KEY, webhook_secret=SECRET) as sandbox:
                lines = asyncio.run(record(server.url, sandbox.url, Path(folder)))
        finally:
            server.stop()
    out.write_text("".join(json.dumps(line, separators=(",", ":"), ensure_ascii=False) + "\n" for line in lines))
    print(out, out.stat().st_size, "bytes,", len(lines), "lines")


async def record(url, sandbox_url, folder):
    redis = await connect(url)
    dodo = Dodo(DodoSettings(API_KEY, SECRET, base_url=sandbox_url))
    catalogue = Catalogue.model_validate(CATALOGUE)
    ledger, tenants, outbox, notices = Ledger(redis), Tenants(redis), Outbox(redis), Notices(redis)

    before = {**CATALOGUE["plans"], "starter": {"kind": "pay_as_you_go", "overage_cap": "5"}}
    await board.publish(redis, Catalogue.model_validate({**CATALOGUE, "plans": before}), "gateway-1", NOW - DAY_MS)
    await board.publish(redis, catalogue, "gateway-1", NOW)
    await sync(dodo, redis, catalogue)
    await make_tenants(tenants, dodo)
    await make_keys(tenants)
    await move(ledger, redis)

    # A tenant whose customer Dodo does not have: its usage becomes a dead letter.
    await tenants.set_customer(TEAM, "cus_nobody")
    await export(redis, dodo, tenants)
    assert len(await outbox.dead()) > 0
    archiver, cursor = Archiver(redis, Archive(str(folder / "archive")), keep_ms=0), ArchiveCursor(redis)
    await archiver._archive(cursor, shard_for(ACME), await cursor.now_ms() + 1)
    await cursor.announce("file:///var/lib/farebox/archive")

    lines, settles = await leave_holds(ledger)
    lines.append(await lose(redis, ledger, settles))
    await ledger.grant(Grant("payment:7", LATER, Unit.NANOS, 100_000))
    await serve(ledger, "req_later", LATER)
    await export(redis, dodo, tenants)
    assert len(await outbox.events()) > 0, "a tenant without a customer waits in the outbox"
    await serve(ledger, "req_unsealed")

    hooks = Webhooks(redis, dodo, ledger, tenants, of(catalogue), SECRET)
    for id_, type_, data in (
        ("msg_kept", "customer.created", {"payload_type": "Customer"}),
        ("msg_parked", "payment.succeeded", {"payload_type": "Payment", "payment_id": "pay_unknown"}),
    ):
        try:
            await hooks.receive(*delivery(type_, data, id_))
        except BillingError as error:
            print(id_, error)
    answers = Answers(redis, 30_000)
    question = Asked(ACME, "idem-1", "req_spooled_settled", "digest", False)
    await answers.claim(question)
    await answers.stage(question, '{"choices":[]}')
    await answers.conclude(question)
    await notices.tell(Notice(NoticeKind.BALANCE_LOW, ZETA, "low:zeta:1", NOW, {"balance_usd": "-0.00006"}))
    await notices.tell(
        Notice(NoticeKind.KEY_QUARANTINED, ACME, "quarantine:key_throttled:1", NOW, {"key": "key_throttled"})
    )
    tried = (
        Attempt(
            id="try_1", started_at_ms=NOW - DAY_MS, cents=500, state=AttemptState.FAILED, reason="card", ended_at_ms=NOW
        ),
        Attempt(id="try_2", started_at_ms=NOW, cents=500),
    )
    await Refills(redis).put(ACME, Refill(pack="small", threshold_nanos=1_000, monthly_cap_cents=2_000, attempts=tried))
    report = await Reconciler(redis).run()
    assert report.is_clean, report.faults
    await proof_state.show(redis, "store", proof_state.ProofState(at_ms=NOW, proofs=len(report.rows)))

    return [
        {"about": "a store of schema 1, written by version 0.1", "recorded_at_ms": now_ms()},
        *[line async for line in dump(redis)],
        *[{"spool": line} for line in lines],
        *[await shown(ledger, tenant) for tenant in await tenants.list()],
    ]


def of(catalogue):
    async def source():
        return catalogue

    return source


async def dump(redis: Redis):
    for key in sorted([key async for key in redis.scan_iter(count=1_000)]):
        kind = await redis.type(key)
        if ":sightings:" in key:
            continue
        if kind == "string":
            value = await redis.get(key)
        elif kind == "hash":
            value = await redis.hgetall(key)
        elif kind == "set":
            value = sorted(await redis.smembers(key))
        elif kind == "zset":
            value = [[member, score] for member, score in await redis.zrange(key, 0, -1, withscores=True)]
        else:
            value = [[id_, fields] for id_, fields in await redis.xrange(key)]
        yield {"key": key, "type": kind, "ttl_ms": await redis.pttl(key), "value": value}


async def shown(ledger, tenant):
    account = await ledger.account(tenant.id)
    return {
        "account": tenant.id,
        "balance_nanos": account.balance_nanos,
        "held_nanos": account.held_nanos,
        "open_holds": account.open_holds,
        "exposure_nanos": account.overage_nanos,
        "buckets": [[b.id, b.unit, b.remaining] for b in account.buckets],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
