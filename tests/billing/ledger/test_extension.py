"""A hold that grows by steps: what it draws on, that a repeat draws nothing twice, and where all of it goes."""

import asyncio

import pytest
from redis.asyncio import Redis

from billing.ledger.account import Clawback, Funding, Progress
from billing.ledger.errors import CreditOnHold, InsufficientCredits, UnknownHold
from billing.ledger.ledger import Ledger
from billing.money import Nanos
from billing.store.keys import shard_for
from billing.usage import OVERAGE, Status, TenantId
from tests.support.clock import SteppedClock
from tests.support.samples import ACME, FREE, MAX_COST, allowance, calls, money, records, request, settlement

FIRST = 18_000
"""10 prompt tokens and a first step of 4."""
STEPPED = request(step_tokens=4)


async def extend(ledger: Ledger, total: int, least: int = 0) -> int:
    return await ledger.extend(STEPPED, Nanos(total), Nanos(least))


async def test_a_hold_begins_with_the_prompt_and_one_step_and_affords_the_whole(ledger: Ledger) -> None:
    await ledger.grant(money(100_000))
    hold = await ledger.hold(STEPPED)
    assert (hold.held_nanos, hold.max_tokens, hold.balance_nanos) == (FIRST, 20, 100_000 - FIRST)


@pytest.mark.parametrize(
    ("credit", "tokens"), [(MAX_COST, 20), (MAX_COST - 1, 19), (30_000, 10), (18_000, 4), (12_000, 1)]
)
async def test_an_answer_is_cut_to_what_the_credit_affords(ledger: Ledger, credit: int, tokens: int) -> None:
    await ledger.grant(money(credit))
    assert (await ledger.hold(STEPPED)).max_tokens == tokens


async def test_what_others_hold_still_counts_as_affordable(ledger: Ledger) -> None:
    await ledger.grant(money(MAX_COST))
    await ledger.hold(request("req_other", step_tokens=4))
    hold = await ledger.hold(STEPPED)
    assert (hold.held_nanos, hold.max_tokens) == (FIRST, 20)
    assert await ledger.hold(STEPPED) == hold, "a repeat says the same"


async def test_the_same_extension_again_draws_nothing(ledger: Ledger) -> None:
    await ledger.grant(money(100_000))
    await ledger.hold(STEPPED)
    for total, now in ((30_000, 30_000), (30_000, 30_000), (20_000, 30_000), (40_000, 40_000)):
        assert await extend(ledger, total) == now
        assert (await ledger.account(ACME)).held_nanos == now


async def test_an_extension_takes_what_is_there_if_it_comes_to_the_least(ledger: Ledger) -> None:
    await ledger.grant(money(FIRST + 5_000))
    await ledger.hold(STEPPED)
    assert await extend(ledger, 30_000, least=FIRST + 5_000) == FIRST + 5_000
    assert (await ledger.account(ACME)).balance_nanos == 0


async def test_less_than_the_least_is_refused_and_changes_nothing(ledger: Ledger, store: Redis) -> None:
    await ledger.grant(money(FIRST + 5_000))
    await ledger.hold(STEPPED)
    before = {key: await store.dump(key) for key in await store.keys()}
    with pytest.raises(InsufficientCredits):
        await extend(ledger, 30_000, least=FIRST + 5_001)
    assert {key: await store.dump(key) for key in await store.keys()} == before


async def test_credit_short_for_others_holds_alone_is_worth_a_retry(ledger: Ledger) -> None:
    await ledger.grant(money(2 * FIRST))
    await ledger.hold(STEPPED)
    await ledger.hold(request("req_2", step_tokens=4))
    with pytest.raises(CreditOnHold) as refused:
        await extend(ledger, 30_000, least=2 * FIRST)
    assert (refused.value.held_nanos, refused.value.required_nanos) == (FIRST, 2 * FIRST)
    with pytest.raises(InsufficientCredits):
        await extend(ledger, 2 * FIRST + 1, least=2 * FIRST + 1)
    await ledger.void(request("req_2").request_id, ACME)
    assert await extend(ledger, 30_000, least=20_000) == 30_000


async def test_each_part_of_many_steps_goes_back_where_it_came_from(ledger: Ledger, clock: SteppedClock) -> None:
    funding = Funding(allowance("allowance:1", 20_000, clock.now_ms + 9_000), Nanos(100_000))
    await ledger.grant(money(5_000, "payment:late", clock.now_ms + 2_000))
    await ledger.hold(request(step_tokens=4, funding=funding))
    await ledger.grant(money(5_000, "payment:soon", clock.now_ms + 1_000))
    for total in (22_000, 26_000, 40_000):
        await extend(ledger, total)
    account = await ledger.account(ACME)
    assert ([b.remaining for b in account.buckets], account.held_nanos) == ([0, 0, 0], 40_000)
    record = (await ledger.settle(settlement(completion=6))).record
    assert [(d.bucket, d.amount) for d in record.draws] == [("allowance:1", 20_000), ("payment:soon", 2_000)]
    account = await ledger.account(ACME)
    assert [(b.id, b.remaining) for b in account.buckets] == [
        ("allowance:1", 0),
        ("payment:soon", 3_000),
        ("payment:late", 5_000),
    ]
    assert (account.held_nanos, account.overage_nanos) == (0, 0)


