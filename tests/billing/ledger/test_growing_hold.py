"""A running request's hold grows ahead of its use, without waiting, and gives up only when nothing is left."""

import asyncio
from dataclasses import replace

import pytest

from billing.ledger.account import HoldRequest
from billing.ledger.errors import CreditOnHold, InsufficientCredits, UnknownHold
from billing.ledger.extension import GrowingHold
from billing.ledger.ledger import Ledger
from billing.money import Nanos
from tests.support.samples import ACME, MAX_COST, calls, money, request, settlement

PROMPT, TOKEN, STEP = 10_000, 2_000, 8_000
STEPPED = request(step_tokens=4)


async def growing(ledger: Ledger, asked: HoldRequest = STEPPED) -> GrowingHold:
    return GrowingHold(ledger, await ledger.hold(asked), asyncio.create_task)


async def at_rest(ledger: Ledger, hold: GrowingHold, held: int) -> None:
    """Wait until an extension on its way has come to so much, there and here."""
    while hold.held_nanos != held:  # noqa: ASYNC110, the store sends no event
        await asyncio.sleep(0.001)
    assert (await ledger.account(ACME)).held_nanos == held


async def test_more_is_asked_for_when_half_a_step_is_left_and_nothing_waits(ledger: Ledger) -> None:
    await ledger.grant(money(100_000))
    hold = await growing(ledger)
    assert hold.pays(Nanos(PROMPT + 2 * TOKEN))
    assert hold.held_nanos == PROMPT + STEP
    assert hold.pays(Nanos(PROMPT + 3 * TOKEN)), "a token is left"
    await at_rest(ledger, hold, PROMPT + 3 * TOKEN + STEP // 2 + STEP)


async def test_a_hold_ends_at_the_longest_answer_and_asks_no_further(ledger: Ledger) -> None:
    await ledger.grant(money(100_000))
    hold = await growing(ledger)
    assert await hold.grow(Nanos(MAX_COST - TOKEN))
    await at_rest(ledger, hold, MAX_COST)
    assert hold.pays(Nanos(MAX_COST))
    assert not hold.pays(Nanos(MAX_COST + 1))
    assert not await hold.grow(Nanos(MAX_COST + 1))
    assert (hold.held_nanos, hold.refusal) == (MAX_COST, None)


async def test_the_last_credit_is_used_up_before_it_is_refused(ledger: Ledger) -> None:
    await ledger.grant(money(PROMPT + STEP + TOKEN))
    hold = await growing(ledger)
    assert await hold.grow(Nanos(PROMPT + STEP + TOKEN))
    assert not await hold.grow(Nanos(PROMPT + STEP + TOKEN + 1))
    assert hold.held_nanos == PROMPT + STEP + TOKEN


async def test_ended_credit_and_held_credit_are_refused_apart(ledger: Ledger) -> None:
    await ledger.grant(money(PROMPT + STEP))
    await ledger.grant(money(100_000, "payment:2"))
    hold = await growing(ledger)
    other = replace(request("req_2"), max_tokens=45, step_tokens=45)
    await ledger.hold(other)
    assert not await hold.grow(Nanos(PROMPT + STEP + TOKEN))
    assert isinstance(hold.refusal, CreditOnHold)
    await ledger.settle(replace(settlement("req_2", 45)))
    assert not await hold.grow(Nanos(PROMPT + STEP + TOKEN))
    assert isinstance(hold.refusal, InsufficientCredits)


async def test_what_others_give_back_while_the_hold_lasts_is_found(ledger: Ledger) -> None:
    await ledger.grant(money(MAX_COST))
    hold = await growing(ledger)
    await ledger.hold(request("req_2", prompt_tokens=0, max_tokens=16))
    assert hold.pays(Nanos(PROMPT + 3 * TOKEN))
    await asyncio.sleep(0.05)
    assert hold.held_nanos == PROMPT + STEP
    await ledger.void(request("req_2").request_id, ACME)
    while hold.held_nanos == PROMPT + STEP:
        assert hold.pays(Nanos(PROMPT + 3 * TOKEN))
        await asyncio.sleep(0.01)


async def test_a_hold_that_ended_elsewhere_grows_no_more(ledger: Ledger) -> None:
    await ledger.grant(money(100_000))
    hold = await growing(ledger)
    await ledger.settle(settlement())
    assert not await hold.grow(Nanos(PROMPT + STEP + TOKEN))
    assert isinstance(hold.refusal, UnknownHold)


async def test_a_call_pays_for_any_length(ledger: Ledger) -> None:
    await ledger.grant(calls(1))
    assert (await growing(ledger)).pays(Nanos(10**12))


@pytest.mark.parametrize("seconds", [1, 7])
async def test_compute_is_held_by_seconds(ledger: Ledger, seconds: int) -> None:
    price = request().price.model_copy(update={"input_per_1m": Nanos(0), "per_compute_second": Nanos(1_000)})
    timed = request(price=price, max_tokens=0, step_compute_ms=2_000, max_compute_ms=60_000)
    await ledger.grant(money(100_000))
    hold = await growing(ledger, timed)
    assert hold.held_nanos == 2_000
    assert hold.pays(Nanos(1_000 * seconds)) or await hold.grow(Nanos(1_000 * seconds))
