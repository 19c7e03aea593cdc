"""A request that is sent again with its ``Idempotency-Key`` gets the same answer, and is run and charged once."""

import asyncio

import httpx
import openai
import pytest

from billing.ledger.account import Grant
from billing.ledger.answers import MAX_ANSWER_BYTES
from billing.money import parse_usd
from billing.store.keys import shard_for
from billing.tenants.tenant import new_key
from billing.usage import Status, TenantId, Unit
from deployments.inference.request import EngineFailed, FinishReason, GenerateRequest, OutputDelta, Overloaded
from deployments.token_stream.errors import ReplicaLost
from tests.support.gateway import Harness, IsolatedGateway, assert_problem, bearer, chat_body, events
from tests.support.scripted import ScriptedLink
from tests.support.waiting import until

COST = parse_usd("0.015")
ONE_USD = parse_usd("1.00")
Body = dict[str, object]


async def send(
    harness: Harness, key: str, name: str | None = "k-1", path: str = "/v1/chat/completions", **more: object
) -> httpx.Response:
    body = {"model": "pirate", "prompt": "one two three"} | more if path == "/v1/completions" else chat_body(**more)
    headers = bearer(key) | ({} if name is None else {"idempotency-key": name})
    reply = await harness.client.post(path, json=body, headers=headers)
    await harness.settled()
    return reply


class TestRepeat:
    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
    async def test_answer_and_receipt_are_the_same(self, harness: Harness, path: str) -> None:
        key = await harness.tenant(usd="1.00")
        first, again = [await send(harness, key, path=path) for _ in range(2)]
        assert first.status_code == again.status_code == 200
        assert again.json() == first.json()
        assert "idempotent-replayed" not in first.headers
        assert again.headers["idempotent-replayed"] == "true"
        for name in ("x-farebox-cost", "x-farebox-balance", "x-farebox-max-tokens"):
            assert again.headers[name] == first.headers[name]
        assert again.headers["x-request-id"] != first.headers["x-request-id"]
        assert len(harness.link.requests) == len(await harness.records()) == 1

    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
    async def test_stream_is_the_same(self, harness: Harness, path: str) -> None:
        key = await harness.tenant(usd="1.00")
        first, again = [await send(harness, key, path=path, stream=True) for _ in range(2)]
        assert again.headers["content-type"] == first.headers["content-type"]
        assert again.headers["idempotent-replayed"] == "true"
        assert again.text == first.text
        assert again.text.endswith("data: [DONE]\n\n")
        assert len(harness.link.requests) == len(await harness.records()) == 1

    async def test_receipt_keeps_price_and_balance(self, harness: Harness) -> None:
        key = await harness.tenant(usd="1.00")
        first = await send(harness, key)
        await harness.chat(key)
        again = await send(harness, key)
        assert again.json()["receipt"] == first.json()["receipt"]
        assert await harness.balance() == ONE_USD - 2 * COST

    @pytest.mark.parametrize("stream", [False, True])
    async def test_incomplete_details_are_repeated(self, harness: Harness, link: ScriptedLink, stream: bool) -> None:
        link.length = 50
        key = await harness.tenant(usd="0.011")
        first, again = [await send(harness, key, max_tokens=50, stream=stream) for _ in range(2)]
        assert "incomplete_details" in first.text
        assert again.text == first.text

    async def test_repeat_needs_no_credit(self, harness: Harness) -> None:
        key = await harness.tenant(usd="0.015")
        assert [(await send(harness, key, max_tokens=5)).status_code for _ in range(3)] == [200, 200, 200]
        assert await harness.balance() == 0

    async def test_body_compared_by_content(self, harness: Harness) -> None:
        key = await harness.tenant()
        headers = bearer(key) | {"idempotency-key": "k", "content-type": "application/json"}
        one = b'{"model":"pirate","messages":[{"role":"user","content":"one"}]}'
        two = b'{ "messages": [{"content": "\\u006fne", "role": "user"}], "model": "pirate" }'
        replies = [
            await harness.client.post("/v1/chat/completions", content=raw, headers=headers) for raw in (one, two)
        ]
        assert [reply.status_code for reply in replies] == [200, 200]
        assert len(harness.link.requests) == 1

    @pytest.mark.parametrize(
        "change", [{"max_tokens": 9}, {"stream": True}, {"seed": 1}, {"user": "someone"}, {"path": "/v1/completions"}]
    )
    async def test_refused_with_another_body(self, harness: Harness, change: Body) -> None:
        key = await harness.tenant()
        await send(harness, key)
        assert_problem(await send(harness, key, **change), 422, "idempotency_key_reused")  # type: ignore[arg-type]
        assert len(harness.link.requests) == 1

    async def test_no_repeat_without_key(self, harness: Harness) -> None:
        key = await harness.tenant(usd="1.00")
        await send(harness, key, None)
        await send(harness, key, None)
        await send(harness, key, "k-2")
        assert len(harness.link.requests) == 3
        assert await harness.balance() == ONE_USD - 3 * COST


