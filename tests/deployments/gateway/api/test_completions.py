"""What a paid request gets: an answer, a receipt, and a record before the answer is complete."""

import httpx
import pytest

from billing.money import parse_usd
from billing.store.keys import shard_for
from billing.usage import TenantId, UsageRecord
from tests.support.gateway import House, events
from tests.support.scripted import ScriptedLink

PROMPT_TOKENS = 5
"""<user> one two three <assistant>"""


async def records(house: House, tenant: str = "acme") -> list[UsageRecord]:
    entries = await house.redis.xrange(shard_for(TenantId(tenant)).stream)
    return [UsageRecord.from_json(fields["p"]) for _, fields in entries if fields["k"] == "usage"]


async def test_an_answer_carries_its_receipt_and_the_balance_falls_by_its_cost(house: House) -> None:
    key = await house.tenant(usd="1.00")
    reply = await house.chat(key)
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
    assert await house.balance() == parse_usd("1.00") - cost
    [record] = await records(house)
    assert record.record_id == receipt["record_id"]
    assert record.charged_nanos == cost


async def test_a_stream_ends_with_usage_and_receipt_and_then_done(house: House) -> None:
    key = await house.tenant()
    reply = await house.chat(key, stream=True)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.text.endswith("data: [DONE]\n\n")
    chunks = events(reply)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == "tok0 tok1 tok2 tok3 tok4 "
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 5
    assert chunks[-1]["receipt"]["cost_usd"] == "0.015000"


async def test_done_is_sent_only_after_the_record_is_stored(house: House) -> None:
    key = await house.tenant()
    seen_at_done: list[int] = []

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body, "more_body": False} if not seen_at_done else await never()

    async def send(message: dict[str, object]) -> None:
        if b"[DONE]" in message.get("body", b""):
            seen_at_done.append(len(await records(house)))

    async def never() -> dict[str, object]:
        raise AssertionError("the request is read once")

    body = b'{"model":"pirate","messages":[{"role":"user","content":"one"}],"stream":true}'
    headers = [(b"authorization", f"Bearer {key}".encode()), (b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "headers": headers,
    }
    await house.app(scope, receive, send)
    assert seen_at_done == [1]


async def test_cached_prompt_tokens_cost_their_own_rate(house: House, link: ScriptedLink) -> None:
    link.cached_tokens = 4
    reply = await house.chat(await house.tenant())
    assert reply.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    assert reply.json()["receipt"]["cost_usd"] == "0.011400"  # 1 new, 4 cached, 5 out


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_both_names_of_the_token_limit_count(house: House, field: str) -> None:
    key = await house.tenant()
    reply = await house.chat(key, **({"max_tokens": None} | {field: 2}))
    assert reply.json()["usage"]["completion_tokens"] == 2
    assert reply.json()["choices"][0]["finish_reason"] == "length"


async def test_without_a_limit_a_chat_may_fill_the_context(house: House, link: ScriptedLink) -> None:
    link.length = 1000
    reply = await house.chat(await house.tenant(), max_tokens=None)
    assert reply.json()["usage"]["total_tokens"] == 64


async def test_max_tokens_is_cut_to_what_the_balance_affords_and_the_reply_says_so(
    house: House, link: ScriptedLink
) -> None:
    link.length = 1000
    reply = await house.chat(await house.tenant(usd="0.011"), max_tokens=50)
    assert reply.headers["x-farebox-max-tokens"] == "3"
    assert reply.json()["usage"]["completion_tokens"] == 3
    assert await house.balance() == 0


@pytest.mark.parametrize("prompt", ["one two three", ["one two three"], [5, 6, 7], [[5, 6, 7]]])
async def test_the_older_endpoint_takes_text_and_token_ids(house: House, prompt: object) -> None:
    key = await house.tenant()
    reply = await house.post(key, "/v1/completions", model="farebox-base", prompt=prompt)
    assert reply.status_code == 200, reply.text
    assert reply.json()["object"] == "text_completion"
    assert reply.json()["choices"][0]["text"] == "tok0 tok1 tok2 tok3 tok4 "
    assert house.link.jobs[-1].prompt_token_ids == (5, 6, 7)
    assert house.link.jobs[-1].adapter is None


async def test_the_older_endpoint_streams(house: House) -> None:
    reply = await house.post(await house.tenant(), "/v1/completions", model="pirate", prompt="one", stream=True)
    chunks = events(reply)
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == "tok0 tok1 tok2 tok3 tok4 "
    assert chunks[-1]["choices"] == []


async def test_the_job_names_the_adapter_by_its_digest_and_the_tenant_only_opaquely(house: House) -> None:
    await house.chat(await house.tenant(), temperature=0, seed=7, stop=["a", "b"], frequency_penalty=0.5)
    [job] = house.link.jobs
    assert job.adapter is not None
    assert (job.adapter.name, job.adapter.digest) == ("pirate", "ab" * 32)
    assert (job.sampling.temperature, job.sampling.seed, job.sampling.stop) == (0, 7, ("a", "b"))
    assert job.fairness_key == "acme"


async def test_a_plan_s_weight_goes_with_the_job(house: House) -> None:
    await house.chat(await house.tenant())
    await house.chat(await house.tenant("heavy", plan="payg"))
    assert [job.fairness_weight for job in house.link.jobs] == [1, 3]


async def test_parts_of_text_and_unknown_fields_are_accepted(house: House) -> None:
    content = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "three"}, {"role": "user", "content": content, "name": "bo"}]
    reply = await house.chat(await house.tenant(), messages=messages, user="u1", store=False, metadata={"a": "b"})
    assert reply.status_code == 200
    assert reply.json()["usage"]["prompt_tokens"] == 6


