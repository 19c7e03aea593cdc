"""Credit is held step by step while a request runs, and an answer ends where its credit does."""

import asyncio
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from billing.ledger.account import Clawback, HoldRequest
from billing.money import Nanos, parse_usd
from billing.usage import RequestId, Status, TenantId
from deployments.config import FareboxArgs
from tests.deployments.gateway.api.test_completions import records
from tests.deployments.gateway.test_endings import ONE, PROMPT, Fragile, fragile
from tests.support.gateway import House, events, until
from tests.support.samples import request
from tests.support.scripted import ScriptedLink

__all__ = ["fragile"]
ACME = TenantId("acme")
STEP = 4


@pytest.fixture
def args(tmp_path: Path) -> FareboxArgs:
    return FareboxArgs.model_validate(
        {
            "model": {"id": "farebox-base", "path": "unused"},
            "engine": {"max_context_tokens": 64},
            "spool_dir": str(tmp_path / "spool"),
            "checkpoint_s": 0.05,
            "hold_step_tokens": STEP,
        }
    )


def delivered(chunks: list[dict[str, object]]) -> int:
    return sum(re.search(r"tok\d", str(chunk)) is not None for chunk in chunks)


def other(nanos: int) -> HoldRequest:
    """A request of the same tenant that holds exactly so much."""
    price = request().price.model_copy(update={"input_per_1m": Nanos(0), "per_request": Nanos(nanos)})
    return replace(request("req_other", price=price, prompt_tokens=0, max_tokens=0))


async def take_all_but(house: House, nanos: int) -> None:
    """Another request holds what is there."""
    await house.services.ledger.hold(other(await house.balance() - nanos))


async def test_a_hold_begins_with_a_step_and_stays_about_a_step_ahead(house: House, link: ScriptedLink) -> None:
    link.length, link.pause_s = 40, 0.005
    task = asyncio.create_task(house.chat(await house.tenant(usd="1.00"), stream=True, max_tokens=50))
    most = 0
    while not task.done():
        account = await house.services.ledger.account(ACME)
        generated = max(link.steps.values(), default=0)
        most = max(most, account.held_nanos - PROMPT - generated * ONE)
        await asyncio.sleep(0)
    chunks = events(await task)
    assert (delivered(chunks), chunks[-2]["choices"][0]["finish_reason"]) == (40, "stop")
    assert most <= 2 * STEP * ONE
    assert "incomplete_details" not in chunks[-1]
    [record] = await records(house)
    assert (record.status, record.charged_nanos) == (Status.COMPLETE, PROMPT + 40 * ONE)
    assert await house.balance() == parse_usd("1.00") - PROMPT - 40 * ONE


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_whose_money_ends_says_so_and_ends_cleanly(
    house: House, link: ScriptedLink, stream: bool
) -> None:
    link.length, link.pause_s = 59, 0.005
    task = asyncio.create_task(house.chat(await house.tenant(usd="1.00"), stream=stream, max_tokens=50))
    await until(lambda: max(link.steps.values(), default=0) >= 3)
    await house.services.ledger.claw_back(Clawback("refund:1", ACME, "test:acme", parse_usd("1.00")))
    reply = await task
    last = events(reply)[-1] if stream else reply.json()
    choice = (events(reply)[-2] if stream else last)["choices"][0]
    assert (reply.status_code, choice["finish_reason"]) == (200, "length")
    assert last["incomplete_details"]["reason"] == "insufficient_credits"
    assert not stream or reply.text.endswith("data: [DONE]\n\n")
    [record] = await records(house)
    assert (record.status, record.charged_nanos) == (Status.COMPLETE, PROMPT + record.usage.completion_tokens * ONE)
    assert last["usage"]["completion_tokens"] == record.usage.completion_tokens < 30
    assert not stream or delivered(events(reply)) == record.usage.completion_tokens
    assert last["receipt"]["cost_usd"].startswith(f"{record.charged_nanos / 10**9:.6f}")
    assert link.aborted == [record.request_id]
    assert await house.balance() == -record.charged_nanos


async def test_an_answer_that_the_balance_cuts_short_says_so(house: House, link: ScriptedLink) -> None:
    link.length = 59
    reply = await house.chat(await house.tenant(usd="0.035"), max_tokens=50)
    assert reply.headers["x-farebox-max-tokens"] == "15"
    assert reply.json()["incomplete_details"]["reason"] == "insufficient_credits"
    assert (reply.json()["usage"]["completion_tokens"], await house.balance()) == (15, 0)


async def test_an_answer_that_ends_by_itself_has_nothing_missing(house: House, link: ScriptedLink) -> None:
    reply = await house.chat(await house.tenant(usd="0.035"), max_tokens=50)
    assert (reply.headers["x-farebox-max-tokens"], link.length) == ("15", 5)
    assert "incomplete_details" not in reply.json()