class TestKey:
    async def test_key_belongs_to_tenant(self, harness: Harness) -> None:
        acme, other = await harness.tenant("acme"), await harness.tenant("other")
        second, stored = new_key(TenantId("acme"), 0)
        await harness.gateway.parts.tenants.add_key(stored)
        first = await send(harness, acme)
        assert (await send(harness, second)).json() == first.json()
        theirs = await send(harness, other)
        assert theirs.json()["id"] != first.json()["id"]
        assert await harness.balance("other") == ONE_USD - COST

    async def test_key_does_not_bypass_scope_of_api_key(self, harness: Harness) -> None:
        scoped, stored = new_key(TenantId("acme"), 0, models=("gratis",))
        await send(harness, await harness.tenant())
        await harness.gateway.parts.tenants.add_key(stored)
        assert_problem(await send(harness, scoped), 403, "model_not_allowed")

    @pytest.mark.parametrize("name", ["", " ", "two words", "tab\tbed", "ü", "x" * 256])
    async def test_ambiguous_key_refused(self, harness: Harness, name: str) -> None:
        headers = [(b"authorization", f"Bearer {await harness.tenant()}".encode()), (b"idempotency-key", name.encode())]
        reply = await harness.client.post("/v1/chat/completions", json=chat_body(), headers=headers)
        body = assert_problem(reply, 400, "invalid_request")
        assert "Idempotency-Key" in str(body["detail"])
        assert harness.link.requests == []

    async def test_key_sent_twice_refused(self, harness: Harness) -> None:
        headers = [
            ("authorization", f"Bearer {await harness.tenant()}"),
            ("idempotency-key", "a"),
            ("idempotency-key", "b"),
        ]
        assert_problem(
            await harness.client.post("/v1/chat/completions", json=chat_body(), headers=headers), 400, "invalid_request"
        )

    @pytest.mark.parametrize("name", ["x" * 255, "!", "~", '"8e03978e-40d5-43dd-bc93-6894a57f9324"'])
    async def test_printable_key_accepted(self, harness: Harness, name: str) -> None:
        key = await harness.tenant()
        assert [(await send(harness, key, name)).status_code for _ in range(2)] == [200, 200]
        assert len(harness.link.requests) == 1

    async def test_key_not_used_by_malformed_request(self, harness: Harness) -> None:
        key = await harness.tenant()
        assert_problem(await send(harness, key, temperature=9), 400, "invalid_request")
        assert (await send(harness, key)).status_code == 200


class TestWhileRunning:
    @pytest.mark.parametrize("stream", [False, True])
    async def test_repeat_refused_with_retry_after(self, harness: Harness, link: ScriptedLink, stream: bool) -> None:
        link.length, link.pause_s = 10, 0.03
        key = await harness.tenant(usd="1.00")
        task = asyncio.create_task(send(harness, key, stream=stream))
        await until(lambda: bool(link.steps))
        reply = await harness.client.post(
            "/v1/chat/completions", json=chat_body(stream=stream), headers=bearer(key) | {"idempotency-key": "k-1"}
        )
        assert_problem(reply, 409, "idempotency_key_in_use")
        assert int(reply.headers["retry-after"]) >= 1
        assert "x-should-retry" not in reply.headers
        assert (await task).status_code == 200
        assert (await send(harness, key, stream=stream)).headers["idempotent-replayed"] == "true"

    async def test_one_of_many_runs(self, harness: Harness, link: ScriptedLink) -> None:
        link.pause_s = 0.01
        key = await harness.tenant(usd="1.00")
        replies = await asyncio.gather(*(send(harness, key) for _ in range(30)))
        assert {reply.status_code for reply in replies} <= {200, 409}
        assert len(link.requests) == 1
        assert await harness.balance() == ONE_USD - COST

    @pytest.mark.parametrize("stream", [False, True])
    async def test_request_that_lost_its_key_is_free(self, harness: Harness, link: ScriptedLink, stream: bool) -> None:
        link.pause_s = 0.05
        key = await harness.tenant(usd="1.00")
        task = asyncio.create_task(send(harness, key, stream=stream))
        await until(lambda: bool(link.requests))
        [name] = [name async for name in harness.redis.scan_iter("*:answer:*")]
        await harness.redis.hset(name, "request", "req_another")
        reply = await task
        assert_problem(reply, 409, "idempotency_key_in_use")
        assert "tok" not in reply.text
        assert (await harness.balance(), await harness.open_holds()) == (ONE_USD, 0)


