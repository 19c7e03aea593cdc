"""The ledger's rules where they are easiest to get wrong, each with numbers worked out by hand.

Prices as in ``samples``: 1,000 nanos a prompt token and 2,000 a completion token. A request has 10 prompt tokens, so
that n completion tokens cost 10,000 + n x 2,000: 20,000 for 5, 40,000 for 15 and at most 50,000 for 20.
"""

import json
from collections.abc import Mapping
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from billing.catalog.plans import Plan
from billing.ledger.account import Clawback, Funding, Hold, Progress, Settlement
from billing.ledger.admission import funding_for
from billing.ledger.codec import snapshot_of
from billing.ledger.errors import InsufficientCredits, UnresolvedSettlement
from billing.ledger.ledger import Ledger
from billing.money import Nanos
from billing.store.keys import shard_for
from billing.tenants.spend_caps import Window, cap_at
from billing.tenants.tenant import Subscription, SubscriptionStatus, Tenant
from billing.usage import NOTHING, RequestId, Status
from tests.support.clock import SteppedClock
from tests.support.failover import Replica, differences
from tests.support.samples import ACME, allowance, calls, money, request, settlement

SHARD = shard_for(ACME)
DAY_MS = 86_400_000


def cost(completion: int) -> int:
    return 10_000 + 2_000 * completion


def ended(hold: Hold, completion: int, held: int | None = None) -> Settlement:
    """A settle as a gateway sends it: with what was held, in case the store lost it."""
    snapshot = snapshot_of(hold, Nanos(hold.held_nanos if held is None else held))
    return replace(settlement(hold.request.request_id, completion), snapshot=snapshot)


def progress(done: Settlement, held: int) -> Progress:
    return Progress(done.request_id, ACME, done.usage, done.list_nanos, Nanos(held))


def void(hold: Hold) -> Settlement:
    return replace(ended(hold, 0), usage=NOTHING, list_nanos=Nanos(0), status=Status.FAILED)


async def overdue(store: Redis, request_id: str = "req_1") -> None:
    await store.zadd(SHARD.leases, {request_id: 1}, xx=True)


async def remaining(store: Redis) -> Mapping[str, int]:
    """What every bucket has, those that ended or are used up included."""
    stored = {**await store.hgetall(SHARD.retired(ACME)), **await store.hgetall(SHARD.buckets(ACME))}
    return {name: int(text.split("|")[1]) for name, text in stored.items()}


async def entries(store: Redis) -> list[tuple[str, Mapping[str, int]]]:
    return [(fields["k"], json.loads(fields["p"])) for _, fields in await store.xrange(SHARD.stream)]


async def balance(ledger: Ledger, funding: Funding | None = None) -> int:
    return (await ledger.account(ACME, funding)).balance_nanos


async def serve(ledger: Ledger, request_id: str, completion: int, **changes: object) -> None:
    await ledger.hold(request(request_id, **changes))
    await ledger.settle(settlement(request_id, completion))


def free(usd: str) -> Plan:
    return Plan.model_validate({"kind": "free", "allowance": {"usd": usd}})


def subscription(usd: str) -> Plan:
    return Plan.model_validate({"kind": "subscription", "allowance": {"usd": usd}, "monthly_price": "1"})


def on_plan(plan: str, start_ms: int) -> Tenant:
    carried = Subscription(
        id="sub_1",
        plan=plan,
        status=SubscriptionStatus.ACTIVE,
        period_start_ms=start_ms,
        period_end_ms=start_ms + 30 * DAY_MS,
    )
    return Tenant(id=ACME, email="acme@farebox.test", plan=plan, subscription=carried)


async def test_free_plans_have_allowances_of_their_own(ledger: Ledger, clock: SteppedClock) -> None:
    """30,000 used up on one free plan; the other gives 500,000."""
    tenant = Tenant(id=ACME, email="acme@farebox.test", plan="small")
    small = funding_for(tenant, free("0.00003"), clock.now_ms)
    await serve(ledger, "req_1", 10, funding=small, max_tokens=10)
    assert await balance(ledger, small) == 0
    large = funding_for(tenant.model_copy(update={"plan": "large"}), free("0.0005"), clock.now_ms)
    assert await balance(ledger, large) == 500_000
    await serve(ledger, "req_2", 20, funding=large)
    assert await balance(ledger, large) == 450_000
    assert await balance(ledger, small) == 0, "back on the first plan, its allowance is still used up"