async def test_credit_that_came_later_is_charged_before_exposure(ledger: Ledger) -> None:
    await ledger.hold(request(step_tokens=4, funding=Funding(credit_limit=Nanos(100_000))))
    await ledger.grant(money(10_000))
    await extend(ledger, 28_000)
    record = (await ledger.settle(settlement(completion=6))).record
    assert [(d.bucket, d.amount) for d in record.draws] == [("payment:1", 10_000), (OVERAGE, 12_000)]


async def test_exposure_grows_to_its_cap_and_no_further(ledger: Ledger) -> None:
    await ledger.hold(request(step_tokens=4, funding=Funding(credit_limit=Nanos(20_000))))
    assert await extend(ledger, 30_000) == 20_000
    with pytest.raises(InsufficientCredits):
        await extend(ledger, 30_000, least=20_001)


async def test_an_allowance_that_has_ended_is_drawn_on_no_more(ledger: Ledger, clock: SteppedClock) -> None:
    funding = Funding(allowance("allowance:1", 100_000, clock.now_ms + 1_000))
    await ledger.hold(request(step_tokens=4, funding=funding))
    clock.now_ms += 1_000
    with pytest.raises(InsufficientCredits):
        await extend(ledger, 30_000, least=20_000)
    assert (await ledger.settle(settlement(completion=4))).record.charged_nanos == FIRST


async def test_what_pays_a_debt_extends_nothing(ledger: Ledger) -> None:
    await ledger.grant(money(FIRST))
    await ledger.hold(STEPPED)
    await ledger.claw_back(Clawback("refund:1", ACME, "payment:1", FIRST))
    await ledger.grant(money(FIRST + 1_000, "payment:2"))
    assert await extend(ledger, 30_000) == FIRST + 1_000


async def test_a_call_covers_every_step(ledger: Ledger) -> None:
    await ledger.grant(calls(1))
    await ledger.hold(STEPPED)
    await extend(ledger, 30_000, least=30_000)
    account = await ledger.account(ACME)
    assert (account.held_nanos, account.held_requests) == (0, 1)


async def test_a_free_request_holds_nothing_however_long(ledger: Ledger) -> None:
    hold = await ledger.hold(request(price=FREE, step_tokens=4))
    assert (hold.held_nanos, await extend(ledger, 0)) == (0, 0)


async def test_what_was_settled_or_is_another_tenant_s_is_not_extended(ledger: Ledger) -> None:
    await ledger.grant(money(100_000))
    await ledger.hold(STEPPED)
    others = (TenantId(f"t{n}") for n in range(10_000))
    neighbour = next(t for t in others if shard_for(t) == shard_for(ACME))
    with pytest.raises(UnknownHold):
        await ledger.extend(request(step_tokens=4, tenant=neighbour), Nanos(30_000), Nanos(0))
    await ledger.settle(settlement())
    with pytest.raises(UnknownHold):
        await extend(ledger, 30_000)
    assert (await ledger.account(ACME)).held_nanos == 0


async def test_a_charge_ends_at_all_that_was_held_and_no_further(ledger: Ledger) -> None:
    await ledger.grant(money(100_000))
    await ledger.hold(STEPPED)
    await extend(ledger, 30_000)
    assert (await ledger.settle(settlement(completion=20))).record.charged_nanos == 30_000


async def test_an_extended_hold_expires_by_its_checkpoint_and_is_topped_up_to_all_it_held(
    ledger: Ledger, store: Redis
) -> None:
    await ledger.grant(money(100_000))
    await ledger.hold(request(step_tokens=4, lease_ms=20))
    await extend(ledger, 40_000)
    done = settlement(completion=8)
    await ledger.checkpoint([Progress(done.request_id, ACME, done.usage, done.list_nanos)])
    await asyncio.sleep(0.05)
    assert await ledger.expire() == 1
    (expired,) = await records(store)
    assert (expired.status, expired.charged_nanos) == (Status.EXPIRED, 26_000)
    assert (await ledger.account(ACME)).balance_nanos == 74_000
    assert (await ledger.settle(settlement(completion=20))).record.charged_nanos == 14_000