async def test_a_free_model_runs_without_credit(house: House) -> None:
    reply = await house.chat(await house.tenant(usd="0"), model="gratis")
    assert reply.status_code == 200
    assert reply.json()["receipt"]["cost_usd"] == "0.000000"


async def test_limits_and_what_is_left_of_them_stand_in_headers(house: House) -> None:
    reply = await house.chat(await house.tenant(plan="free", usd="0"))
    assert reply.headers["x-ratelimit-limit-requests"] == "3"
    assert int(reply.headers["x-ratelimit-remaining-requests"]) < 3
    assert reply.headers["x-ratelimit-reset-requests"].endswith("s")
    assert reply.headers["ratelimit-policy"] == '"requests";q=3;w=60;qu="requests"'
    assert reply.headers["ratelimit"] == '"requests";r=2;t=20'


async def test_running_requests_are_extended_in_the_engine_and_renewed_in_the_store(
    house: House, link: ScriptedLink
) -> None:
    link.pause_s = 0.05
    reply = await house.chat(await house.tenant())
    request_id = reply.headers["x-request-id"]
    assert any(request_id in deadlines for deadlines in link.extended)


async def test_models_are_those_that_the_key_may_use(house: House) -> None:
    stranger, owner = await house.tenant("other"), await house.tenant("acme")
    scoped = await house.tenant("scoped", models=("gratis",))

    async def ids(key: str) -> list[str]:
        reply = await house.client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
        return [model["id"] for model in reply.json()["data"]]

    assert await ids(owner) == ["farebox-base", "pirate", "acme/private:1", "metered", "gratis"]
    assert await ids(stranger) == ["farebox-base", "pirate", "gratis"]
    assert await ids(scoped) == ["gratis"]


@pytest.mark.parametrize("path", ["acme/private:1", "acme%2Fprivate%3A1", "acme%2Fprivate:1"])
async def test_one_model_is_found_however_its_id_is_encoded(house: House, path: str) -> None:
    key = await house.tenant("acme")
    reply: httpx.Response = await house.client.get(f"/v1/models/{path}", headers={"authorization": f"Bearer {key}"})
    assert reply.status_code == 200
    assert reply.json()["id"] == "acme/private:1"
    assert reply.json()["parent"] == "farebox-base"


async def test_a_quote_holds_nothing_and_says_what_would_happen(house: House) -> None:
    rich, poor = await house.tenant("rich"), await house.tenant("poor", usd="0.007")
    ask = {"model": "pirate", "messages": [{"role": "user", "content": "one two three"}], "max_tokens": 10}
    quote = (await house.post(rich, "/v1/quote", **ask)).json()
    assert (quote["max_cost_usd"], quote["admitted"], quote["affordable_tokens"]) == ("0.025000", True, 10)
    quote = (await house.post(poor, "/v1/quote", **ask)).json()
    assert (quote["admitted"], quote["affordable_tokens"]) == (True, 1)
    broke = await house.tenant("broke", usd="0")
    quote = (await house.post(broke, "/v1/quote", **ask)).json()
    assert quote["admitted"] is False
    assert quote["refusal"]["code"] == "insufficient_credits"
    assert await house.balance("rich") == parse_usd("1.00")
    assert house.link.jobs == []