@pytest.mark.parametrize(("before", "after"), [("25", "150"), ("150", "25")])
async def test_plan_change_in_one_subscription_brings_its_allowance(
    ledger: Ledger, clock: SteppedClock, before: str, after: str
) -> None:
    start = clock.now_ms
    old = funding_for(on_plan("old", start), subscription(before), clock.now_ms)
    await serve(ledger, "req_1", 5, funding=old)
    assert await balance(ledger, old) == int(before) * 10**9 - cost(5)
    new = funding_for(on_plan("new", start), subscription(after), clock.now_ms)
    await serve(ledger, "req_2", 5, funding=new)
    assert await balance(ledger, new) == int(after) * 10**9 - cost(5)


async def test_expire_bills_lost_growth(store: Redis, ledger: Ledger) -> None:
    """Held 18,000, grown to 50,000 which the store lost, 40,000 delivered and checkpointed."""
    await ledger.grant(money(100_000))
    asked, replica = request(step_tokens=4), Replica(store)
    hold = await ledger.hold(asked)
    await replica.catch_up()
    held = await ledger.extend(asked, Nanos(50_000), Nanos(0))
    await replica.take_over()
    done = ended(hold, 15, held)
    await ledger.checkpoint([progress(done, held)])
    await overdue(store)
    assert await ledger.expire() == 1
    assert await balance(ledger) == 100_000 - 40_000
    late = (await ledger.settle(done)).record
    assert (late.record_id, late.charged_nanos) == ("rec_req_1_late", 0)
    assert await balance(ledger) == 100_000 - 40_000
    assert await differences(store, ACME) == []


async def test_late_settle_lists_what_it_charges(store: Redis, ledger: Ledger) -> None:
    """The checkpoint lists 40,000, the hold covers 18,000 and had grown to 50,000: 22,000 are charged late."""
    await ledger.grant(money(100_000))
    asked, replica = request(step_tokens=4), Replica(store)
    hold = await ledger.hold(asked)
    await ledger.checkpoint([progress(ended(hold, 15), hold.held_nanos)])
    await replica.catch_up()
    held = await ledger.extend(asked, Nanos(50_000), Nanos(0))
    await replica.take_over()
    await overdue(store)
    await ledger.expire()
    late = (await ledger.settle(ended(hold, 15, held))).record
    assert (late.charged_nanos, await balance(ledger)) == (22_000, 60_000)
    assert late.list_nanos >= late.charged_nanos
    assert await differences(store, ACME) == []


async def test_refund_of_held_credit_is_no_debt_yet(store: Redis, ledger: Ledger, clock: SteppedClock) -> None:
    """A pack of 50,000 that ends tomorrow is held whole and refunded: no debt, as the hold may give it all back.

    20,000 of it turn out to be used: that is the debt, which the pack without an end pays.
    """
    tomorrow = clock.now_ms + DAY_MS
    await ledger.grant(money(50_000, "payment:1", tomorrow))
    await ledger.hold(request())
    await ledger.grant(money(50_000, "payment:2"))
    await ledger.claw_back(Clawback("refund:1", ACME, "payment:1", 50_000))
    assert await remaining(store) == {"payment:1": -50_000, "payment:2": 50_000}
    await ledger.settle(settlement(completion=5))
    assert await remaining(store) == {"payment:1": 0, "payment:2": 30_000}
    clock.now_ms = tomorrow
    assert await balance(ledger) == 30_000
    assert await differences(store, ACME) == []


async def test_expire_pays_the_debt_that_it_leaves(store: Redis, ledger: Ledger, clock: SteppedClock) -> None:
    await ledger.grant(money(50_000, "payment:1", clock.now_ms + DAY_MS))
    hold = await ledger.hold(request())
    await ledger.grant(money(50_000, "payment:2"))
    await ledger.claw_back(Clawback("refund:1", ACME, "payment:1", 50_000))
    await ledger.checkpoint([progress(ended(hold, 5), hold.held_nanos)])
    await overdue(store)
    await ledger.expire()
    assert await remaining(store) == {"payment:1": 0, "payment:2": 30_000}