class TestFailure:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("failure", "fails_at"),
        [(Overloaded("full"), 0), (ReplicaLost("gone"), 0), (EngineFailed("broke"), 0), (RuntimeError("a bug"), 0)],
    )
    async def test_failure_before_first_token_frees_key(
        self, harness: Harness, link: ScriptedLink, failure: Exception, fails_at: int, stream: bool
    ) -> None:
        link.failure, link.fails_at = failure, fails_at
        key = await harness.tenant(usd="1.00")
        assert (await send(harness, key, stream=stream)).status_code >= 500
        link.failure = None
        reply = await send(harness, key, stream=stream)
        assert (reply.status_code, "idempotent-replayed" in reply.headers) == (200, False)
        assert await harness.balance() == ONE_USD - COST

    async def test_failed_answer_is_free_and_frees_key(self, harness: Harness, link: ScriptedLink) -> None:
        link.failure, link.fails_at = ReplicaLost("gone"), 3
        key = await harness.tenant(usd="1.00")
        assert_problem(await send(harness, key), 503, "replica_lost")
        link.failure = None
        assert (await send(harness, key)).status_code == 200
        assert await harness.balance() == ONE_USD - COST

    async def test_failed_stream_is_charged_once_and_not_repeated(self, harness: Harness, link: ScriptedLink) -> None:
        link.failure, link.fails_at = ReplicaLost("gone"), 3
        key = await harness.tenant(usd="1.00")
        first = await send(harness, key, stream=True)
        assert events(first)[-1]["error"]["code"] == "replica_lost"  # type: ignore[index]
        link.failure = None
        again = await send(harness, key, stream=True)
        [record] = await harness.records()
        assert assert_problem(again, 409, "idempotency_answer_incomplete")["record_id"] == record.record_id
        assert again.headers["x-should-retry"] == "false"
        assert record.charged_nanos > 0
        assert (await send(harness, key, "k-2", stream=True)).status_code == 200

    async def test_missing_credit_frees_key(self, harness: Harness) -> None:
        key = await harness.tenant(usd="0")
        assert_problem(await send(harness, key), 402, "insufficient_credits")
        await harness.gateway.parts.ledger.grant(Grant("test:more", TenantId("acme"), Unit.NANOS, int(ONE_USD)))
        assert (await send(harness, key)).status_code == 200

    async def test_rate_limit_frees_key(self, harness: Harness) -> None:
        key = await harness.tenant(plan="free", usd="0")
        for number in range(3):
            await send(harness, key, f"k-{number}")
        assert_problem(await send(harness, key, "k-4"), 429, "rate_limit_exceeded")
        assert len([name async for name in harness.redis.scan_iter("*:answer:*")]) == 3

    @pytest.mark.parametrize("stream", [False, True])
    async def test_disconnected_client_is_charged_once(
        self, harness: Harness, link: ScriptedLink, stream: bool
    ) -> None:
        link.length, link.pause_s = 10, 0.02
        key = await harness.tenant(usd="1.00")
        task = asyncio.create_task(send(harness, key, stream=stream))
        await until(lambda: max(link.steps.values(), default=0) >= 3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: not harness.gateway.running)
        await harness.settled()
        [record] = await harness.records()
        assert record.charged_nanos > 0
        reply = await send(harness, key, stream=stream)
        if record.status is Status.CANCELLED:
            assert_problem(reply, 409, "idempotency_answer_incomplete")
        assert [r.charged_nanos for r in await harness.records()] == [record.charged_nanos]

    async def test_disconnect_before_hold_frees_key(self, harness: Harness) -> None:
        key = await harness.tenant(usd="1.00")
        task = asyncio.create_task(send(harness, key))
        while not harness.gateway.parts.settler.tasks:  # noqa: ASYNC110, no event marks this moment
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await harness.settled()
        assert (await send(harness, key)).status_code == 200
        assert await harness.balance() == ONE_USD - COST


