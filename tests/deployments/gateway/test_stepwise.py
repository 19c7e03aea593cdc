"""Holds that grow step by step while a request runs, and answers that end where their credit does."""

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
from tests.support.gateway import PROMPT_NANOS, TOKEN_NANOS, Harness, IsolatedGateway, events
from tests.support.samples import request
from tests.support.scripted import ScriptedLink
from tests.support.waiting import until

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
    """Another request of the same tenant, which holds exactly so much."""
    price = request().price.model_copy(update={"input_per_1m": Nanos(0), "per_request": Nanos(nanos)})
    return replace(request("req_other", price=price, prompt_tokens=0, max_tokens=0))


async def take_all_but(harness: Harness, nanos: int) -> None:
    """Another request holds what is there."""
    await harness.gateway.parts.ledger.hold(other(await harness.balance() - nanos))


async def test_hold_stays_about_a_step_ahead(harness: Harness, link: ScriptedLink) -> None:
    link.length, link.pause_s = 40, 0.005
    task = asyncio.create_task(harness.chat(await harness.tenant(usd="1.00"), stream=True, max_tokens=50))
    most = 0
    while not task.done():
        account = await harness.gateway.parts.ledger.account(ACME)
        generated = max(link.steps.values(), default=0)
        most = max(most, account.held_nanos - PROMPT_NANOS - generated * TOKEN_NANOS)
        await asyncio.sleep(0)
    chunks = events(await task)
    assert (delivered(chunks), chunks[-2]["choices"][0]["finish_reason"]) == (40, "stop")
    assert most <= 2 * STEP * TOKEN_NANOS
    assert "incomplete_details" not in chunks[-1]
    [record] = await harness.records()
    assert (record.status, record.charged_nanos) == (Status.COMPLETE, PROMPT_NANOS + 40 * TOKEN_NANOS)
    assert await harness.balance() == parse_usd("1.00") - PROMPT_NANOS - 40 * TOKEN_NANOS


@pytest.mark.parametrize("stream", [True, False])
async def test_answer_ended_by_credit_says_so(harness: Harness, link: ScriptedLink, stream: bool) -> None:
    link.length, link.pause_s = 59, 0.005
    task = asyncio.create_task(harness.chat(await harness.tenant(usd="1.00"), stream=stream, max_tokens=50))
    await until(lambda: max(link.steps.values(), default=0) >= 3)
    await harness.gateway.parts.ledger.claw_back(Clawback("refund:1", ACME, "test:acme", parse_usd("1.00")))
    reply = await task
    last = events(reply)[-1] if stream else reply.json()
    choice = (events(reply)[-2] if stream else last)["choices"][0]
    assert (reply.status_code, choice["finish_reason"]) == (200, "length")
    assert last["incomplete_details"]["reason"] == "insufficient_credits"
    assert not stream or reply.text.endswith("data: [DONE]\n\n")
    [record] = await harness.records()
    assert (record.status, record.charged_nanos) == (
        Status.COMPLETE,
        PROMPT_NANOS + record.usage.completion_tokens * TOKEN_NANOS,
    )
    assert last["usage"]["completion_tokens"] == record.usage.completion_tokens < 30
    assert not stream or delivered(events(reply)) == record.usage.completion_tokens
    assert last["receipt"]["cost_usd"].startswith(f"{record.charged_nanos / 10**9:.6f}")
    assert link.aborted == [record.request_id]
    assert await harness.balance() == -record.charged_nanos


async def test_answer_clamped_by_balance_says_so(harness: Harness, link: ScriptedLink) -> None:
    link.length = 59
    reply = await harness.chat(await harness.tenant(usd="0.035"), max_tokens=50)
    assert reply.headers["x-farebox-max-tokens"] == "15"
    assert reply.json()["incomplete_details"]["reason"] == "insufficient_credits"
    assert (reply.json()["usage"]["completion_tokens"], await harness.balance()) == (15, 0)


async def test_finished_answer_has_no_incomplete_details(harness: Harness, link: ScriptedLink) -> None:
    reply = await harness.chat(await harness.tenant(usd="0.035"), max_tokens=50)
    assert (reply.headers["x-farebox-max-tokens"], link.length) == ("15", 5)
    assert "incomplete_details" not in reply.json()


async def test_answer_ended_by_credit_on_hold(harness: Harness, link: ScriptedLink) -> None:
    link.length, link.pause_s = 59, 0.005
    task = asyncio.create_task(harness.chat(await harness.tenant(usd="1.00"), stream=True, max_tokens=50))
    await until(lambda: bool(link.steps))
    await take_all_but(harness, 2 * TOKEN_NANOS)
    last = events(await task)[-1]
    assert last["incomplete_details"]["reason"] == "credit_on_hold"
    [record] = await harness.records()
    assert (await harness.gateway.parts.ledger.account(ACME)).balance_nanos < TOKEN_NANOS
    assert record.charged_nanos == PROMPT_NANOS + record.usage.completion_tokens * TOKEN_NANOS