async def test_restore_repays_the_pack_that_paid(store: Redis, ledger: Ledger, clock: SteppedClock) -> None:
    """Pack 1 of 100,000, 40,000 spent, is disputed: it owes 40,000, which pack 2 of 50,000 pays.

    Won after pack 1 has ended: the 40,000 go back to pack 2, the other 60,000 to pack 1, where they cannot be drawn.
    """
    tomorrow = clock.now_ms + DAY_MS
    await ledger.grant(money(100_000, "payment:1", tomorrow))
    await serve(ledger, "req_1", 15)
    await ledger.grant(money(50_000, "payment:2"))
    dispute = Clawback("dispute:1", ACME, "payment:1", 100_000)
    await ledger.claw_back(dispute)
    assert await remaining(store) == {"payment:1": 0, "payment:2": 10_000}
    clock.now_ms = tomorrow
    for _ in range(2):
        assert await ledger.restore(dispute) == 100_000
        assert await remaining(store) == {"payment:1": 60_000, "payment:2": 50_000}
        assert await balance(ledger) == 50_000
    kind, last = (await entries(store))[-1]
    assert (kind, last["amount"], last["balance_nanos"]) == ("restore", 100_000, 50_000)
    assert await differences(store, ACME) == []


async def test_restore_settles_the_debt_of_its_own_bucket_first(
    store: Redis, ledger: Ledger, clock: SteppedClock
) -> None:
    """Pack 1 of 100,000 is spent and taken back: pack 2 of 80,000 pays 30,000 for a refund, 50,000 for a dispute.

    Pack 1 owes 20,000 then. Won after pack 2 has ended: 20,000 settle that debt, 50,000 go back to pack 2, and the
    30,000 for the refund, which stands, do not. So the tenant owes nothing.
    """
    await ledger.grant(money(100_000))
    for request_id in ("req_1", "req_2"):
        await serve(ledger, request_id, 20)
    await ledger.grant(money(80_000, "payment:2", clock.now_ms + DAY_MS))
    dispute = Clawback("dispute:1", ACME, "payment:1", 70_000)
    await ledger.claw_back(Clawback("refund:1", ACME, "payment:1", 30_000))
    await ledger.claw_back(dispute)
    assert await remaining(store) == {"payment:1": -20_000, "payment:2": 0}
    clock.now_ms += 2 * DAY_MS
    assert await ledger.restore(dispute) == 70_000
    assert await remaining(store) == {"payment:1": 0, "payment:2": 50_000}
    assert await balance(ledger) == 0
    _, last = (await entries(store))[-1]
    assert last["paid"] == [{"bucket": "payment:2", "debt": "payment:1", "amount": -50_000}]
    assert await differences(store, ACME) == []


async def test_restore_repays_packs_that_paid_each_other(store: Redis, ledger: Ledger) -> None:
    """Pack 1 pays 10,000 for pack 2, pack 2 then 30,000 for pack 1, and pack 3 another 40,000 for pack 1.

    When pack 1's dispute is won, each pack has what was paid for it less what was spent and refunded of it.
    """
    await ledger.grant(money(100_000, "payment:2"))
    await serve(ledger, "req_1", 20)
    await ledger.hold(request("req_2"))
    await ledger.grant(money(100_000, "payment:1"))
    refunds = [Clawback(f"refund:{n}", ACME, "payment:2", 30_000) for n in range(2)]
    for refund in refunds:
        await ledger.claw_back(refund)
    await ledger.restore(refunds[1])
    await ledger.void(RequestId("req_2"), ACME)
    assert await remaining(store) == {"payment:1": 90_000, "payment:2": 30_000}
    await serve(ledger, "req_3", 20)
    await serve(ledger, "req_4", 15)
    dispute = Clawback("dispute:1", ACME, "payment:1", 100_000)
    await ledger.claw_back(dispute)
    await ledger.grant(money(40_000, "payment:3"))
    assert await remaining(store) == {"payment:1": -30_000, "payment:2": 0, "payment:3": 0}
    await ledger.restore(dispute)
    assert await remaining(store) == {"payment:1": 10_000, "payment:2": 20_000, "payment:3": 40_000}
    assert await differences(store, ACME) == []