class WordyLink(ScriptedLink):
    """A link whose tokens are long."""

    async def generate(self, request: GenerateRequest):  # type: ignore[no-untyped-def, override]
        self.requests.append(request)
        for number in (1, 2):
            reason = FinishReason.STOP if number == 2 else None
            text = "x" * (MAX_ANSWER_BYTES // 2 + 1)
            yield OutputDelta((number,), text, len(request.prompt_token_ids), 0, number, 1, reason)


class TestTooLargeAnswer:
    @pytest.fixture
    def link(self) -> ScriptedLink:
        return WordyLink()

    @pytest.mark.parametrize("stream", [False, True])
    async def test_delivered_once_and_repeat_names_record(self, harness: Harness, stream: bool) -> None:
        key = await harness.tenant(usd="1.00")
        assert (await send(harness, key, stream=stream)).status_code == 200
        again = await send(harness, key, stream=stream)
        [record] = await harness.records()
        assert assert_problem(again, 409, "idempotency_answer_too_large")["record_id"] == record.record_id
        assert again.headers["x-should-retry"] == "false"
        assert len(harness.link.requests) == 1


@pytest.mark.prompt
class TestHungStore:
    async def test_request_refused_and_key_not_blocked(self, isolated: IsolatedGateway) -> None:
        harness = isolated.harness
        key = await harness.tenant(usd="1.00")
        isolated.hang()
        assert_problem(
            await harness.client.post(
                "/v1/chat/completions", json=chat_body(), headers=bearer(key) | {"idempotency-key": "k-1"}
            ),
            503,
            "metering_unavailable",
        )
        isolated.resume()
        await harness.settled()
        assert len(harness.link.requests) == 0

    @pytest.mark.parametrize("stream", [False, True])
    async def test_answer_charged_once(self, isolated: IsolatedGateway, link: ScriptedLink, stream: bool) -> None:
        harness = isolated.harness
        key = await harness.tenant(usd="1.00")
        link.length, link.pause_s = 10, 0.03
        task = asyncio.create_task(send(harness, key, stream=stream))
        await until(lambda: max(link.steps.values(), default=0) >= 3)
        isolated.hang()
        reply = await task
        assert "metering_unavailable" in reply.text
        isolated.resume()
        await until(lambda: not harness.gateway.parts.settler.spooled)
        again = await send(harness, key, stream=stream)
        if again.status_code != 200:  # it was delivered, and could not be staged in time
            assert stream
            assert_problem(again, 409, "idempotency_answer_incomplete")
        charges = [record.charged_nanos for record in await harness.records() if record.charged_nanos]
        assert charges == [parse_usd("0.005") + 10 * parse_usd("0.002")]


class TestOpenAiSdk:
    def client(self, harness: Harness, key: str, retries: int = 0) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            api_key=key, base_url="http://farebox/v1", http_client=harness.client, max_retries=retries
        )

    async def test_sdk_gets_same_completion_and_stream(self, harness: Harness) -> None:
        client = self.client(harness, await harness.tenant(usd="1.00"))
        ask = {"model": "pirate", "messages": [{"role": "user", "content": "one"}]}
        one, two = [
            await client.chat.completions.create(**ask, extra_headers={"Idempotency-Key": "a"})  # type: ignore[call-overload]
            for _ in range(2)
        ]
        assert one == two
        texts = []
        for _ in range(2):
            stream = await client.chat.completions.create(
                **ask,
                stream=True,
                extra_headers={"Idempotency-Key": "b"},  # type: ignore[call-overload]
            )
            texts.append([chunk.model_dump_json() async for chunk in stream])
        assert texts[0] == texts[1]
        assert len(harness.link.requests) == 2

    async def test_sdk_retries_until_answered(self, harness: Harness, link: ScriptedLink) -> None:
        link.pause_s = 0.1
        client = self.client(harness, await harness.tenant(usd="1.00"), retries=2)

        async def ask() -> str | None:
            reply = await client.chat.completions.create(
                model="pirate", messages=[{"role": "user", "content": "one"}], extra_headers={"Idempotency-Key": "a"}
            )
            return reply.choices[0].message.content

        assert await asyncio.gather(ask(), ask()) == ["tok0 tok1 tok2 tok3 tok4 "] * 2
        assert len(link.requests) == 1

    async def test_sdk_raises_for_reused_key(self, harness: Harness) -> None:
        client = self.client(harness, await harness.tenant())
        ask = {"model": "pirate", "extra_headers": {"Idempotency-Key": "a"}}
        await client.completions.create(prompt="one", **ask)  # type: ignore[call-overload]
        with pytest.raises(openai.UnprocessableEntityError) as refusal:
            await client.completions.create(prompt="two", **ask)  # type: ignore[call-overload]
        assert refusal.value.code == "idempotency_key_reused"


async def test_key_freed_when_gateway_died(harness: Harness, link: ScriptedLink) -> None:
    link.length, link.pause_s = 60, 0.02
    key = await harness.tenant(usd="1.00")
    task = asyncio.create_task(send(harness, key, max_tokens=50))
    await until(lambda: max(link.steps.values(), default=0) >= 3)
    [request_id] = link.steps
    for loop in harness.gateway.tasks:
        loop.cancel()
    await harness.redis.zadd(shard_for(TenantId("acme")).leases, {request_id: 1})
    await harness.gateway.parts.ledger.expire()
    link.length, link.pause_s = 5, 0
    reply = await harness.client.post(
        "/v1/chat/completions", json=chat_body(max_tokens=50), headers=bearer(key) | {"idempotency-key": "k-1"}
    )
    assert reply.status_code == 200
    assert (await task).status_code in (409, 503)
    assert await harness.balance() == ONE_USD - COST
