"""A store that the version before wrote: its allowances, whose ids named no plan, count until their period is over."""

import pytest
from redis.asyncio import Redis

from billing.catalog.plans import Plan
from billing.ledger.account import Clawback, Funding, Grant
from billing.ledger.admission import funding_for
from billing.ledger.ledger import Ledger
from billing.store.keys import shard_for
from billing.tenants.tenant import Tenant
from billing.usage import Unit
from tests.support.clock import SteppedClock
from tests.support.samples import ACME, allowance, request, settlement

SMALL = Plan.model_validate({"kind": "free", "allowance": {"usd": "0.00006"}})
LARGE = Plan.model_validate({"kind": "free", "allowance": {"usd": "0.0005"}})
MONTH_MS = 31 * 86_400_000


def on(name: str, plan: Plan, now_ms: int) -> Funding:
    return funding_for(Tenant(id=ACME, email="acme@farebox.test", plan=name), plan, now_ms)


@pytest.fixture
async def former(store: Redis, ledger: Ledger, clock: SteppedClock) -> str:
    """60,000 under the id of the version before, of which 20,000 are spent."""
    funding = on("small", SMALL, clock.now_ms)
    assert funding.allowance is not None
    assert funding.former_allowance_id is not None
    ends = funding.allowance.expires_at_ms or 0
    before = Funding(allowance(funding.former_allowance_id, 60_000, ends))
    await ledger.hold(request("req_0", funding=before))
    await ledger.settle(settlement("req_0", 5))
    await store.hdel(shard_for(ACME).account(ACME), "allowance")
    return funding.former_allowance_id


async def test_former_allowance_counts_until_its_period_is_over(
    ledger: Ledger, clock: SteppedClock, former: str
) -> None:
    now = on("small", SMALL, clock.now_ms)
    account = await ledger.account(ACME, now)
    assert (account.balance_nanos, account.allowance_id) == (40_000, former)
    hold = await ledger.hold(request(funding=now, max_tokens=15))
    assert [(draw.bucket, draw.amount) for draw in hold.draws] == [(former, 40_000)]
    await ledger.settle(settlement(completion=15))
    clock.now_ms += MONTH_MS
    later = on("small", SMALL, clock.now_ms)
    hold = await ledger.hold(request("req_2", funding=later))
    assert later.allowance is not None
    assert [draw.bucket for draw in hold.draws] == [later.allowance.id]


async def test_former_allowance_that_is_retired_is_not_given_again(
    ledger: Ledger, clock: SteppedClock, former: str
) -> None:
    await ledger.hold(request("req_1", funding=Funding(allowance("allowance:other", 60_000, clock.now_ms + 1_000))))
    await ledger.void(request("req_1").request_id, ACME)
    account = await ledger.account(ACME, on("small", SMALL, clock.now_ms))
    assert (account.balance_nanos, account.allowance_id) == (40_000, former)


def reversal(now: Funding, amount: int) -> Clawback:
    """A refund or dispute of so much, as it is sent for an allowance that either version may have put in place."""
    assert now.allowance is not None
    return Clawback("dispute:1", ACME, now.allowance.id, amount, now.allowance, now.former_allowance_id)


@pytest.mark.parametrize(("amount", "left"), [(3_000, 37_000), (60_000, -20_000)])
async def test_clawback_takes_from_the_former_allowance(
    ledger: Ledger, clock: SteppedClock, former: str, amount: int, left: int
) -> None:
    now = on("small", SMALL, clock.now_ms)
    for _ in range(2):
        assert await ledger.claw_back(reversal(now, amount)) == amount
    account = await ledger.account(ACME, now)
    assert (account.balance_nanos, account.allowance_id) == (left, former)
    assert [bucket.id for bucket in account.buckets] == [former]


async def test_clawback_takes_from_a_former_allowance_that_is_retired(
    ledger: Ledger, clock: SteppedClock, former: str
) -> None:
    await ledger.hold(request("req_1", funding=Funding(allowance("allowance:other", 60_000, clock.now_ms + 1_000))))
    await ledger.void(request("req_1").request_id, ACME)
    now = on("small", SMALL, clock.now_ms)
    await ledger.claw_back(reversal(now, 3_000))
    account = await ledger.account(ACME, now)
    assert (account.balance_nanos, account.allowance_id) == (37_000, former)


async def test_restored_former_allowance_gives_back_to_the_pack_that_paid(
    ledger: Ledger, clock: SteppedClock, former: str
) -> None:
    now = on("small", SMALL, clock.now_ms)
    await ledger.grant(Grant("payment:1", ACME, Unit.NANOS, 50_000))
    await ledger.claw_back(reversal(now, 60_000))
    assert (await ledger.account(ACME, now)).balance_nanos == 30_000
    for _ in range(2):
        assert await ledger.restore(reversal(now, 60_000)) == 60_000
    left = {bucket.id: bucket.remaining for bucket in (await ledger.account(ACME, now)).buckets}
    assert left == {former: 40_000, "payment:1": 50_000}


async def test_another_plan_waits_for_the_next_period_behind_a_former_allowance(
    ledger: Ledger, clock: SteppedClock, former: str
) -> None:
    assert (await ledger.account(ACME, on("large", LARGE, clock.now_ms))).balance_nanos == 40_000
    clock.now_ms += MONTH_MS
    assert (await ledger.account(ACME, on("large", LARGE, clock.now_ms))).balance_nanos == 500_000