async def test_debt_in_past_allowance_counts(store: Redis, ledger: Ledger, clock: SteppedClock) -> None:
    """November's 30,000: 18,000 held, grown to 30,000 and the growth lost; another takes 12,000; 30,000 delivered.

    November owes 12,000, so that December has 18,000 of 30,000, and with a pack of 50,000 it has 68,000.
    """
    end, replica = clock.now_ms + DAY_MS, Replica(store)
    november = Funding(allowance("allowance:2026-11", 30_000, end))
    december = Funding(allowance("allowance:2026-12", 30_000, end + 30 * DAY_MS))
    asked = request(step_tokens=4, funding=november)
    hold = await ledger.hold(asked)
    await replica.catch_up()
    held = await ledger.extend(asked, Nanos(30_000), Nanos(0))
    await replica.take_over()
    await serve(ledger, "req_2", 1, funding=november, max_tokens=1)
    await ledger.settle(ended(hold, 10, held))
    assert await balance(ledger, november) == -12_000
    clock.now_ms = end
    assert await balance(ledger, december) == 18_000
    drawn = (await ledger.hold(request("req_3", funding=december, max_tokens=10))).draws
    assert [(draw.bucket, draw.amount) for draw in drawn] == [("allowance:2026-12", 18_000)]
    await ledger.void(RequestId("req_3"), ACME)
    await ledger.grant(money(50_000))
    assert await balance(ledger, december) == 68_000
    assert await differences(store, ACME) == []


@pytest.mark.parametrize("was_held", [True, False])
async def test_allowance_pays_no_debt(store: Redis, ledger: Ledger, clock: SteppedClock, was_held: bool) -> None:
    """A pack of 50,000 is spent and refunded: December's 30,000 leave a debt of 20,000, with or without November's."""
    end = clock.now_ms + DAY_MS
    november = Funding(allowance("allowance:2026-11", 30_000, end))
    december = Funding(allowance("allowance:2026-12", 30_000, end + 30 * DAY_MS))
    await ledger.grant(money(50_000))
    await serve(ledger, "req_1", 20)
    if was_held:
        await ledger.hold(request("req_2", funding=november, max_tokens=10))
        await ledger.void(RequestId("req_2"), ACME)
    await ledger.claw_back(Clawback("refund:1", ACME, "payment:1", 50_000))
    assert await balance(ledger, november) == -20_000
    clock.now_ms = end
    assert await balance(ledger, december) == -20_000


async def test_allowance_of_left_plan_pays_no_debt(store: Redis, ledger: Ledger, clock: SteppedClock) -> None:
    left = Funding(allowance("allowance:free", 30_000, clock.now_ms + DAY_MS))
    await ledger.grant(money(50_000))
    await ledger.hold(request("req_1", funding=left))
    await ledger.void(RequestId("req_1"), ACME)
    await serve(ledger, "req_2", 20)
    await ledger.claw_back(Clawback("refund:1", ACME, "payment:1", 50_000))
    assert await balance(ledger) == -50_000
    assert await remaining(store) == {"allowance:free": 30_000, "payment:1": -50_000}


@pytest.mark.parametrize("is_lost", [False, True])
async def test_recover_draws_on_ended_bucket_of_hold(
    store: Redis, ledger: Ledger, clock: SteppedClock, is_lost: bool
) -> None:
    """Held at 23:59 on an allowance of 30,000, settled at 00:01: covered, whether the store lost the hold or not."""
    end, replica = clock.now_ms + DAY_MS, Replica(store)
    funding = Funding(allowance("allowance:1", 30_000, end), Nanos(100_000))
    await ledger.hold(request("req_0", funding=funding))
    await ledger.void(RequestId("req_0"), ACME)
    await replica.catch_up()
    hold = await ledger.hold(request("req_1", funding=funding, max_tokens=10))
    if is_lost:
        await replica.take_over()
    clock.now_ms = end
    record = (await ledger.settle(ended(hold, 5))).record
    assert [(draw.bucket, draw.amount) for draw in record.draws] == [("allowance:1", 20_000)]
    assert (await ledger.account(ACME)).overage_nanos == 0