async def test_credit_that_only_others_hold_ends_an_answer_by_its_name(house: House, link: ScriptedLink) -> None:
    link.length, link.pause_s = 59, 0.005
    task = asyncio.create_task(house.chat(await house.tenant(usd="1.00"), stream=True, max_tokens=50))
    await until(lambda: bool(link.steps))
    await take_all_but(house, 2 * ONE)
    last = events(await task)[-1]
    assert last["incomplete_details"]["reason"] == "credit_on_hold"
    [record] = await records(house)
    assert (await house.services.ledger.account(ACME)).balance_nanos < ONE
    assert record.charged_nanos == PROMPT + record.usage.completion_tokens * ONE


async def test_credit_that_others_give_back_in_time_carries_an_answer_to_its_end(
    house: House, link: ScriptedLink
) -> None:
    link.length, link.pause_s = 30, 0.15
    key = await house.tenant(usd="1.00")
    task = asyncio.create_task(house.chat(key, stream=True, max_tokens=50))
    await until(lambda: bool(link.steps))
    await take_all_but(house, 0)
    await asyncio.sleep(link.pause_s)
    await house.services.ledger.void(RequestId("req_other"), ACME)
    link.pause_s = 0.001
    chunks = events(await task)
    assert (delivered(chunks), "incomplete_details" in chunks[-1]) == (30, False)


async def test_a_burst_on_a_small_balance_runs_as_many_as_it_pays_for(house: House, link: ScriptedLink) -> None:
    """Each needs 5 prompt tokens and a step of 4, although each may generate 59."""
    link.length, link.pause_s = 4, 0.2
    key = await house.tenant(usd="0.130")
    replies = await asyncio.gather(*(house.chat(key, max_tokens=None) for _ in range(32)))
    assert Counter(reply.status_code for reply in replies) == {200: 10, 429: 22}
    for refused in (reply for reply in replies if reply.status_code == 429):
        assert refused.json()["error"]["code"] == "credit_on_hold"
        assert 1 <= int(refused.headers["retry-after"]) <= 5
    assert await house.balance() == 0
    refused = await house.chat(key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (402, "insufficient_credits")


async def test_many_at_once_never_spend_more_than_there_is(house: House, link: ScriptedLink) -> None:
    link.length, link.pause_s = 20, 0.001
    key = await house.tenant(usd="0.500")
    replies = await asyncio.gather(*(house.chat(key, stream=bool(n % 2), max_tokens=59) for n in range(60)))
    found = await records(house)
    assert {reply.status_code for reply in replies} <= {200, 402, 429}
    assert sum(reply.status_code == 200 for reply in replies) == len(found) >= 10
    for record in found:
        assert record.charged_nanos == record.list_nanos == PROMPT + record.usage.completion_tokens * ONE
    assert await house.balance() == parse_usd("0.500") - sum(record.charged_nanos for record in found)
    assert await house.open_holds() == 0


@pytest.mark.prompt
async def test_a_stream_outlives_the_store_to_the_end_of_what_it_holds(fragile: Fragile, link: ScriptedLink) -> None:
    house = fragile.house
    link.length, link.pause_s = 59, 0.02
    task = asyncio.create_task(house.chat(await house.tenant(usd="1.00"), stream=True, max_tokens=50))
    await until(lambda: max(link.steps.values(), default=0) >= 10)
    held = (await house.services.ledger.account(ACME)).held_nanos
    fragile.hang()
    reply = await task
    chunks = events(reply)
    assert chunks[-1]["error"]["code"] == "metering_unavailable"
    assert "[DONE]" not in reply.text
    assert held <= PROMPT + delivered(chunks) * ONE <= held + 2 * STEP * ONE
    assert house.services.gateway.settler.spooled == 1
    fragile.resume()
    await until(lambda: not house.services.gateway.settler.spooled)
    [record] = await records(house)
    assert (record.status, record.usage.completion_tokens) == (Status.FAILED, delivered(chunks))
    assert record.charged_nanos == record.list_nanos == PROMPT + delivered(chunks) * ONE
    assert await house.balance() == parse_usd("1.00") - record.charged_nanos


@pytest.mark.prompt
async def test_an_answer_that_cannot_be_extended_for_want_of_the_store_is_free(
    fragile: Fragile, link: ScriptedLink
) -> None:
    house = fragile.house
    link.length, link.pause_s = 59, 0.02
    task = asyncio.create_task(house.chat(await house.tenant(usd="1.00"), max_tokens=50))
    await until(lambda: max(link.steps.values(), default=0) >= 10)
    fragile.hang()
    reply = await task
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "metering_unavailable")
    assert max(link.steps.values()) < 50
    fragile.resume()
    await until(lambda: not house.services.gateway.settler.spooled)
    assert await house.balance() == parse_usd("1.00")


async def test_a_piece_of_many_tokens_waits_for_its_credit(house: House, link: ScriptedLink) -> None:
    link.length, link.compute_ms = 3, 20_000
    reply = await house.chat(await house.tenant(usd="1.00"), model="metered", max_tokens=50)
    assert reply.json()["usage"]["completion_tokens"] == 3
    assert await house.balance() == parse_usd("0.40")
