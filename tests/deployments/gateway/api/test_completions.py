"""Chat and text completions: answers, receipts, streams, models and quotes."""

import asyncio

import httpx
import pytest

from billing.money import parse_usd
from tests.support.gateway import Harness, chat_body, events
from tests.support.scripted import ScriptedLink

PROMPT_TOKENS = 5
"""<user> one two three <assistant>"""


async def test_answer_has_receipt_and_is_charged(harness: Harness) -> None:
    key = await harness.tenant(usd="1.00")
    reply = await harness.chat(key)
    assert reply.status_code == 200
    body = reply.json()
    assert body["choices"][0]["message"]["content"] == "tok0 tok1 tok2 tok3 tok4 "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["prompt_tokens"] == PROMPT_TOKENS
    assert body["usage"]["completion_tokens"] == 5
    cost = parse_usd("0.015")  # 5 at $1000 and 5 at $2000 a million
    receipt = body["receipt"]
    assert receipt["cost_usd"] == "0.015000"
    assert receipt["balance_usd"] == "0.985000"
    assert receipt["adapter"] == "pirate@" + "ab" * 6
    assert receipt["record_id"].startswith("rec_req_")
    assert reply.headers["x-farebox-cost"] == "0.015000"
    assert reply.headers["x-farebox-balance"] == "0.985000"
    assert reply.headers["x-request-id"] == receipt["record_id"].removeprefix("rec_")
    assert await harness.balance() == parse_usd("1.00") - cost
    [record] = await harness.records()
    assert record.record_id == receipt["record_id"]
    assert record.charged_nanos == cost


async def test_stream_ends_with_usage_receipt_and_done(harness: Harness) -> None:
    key = await harness.tenant()
    reply = await harness.chat(key, stream=True)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.text.endswith("data: [DONE]\n\n")
    chunks = events(reply)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == "tok0 tok1 tok2 tok3 tok4 "
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 5
    assert chunks[-1]["receipt"]["cost_usd"] == "0.015000"


async def test_done_is_sent_after_record_is_stored(harness: Harness) -> None:
    key = await harness.tenant()
    records_at_done: list[int] = []

    async def never() -> dict[str, object]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, object]) -> None:
        if b"[DONE]" in message.get("body", b""):  # type: ignore[operator]
            records_at_done.append(len(await harness.records()))

    await harness.call(key, chat_body(stream=True), never, send)
    assert records_at_done == [1]


async def test_cached_prompt_tokens_have_own_rate(harness: Harness, link: ScriptedLink) -> None:
    link.cached_tokens = 4
    reply = await harness.chat(await harness.tenant())
    assert reply.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    assert reply.json()["receipt"]["cost_usd"] == "0.011400"  # 1 new, 4 cached, 5 out


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_token_limit_under_both_names(harness: Harness, field: str) -> None:
    key = await harness.tenant()
    reply = await harness.chat(key, **({"max_tokens": None} | {field: 2}))
    assert reply.json()["usage"]["completion_tokens"] == 2
    assert reply.json()["choices"][0]["finish_reason"] == "length"


async def test_chat_without_token_limit_fills_context(harness: Harness, link: ScriptedLink) -> None:
    link.length = 1000
    reply = await harness.chat(await harness.tenant(), max_tokens=None)
    assert reply.json()["usage"]["total_tokens"] == 64


async def test_max_tokens_clamped_to_balance(harness: Harness, link: ScriptedLink) -> None:
    link.length = 1000
    reply = await harness.chat(await harness.tenant(usd="0.011"), max_tokens=50)
    assert reply.headers["x-farebox-max-tokens"] == "3"
    assert reply.json()["usage"]["completion_tokens"] == 3
    assert await harness.balance() == 0


@pytest.mark.parametrize("prompt", ["one two three", ["one two three"], [5, 6, 7], [[5, 6, 7]]])
async def test_text_completion_takes_text_and_token_ids(harness: Harness, prompt: object) -> None:
    key = await harness.tenant()
    reply = await harness.post(key, "/v1/completions", model="farebox-base", prompt=prompt)
    assert reply.status_code == 200, reply.text
    assert reply.json()["object"] == "text_completion"
    assert reply.json()["choices"][0]["text"] == "tok0 tok1 tok2 tok3 tok4 "
    assert harness.link.requests[-1].prompt_token_ids == (5, 6, 7)
    assert harness.link.requests[-1].adapter is None