async def test_lost_growth_draws_on_ended_bucket_of_hold(store: Redis, ledger: Ledger, clock: SteppedClock) -> None:
    """An allowance of 60,000: 18,000 held, grown to 50,000, lost; 40,000 delivered, of which none is exposure."""
    end, replica = clock.now_ms + DAY_MS, Replica(store)
    asked = request(step_tokens=4, funding=Funding(allowance("allowance:1", 60_000, end), Nanos(100_000)))
    hold = await ledger.hold(asked)
    await replica.catch_up()
    held = await ledger.extend(asked, Nanos(50_000), Nanos(0))
    await replica.take_over()
    clock.now_ms = end
    record = (await ledger.settle(ended(hold, 15, held))).record
    assert [(draw.bucket, draw.amount) for draw in record.draws] == [("allowance:1", 40_000)]
    assert await remaining(store) == {"allowance:1": 20_000}


async def test_late_settle_draws_no_allowance_of_left_plan(store: Redis, ledger: Ledger, clock: SteppedClock) -> None:
    """A free plan left with 30,000; a hold of the pack of 100,000 expires unbilled and is settled late with 20,000."""
    left = Funding(allowance("allowance:free", 30_000, clock.now_ms + DAY_MS))
    await ledger.hold(request("req_0", funding=left))
    await ledger.void(RequestId("req_0"), ACME)
    await ledger.grant(money(100_000))
    hold = await ledger.hold(request())
    await overdue(store)
    await ledger.expire()
    record = (await ledger.settle(ended(hold, 5))).record
    assert [(draw.bucket, draw.amount) for draw in record.draws] == [("payment:1", 20_000)]
    assert (record.balance_nanos, await balance(ledger)) == (80_000, 80_000)


async def test_late_settle_draws_next_periods_allowance(store: Redis, ledger: Ledger, clock: SteppedClock) -> None:
    """The hold expired in November; December's allowance of 30,000 is in force when it settles late with 20,000."""
    end = clock.now_ms + DAY_MS
    november = Funding(allowance("allowance:2026-11", 50_000, end))
    december = Funding(allowance("allowance:2026-12", 30_000, end + 30 * DAY_MS))
    hold = await ledger.hold(request("req_1", funding=november))
    await overdue(store)
    await ledger.expire()
    clock.now_ms = end
    await ledger.hold(request("req_2", funding=december))
    await ledger.void(RequestId("req_2"), ACME)
    record = (await ledger.settle(ended(hold, 5))).record
    assert [(draw.bucket, draw.amount) for draw in record.draws] == [("allowance:2026-12", 20_000)]
    assert (record.balance_nanos, await balance(ledger)) == (10_000, 10_000)


async def test_void_recovers_without_its_credit(store: Redis, ledger: Ledger) -> None:
    await ledger.grant(money(100_000))
    hold = await ledger.hold(request())
    await store.flushall()
    record = (await ledger.settle(void(hold))).record
    assert (record.status, record.charged_nanos, record.draws) == (Status.FAILED, 0, ())


async def test_recover_restores_lost_allowance(store: Redis, ledger: Ledger, clock: SteppedClock) -> None:
    """The first hold of a period put its allowance of 30,000 in place; the store lost both."""
    funding = Funding(allowance("allowance:1", 30_000, clock.now_ms + DAY_MS))
    hold = await ledger.hold(request(funding=funding, max_tokens=10))
    await store.flushall()
    record = (await ledger.settle(ended(hold, 5))).record
    assert [(draw.bucket, draw.amount) for draw in record.draws] == [("allowance:1", 20_000)]
    assert await balance(ledger, funding) == 10_000
    assert await differences(store, ACME) == []


