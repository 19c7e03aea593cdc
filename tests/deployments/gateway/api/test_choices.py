"""Several answers to one request, and log-probabilities, in OpenAI's shapes."""

import pytest
from openai import AsyncOpenAI

from billing.money import parse_usd
from tests.support.gateway import Harness, events

FIVE = "tok0 tok1 tok2 tok3 tok4 "
THREE_TIMES = [FIVE, FIVE.replace("tok", "1tok"), FIVE.replace("tok", "2tok")]


def _client(harness: Harness, key: str) -> AsyncOpenAI:
    return AsyncOpenAI(api_key=key, base_url="http://farebox/v1", http_client=harness.client)


def _asked() -> dict[str, object]:
    return {"model": "pirate", "messages": [{"role": "user", "content": "one two three"}], "max_tokens": 10}


async def test_each_answer_is_billed_and_prompt_once(harness: Harness) -> None:
    key = await harness.tenant(usd="1.00")
    reply = await _client(harness, key).chat.completions.create(**_asked(), n=3)  # type: ignore[call-overload]
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert [choice.message.content for choice in reply.choices] == [
        FIVE,
        FIVE.replace("tok", "1tok"),
        FIVE.replace("tok", "2tok"),
    ]
    assert {choice.finish_reason for choice in reply.choices} == {"stop"}
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (5, 15)
    assert await harness.balance() == parse_usd("1.00") - parse_usd("0.035")  # 5 at $1000, 15 at $2000 a million


async def test_stream_of_several_answers_has_indexes(harness: Harness) -> None:
    key = await harness.tenant(usd="1.00")
    texts = dict.fromkeys(range(3), "")
    reasons: dict[int, list[str]] = {0: [], 1: [], 2: []}
    stream = await _client(harness, key).chat.completions.create(**_asked(), n=3, stream=True)  # type: ignore[call-overload]
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] += [choice.finish_reason] if choice.finish_reason else []
    assert list(texts.values()) == THREE_TIMES
    assert reasons == {0: ["stop"], 1: ["stop"], 2: ["stop"]}


async def test_hold_covers_all_answers(harness: Harness) -> None:
    key = await harness.tenant(usd="0.100")
    reply = await harness.chat(key, n=4, max_tokens=40, stream=True)
    assert reply.headers["x-farebox-max-tokens"] == "11"  # $0.095 for output affords 47 tokens
    assert harness.link.requests[0].sampling.max_tokens == 11
    assert await harness.balance() >= 0


async def test_answers_ended_by_credit_say_so_once(harness: Harness) -> None:
    key = await harness.tenant(usd="0.009")  # the prompt and two tokens
    harness.link.length = 8
    reply = await harness.chat(key, n=3, max_tokens=8, stream=True)
    ends = [
        (choice["index"], choice["finish_reason"])
        for chunk in events(reply)
        for choice in chunk.get("choices", [])
        if choice["finish_reason"]
    ]
    assert ends == [(0, "length"), (1, "length"), (2, "length")]
    assert await harness.balance() >= 0


async def test_answers_clamped_by_balance_say_so(harness: Harness) -> None:
    harness.link.length = 40
    reply = await harness.chat(await harness.tenant(usd="0.100"), n=4, max_tokens=40)
    assert reply.headers["x-farebox-max-tokens"] == "11"  # of 47 that are affordable, three are left
    assert {choice["finish_reason"] for choice in reply.json()["choices"]} == {"length"}
    assert reply.json()["incomplete_details"]["reason"] == "insufficient_credits"


async def test_chat_logprobs(harness: Harness) -> None:
    key = await harness.tenant(usd="1.00")
    asked = _asked() | {"logprobs": True, "top_logprobs": 2}
    reply = await _client(harness, key).chat.completions.create(**asked)  # type: ignore[call-overload]
    content = reply.choices[0].logprobs.content
    assert [token.token for token in content] == ["<unk>", "<end>", "<user>", "<system>", "<assistant>"]
    assert [bytes(token.bytes).decode() for token in content] == [token.token for token in content]
    assert {token.logprob for token in content} == {-0.5}
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("<unk>", -0.5), ("<end>", -1.5)]
    assert reply.choices[0].message.content == FIVE


async def test_text_logprobs(harness: Harness) -> None:
    key = await harness.tenant(usd="1.00")
    client = _client(harness, key)
    reply = await client.completions.create(model="pirate", prompt="one two", max_tokens=10, logprobs=1)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["<unk>", "<end>", "<user>", "<system>", "<assistant>"]
    assert logprobs.token_logprobs == [-0.5] * 5
    assert logprobs.top_logprobs == [{"<unk>": -0.5}] * 5
    assert logprobs.text_offset == [0, 5, 10, 16, 24]


async def test_no_logprobs_unless_asked_for(harness: Harness) -> None:
    key = await harness.tenant(usd="1.00")
    assert (await harness.chat(key)).json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("stream", [True, False])
async def test_several_answers_are_repeated_with_idempotency_key(harness: Harness, stream: bool) -> None:
    key = await harness.tenant(usd="1.00")
    asked = _asked() | {"n": 2, "logprobs": True, "top_logprobs": 1, "stream": stream}
    headers = {"authorization": f"Bearer {key}", "idempotency-key": "once"}
    replies = []
    for _ in range(2):
        replies.append(await harness.client.post("/v1/chat/completions", json=asked, headers=headers))
        await harness.settled()
    assert replies[0].status_code == replies[1].status_code == 200
    assert replies[0].text == replies[1].text
    assert len(harness.link.requests) == 1


async def test_biases_and_min_tokens_reach_engine(harness: Harness) -> None:
    key = await harness.tenant(usd="1.00")
    asked = _asked() | {"logit_bias": {"5": -100, "7": 1.5}, "extra_body": {"min_tokens": 3}}
    await _client(harness, key).chat.completions.create(**asked)  # type: ignore[call-overload]
    sampling = harness.link.requests[0].sampling
    assert dict(sampling.logit_bias) == {5: -100.0, 7: 1.5}
    assert sampling.min_tokens == 3