async def test_text_completion_streams(harness: Harness) -> None:
    reply = await harness.post(await harness.tenant(), "/v1/completions", model="pirate", prompt="one", stream=True)
    chunks = events(reply)
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == "tok0 tok1 tok2 tok3 tok4 "
    assert chunks[-1]["choices"] == []


async def test_generate_request_has_adapter_sampling_and_fairness_key(harness: Harness) -> None:
    await harness.chat(await harness.tenant(), temperature=0, seed=7, stop=["a", "b"], frequency_penalty=0.5)
    [request] = harness.link.requests
    assert request.adapter is not None
    assert (request.adapter.name, request.adapter.digest) == ("pirate", "ab" * 32)
    assert (request.sampling.temperature, request.sampling.seed, request.sampling.stop) == (0, 7, ("a", "b"))
    assert request.fairness_key == "acme"


async def test_generate_request_has_weight_of_plan(harness: Harness) -> None:
    await harness.chat(await harness.tenant())
    await harness.chat(await harness.tenant("heavy", plan="payg"))
    assert [request.fairness_weight for request in harness.link.requests] == [1, 3]


async def test_text_parts_and_unknown_fields_accepted(harness: Harness) -> None:
    content = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "three"}, {"role": "user", "content": content, "name": "bo"}]
    reply = await harness.chat(await harness.tenant(), messages=messages, user="u1", store=False, metadata={"a": "b"})
    assert reply.status_code == 200
    assert reply.json()["usage"]["prompt_tokens"] == 6


async def test_free_model_runs_without_credit(harness: Harness) -> None:
    reply = await harness.chat(await harness.tenant(usd="0"), model="gratis")
    assert reply.status_code == 200
    assert reply.json()["receipt"]["cost_usd"] == "0.000000"


async def test_rate_limit_headers(harness: Harness) -> None:
    reply = await harness.chat(await harness.tenant(plan="free", usd="0"))
    assert reply.headers["x-ratelimit-limit-requests"] == "3"
    assert int(reply.headers["x-ratelimit-remaining-requests"]) < 3
    assert reply.headers["x-ratelimit-reset-requests"].endswith("s")
    assert reply.headers["ratelimit-policy"] == '"requests";q=3;w=60;qu="requests"'
    assert reply.headers["ratelimit"] == '"requests";r=2;t=20'


async def test_deadlines_of_running_requests_are_extended(harness: Harness, link: ScriptedLink) -> None:
    link.pause_s = 0.05
    reply = await harness.chat(await harness.tenant())
    request_id = reply.headers["x-request-id"]
    assert any(request_id in deadlines for deadlines in link.extended)


async def test_models_are_those_the_key_may_use(harness: Harness) -> None:
    stranger, owner = await harness.tenant("other"), await harness.tenant("acme")
    scoped = await harness.tenant("scoped", models=("gratis",))

    async def ids(key: str) -> list[str]:
        reply = await harness.client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
        return [model["id"] for model in reply.json()["data"]]

    assert await ids(owner) == ["farebox-base", "pirate", "acme/private:1", "metered", "gratis"]
    assert await ids(stranger) == ["farebox-base", "pirate", "gratis"]
    assert await ids(scoped) == ["gratis"]


@pytest.mark.parametrize("path", ["acme/private:1", "acme%2Fprivate%3A1", "acme%2Fprivate:1"])
async def test_model_found_however_id_is_encoded(harness: Harness, path: str) -> None:
    key = await harness.tenant("acme")
    reply: httpx.Response = await harness.client.get(f"/v1/models/{path}", headers={"authorization": f"Bearer {key}"})
    assert reply.status_code == 200
    assert reply.json()["id"] == "acme/private:1"
    assert reply.json()["parent"] == "farebox-base"


async def test_quote_holds_nothing(harness: Harness) -> None:
    rich, poor = await harness.tenant("rich"), await harness.tenant("poor", usd="0.007")
    ask = {"model": "pirate", "messages": [{"role": "user", "content": "one two three"}], "max_tokens": 10}
    quote = (await harness.post(rich, "/v1/quote", **ask)).json()
    assert (quote["max_cost_usd"], quote["admitted"], quote["affordable_tokens"]) == ("0.025000", True, 10)
    quote = (await harness.post(poor, "/v1/quote", **ask)).json()
    assert (quote["admitted"], quote["affordable_tokens"]) == (True, 1)
    broke = await harness.tenant("broke", usd="0")
    quote = (await harness.post(broke, "/v1/quote", **ask)).json()
    assert quote["admitted"] is False
    assert quote["refusal"]["code"] == "insufficient_credits"
    assert await harness.balance("rich") == parse_usd("1.00")
    assert harness.link.requests == []