async def test_recover_charges_once_credit_is_back(store: Redis, ledger: Ledger) -> None:
    await ledger.grant(money(100_000))
    hold = await ledger.hold(request())
    await store.flushall()
    with pytest.raises(UnresolvedSettlement, match="credit"):
        await ledger.settle(ended(hold, 5))
    await ledger.grant(money(100_000))
    assert (await ledger.settle(ended(hold, 5))).record.charged_nanos == 20_000
    assert await ledger.recovery.kept() == []


@pytest.mark.parametrize("is_lost", [False, True])
async def test_recover_counts_in_no_later_window(
    store: Redis, ledger: Ledger, clock: SteppedClock, is_lost: bool
) -> None:
    replica = Replica(store)
    await ledger.grant(money(500_000))
    await replica.catch_up()
    hold = await ledger.hold(request("req_1", caps=(cap_at(Window.DAY, Nanos(100_000), clock.now_ms),)))
    if is_lost:
        await replica.take_over()
    clock.now_ms += DAY_MS
    today = cap_at(Window.DAY, Nanos(100_000), clock.now_ms)
    await serve(ledger, "req_2", 5, caps=(today,))
    await ledger.settle(ended(hold, 5))
    assert await store.hget(SHARD.account(ACME), "cap:key_1:day") == f"{today.start_ms}|20000|0"


async def test_extend_draws_next_periods_allowance(store: Redis, ledger: Ledger, clock: SteppedClock) -> None:
    """November's 18,000 are all held when it ends. December's 48,000 are in force: 12,000 more come from there."""
    end = clock.now_ms + DAY_MS
    november = Funding(allowance("allowance:2026-11", 18_000, end))
    december = Funding(allowance("allowance:2026-12", 48_000, end + 30 * DAY_MS))
    asked = request(step_tokens=4, funding=november)
    assert (await ledger.hold(asked)).held_nanos == 18_000
    clock.now_ms = end
    await ledger.hold(request("req_2", funding=december, max_tokens=1))
    await ledger.void(RequestId("req_2"), ACME)
    assert await ledger.extend(asked, Nanos(30_000), Nanos(20_000)) == 30_000
    record = (await ledger.settle(settlement(completion=10))).record
    assert [(draw.bucket, draw.amount) for draw in record.draws] == [
        ("allowance:2026-11", 18_000),
        ("allowance:2026-12", 12_000),
    ]
    assert await balance(ledger, december) == 36_000