async def test_answer_continues_with_credit_released_in_time(harness: Harness, link: ScriptedLink) -> None:
    link.length, link.pause_s = 30, 0.15
    key = await harness.tenant(usd="1.00")
    task = asyncio.create_task(harness.chat(key, stream=True, max_tokens=50))
    await until(lambda: bool(link.steps))
    await take_all_but(harness, 0)
    await asyncio.sleep(link.pause_s)
    await harness.gateway.parts.ledger.void(RequestId("req_other"), ACME)
    link.pause_s = 0.001
    chunks = events(await task)
    assert (delivered(chunks), "incomplete_details" in chunks[-1]) == (30, False)


async def test_burst_runs_as_many_as_balance_pays_for(harness: Harness, link: ScriptedLink) -> None:
    """Each needs 5 prompt tokens and a step of 4, although each may generate 59."""
    link.length, link.pause_s = 4, 0.2
    key = await harness.tenant(usd="0.130")
    replies = await asyncio.gather(*(harness.chat(key, max_tokens=None) for _ in range(32)))
    assert Counter(reply.status_code for reply in replies) == {200: 10, 429: 22}
    for refused in (reply for reply in replies if reply.status_code == 429):
        assert refused.json()["error"]["code"] == "credit_on_hold"
        assert 1 <= int(refused.headers["retry-after"]) <= 5
    assert await harness.balance() == 0
    refused = await harness.chat(key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (402, "insufficient_credits")


async def test_concurrent_requests_never_overspend(harness: Harness, link: ScriptedLink) -> None:
    link.length, link.pause_s = 20, 0.001
    key = await harness.tenant(usd="0.500")
    replies = await asyncio.gather(*(harness.chat(key, stream=bool(n % 2), max_tokens=59) for n in range(60)))
    found = await harness.records()
    assert {reply.status_code for reply in replies} <= {200, 402, 429}
    assert sum(reply.status_code == 200 for reply in replies) == len(found) >= 10
    for record in found:
        assert record.charged_nanos == record.list_nanos == PROMPT_NANOS + record.usage.completion_tokens * TOKEN_NANOS
    assert await harness.balance() == parse_usd("0.500") - sum(record.charged_nanos for record in found)
    assert await harness.open_holds() == 0


@pytest.mark.prompt
async def test_stream_without_store_ends_with_its_hold(isolated: IsolatedGateway, link: ScriptedLink) -> None:
    harness = isolated.harness
    link.length, link.pause_s = 59, 0.02
    task = asyncio.create_task(harness.chat(await harness.tenant(usd="1.00"), stream=True, max_tokens=50))
    await until(lambda: max(link.steps.values(), default=0) >= 10)
    held = (await harness.gateway.parts.ledger.account(ACME)).held_nanos
    isolated.hang()
    reply = await task
    chunks = events(reply)
    assert chunks[-1]["error"]["code"] == "metering_unavailable"
    assert "[DONE]" not in reply.text
    assert held <= PROMPT_NANOS + delivered(chunks) * TOKEN_NANOS <= held + 2 * STEP * TOKEN_NANOS
    assert harness.gateway.parts.settler.spooled == 1
    isolated.resume()
    await until(lambda: not harness.gateway.parts.settler.spooled)
    [record] = await harness.records()
    assert (record.status, record.usage.completion_tokens) == (Status.FAILED, delivered(chunks))
    assert record.charged_nanos == record.list_nanos == PROMPT_NANOS + delivered(chunks) * TOKEN_NANOS
    assert await harness.balance() == parse_usd("1.00") - record.charged_nanos


@pytest.mark.prompt
async def test_answer_without_store_is_free(isolated: IsolatedGateway, link: ScriptedLink) -> None:
    harness = isolated.harness
    link.length, link.pause_s = 59, 0.02
    task = asyncio.create_task(harness.chat(await harness.tenant(usd="1.00"), max_tokens=50))
    await until(lambda: max(link.steps.values(), default=0) >= 10)
    isolated.hang()
    reply = await task
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "metering_unavailable")
    assert max(link.steps.values()) < 50
    isolated.resume()
    await until(lambda: not harness.gateway.parts.settler.spooled)
    assert await harness.balance() == parse_usd("1.00")


async def test_large_delta_waits_for_extension(harness: Harness, link: ScriptedLink) -> None:
    link.length, link.compute_ms = 3, 20_000
    reply = await harness.chat(await harness.tenant(usd="1.00"), model="metered", max_tokens=50)
    assert reply.json()["usage"]["completion_tokens"] == 3
    assert await harness.balance() == parse_usd("0.40")