async def test_expire_skips_damaged_hold(store: Redis, ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    """Two overdue holds; the bucket of the first is gone. The log names it."""
    await ledger.grant(money(100_000))
    await ledger.hold(request("req_1"))
    damaged = json.loads(await store.hget(SHARD.holds, "req_1") or "")
    damaged["draws"] = [["gone", "n", "50000"]]
    await store.hset(SHARD.holds, "req_0", json.dumps(damaged))
    await store.zadd(SHARD.leases, {"req_0": 1, "req_1": 2})
    assert await ledger.expire() == 1
    assert await store.hkeys(SHARD.holds) == ["req_0"]
    assert "req_0" in caplog.text


async def test_recover_by_call_shows_allowance_in_balance(store: Redis, ledger: Ledger, clock: SteppedClock) -> None:
    funding, replica = Funding(allowance("allowance:1", 30_000, clock.now_ms + DAY_MS)), Replica(store)
    await ledger.grant(calls(3))
    await ledger.hold(request("req_0", funding=funding))
    await ledger.void(RequestId("req_0"), ACME)
    await replica.catch_up()
    hold = await ledger.hold(request("req_1", funding=funding))
    await replica.take_over()
    record = (await ledger.settle(ended(hold, 5))).record
    assert ([draw.amount for draw in record.draws], record.balance_nanos) == ([1], 30_000)
    assert await balance(ledger) == 30_000


async def test_recover_shows_the_balance_of_the_account(store: Redis, ledger: Ledger, clock: SteppedClock) -> None:
    """The store lost everything, so that no allowance is in force: both count until the next hold names one."""
    one = Funding(allowance("allowance:one", 30_000, clock.now_ms + DAY_MS))
    other = Funding(allowance("allowance:other", 30_000, clock.now_ms + DAY_MS))
    holds = [await ledger.hold(request("req_1", funding=one)), await ledger.hold(request("req_2", funding=other))]
    await store.flushall()
    balances = [(await ledger.settle(ended(hold, 5))).record.balance_nanos for hold in holds]
    assert balances == [10_000, 20_000]
    assert await balance(ledger) == 20_000


async def test_entry_balance_is_without_left_allowance(store: Redis, ledger: Ledger, clock: SteppedClock) -> None:
    """A free plan left with 30,000; a pack of 100,000 of which 50,000 are spent, then one of 10,000."""
    left = Funding(allowance("allowance:free", 30_000, clock.now_ms + DAY_MS))
    await ledger.hold(request("req_0", funding=left))
    await ledger.void(RequestId("req_0"), ACME)
    await ledger.grant(money(100_000))
    await serve(ledger, "req_1", 20)
    await ledger.grant(money(10_000, "payment:2"))
    assert [entry["balance_nanos"] for _, entry in await entries(store)] == [30_000, 130_000, 50_000, 60_000]
    assert await balance(ledger) == 60_000
    await ledger.hold(request("req_2", funding=left))
    await ledger.void(RequestId("req_2"), ACME)
    assert await balance(ledger) == 90_000, "back on the plan its allowance is in force again"


async def test_hold_refused_by_debt_says_so(ledger: Ledger) -> None:
    """Balance -40,000, exposure 0 of 100,000: the debt is what stops it, not the credit limit."""
    await ledger.grant(money(40_000))
    await serve(ledger, "req_1", 15, max_tokens=15)
    await ledger.claw_back(Clawback("dispute:1", ACME, "payment:1", 40_000))
    with pytest.raises(InsufficientCredits) as refused:
        await ledger.hold(request("req_2", funding=Funding(credit_limit=Nanos(100_000))))
    assert (refused.value.limit_source, refused.value.balance_nanos) == ("debt", -40_000)
    assert "cap" not in str(refused.value)


@pytest.mark.parametrize(
    ("pack", "exposure"),
    [
        (0, 40_000),  # held 20,000 of the line; another took 20,000; the lost 20,000 are exposure as well
        (5_000, 35_000),  # held 5,000 + 15,000 of the line; another took as much; lost: the line, its last draw
    ],
)
async def test_recover_owes_to_the_credit_line_last(store: Redis, ledger: Ledger, pack: int, exposure: int) -> None:
    """A credit limit of 20,000, a lost hold of 20,000, and another that took all there was meanwhile."""
    funding, replica = Funding(credit_limit=Nanos(20_000)), Replica(store)
    if pack:
        await ledger.grant(money(pack))
    await replica.catch_up()
    hold = await ledger.hold(request("req_1", funding=funding, max_tokens=5))
    await replica.take_over()
    await serve(ledger, "req_2", 5, funding=funding, max_tokens=5)
    assert (await ledger.settle(ended(hold, 5))).record.charged_nanos == 20_000
    account = await ledger.account(ACME)
    assert (account.overage_nanos, account.balance_nanos) == (exposure, 0)
    assert await differences(store, ACME) == []


async def test_lost_growth_owes_to_the_credit_line_last(store: Redis, ledger: Ledger) -> None:
    """A pack of 10,000 and a limit of 30,000: 10,000 + 8,000 held, the growth to 40,000 lost, the rest another's.

    Of 40,000 delivered 10,000 come from the pack, 30,000 from the line, beside the 22,000 of the other.
    """
    funding, replica = Funding(credit_limit=Nanos(30_000)), Replica(store)
    await ledger.grant(money(10_000))
    asked = request("req_1", funding=funding, step_tokens=4)
    hold = await ledger.hold(asked)
    await replica.catch_up()
    held = await ledger.extend(asked, Nanos(40_000), Nanos(0))
    await replica.take_over()
    await serve(ledger, "req_2", 6, funding=funding, max_tokens=6)
    assert (await ledger.settle(ended(hold, 15, held))).record.charged_nanos == 40_000
    account = await ledger.account(ACME)
    assert (account.overage_nanos, account.balance_nanos) == (52_000, 0)
