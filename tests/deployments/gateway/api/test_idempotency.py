"""The same ``Idempotency-Key`` and body again is the same answer and receipt, run and charged once."""

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
from deployments.token_stream.link import ReplicaLost
from tests.deployments.gateway.api.test_completions import records
from tests.deployments.gateway.test_endings import Fragile, fragile
from tests.support.gateway import House, bearer, events, until
from tests.support.scripted import ScriptedLink

__all__ = ["fragile"]

COST = parse_usd("0.015")
ONE_USD = parse_usd("1.00")
Body = dict[str, object]


def chat(**more: object) -> Body:
    return {"model": "pirate", "messages": [{"role": "user", "content": "one two three"}], "max_tokens": 10} | more


async def send(
    house: House, key: str, name: str | None = "k-1", path: str = "/v1/chat/completions", **more: object
) -> httpx.Response:
    body = {"model": "pirate", "prompt": "one two three"} | more if path == "/v1/completions" else chat(**more)
    headers = bearer(key) | ({} if name is None else {"idempotency-key": name})
    reply = await house.client.post(path, json=body, headers=headers)
    await house.settled()
    return reply


def refused(reply: httpx.Response, status: int, code: str) -> Body:
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code), reply.text
    body: Body = reply.json()
    return body


class TestARepeat:
    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
    async def test_of_an_answer_is_that_answer_and_its_receipt(self, house: House, path: str) -> None:
        key = await house.tenant(usd="1.00")
        first, again = [await send(house, key, path=path) for _ in range(2)]
        assert first.status_code == again.status_code == 200
        assert again.json() == first.json()
        assert "idempotent-replayed" not in first.headers
        assert again.headers["idempotent-replayed"] == "true"
        for name in ("x-farebox-cost", "x-farebox-balance", "x-farebox-max-tokens"):
            assert again.headers[name] == first.headers[name]
        assert again.headers["x-request-id"] != first.headers["x-request-id"]
        assert len(house.link.jobs) == len(await records(house)) == 1

    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
    async def test_of_a_stream_is_the_same_stream(self, house: House, path: str) -> None:
        key = await house.tenant(usd="1.00")
        first, again = [await send(house, key, path=path, stream=True) for _ in range(2)]
        assert again.headers["content-type"] == first.headers["content-type"]
        assert again.headers["idempotent-replayed"] == "true"
        assert again.text == first.text
        assert again.text.endswith("data: [DONE]\n\n")
        assert len(house.link.jobs) == len(await records(house)) == 1

    async def test_keeps_its_price_and_balance_whatever_happened_since(self, house: House) -> None:
        key = await house.tenant(usd="1.00")
        first = await send(house, key)
        await house.chat(key)
        again = await send(house, key)
        assert again.json()["receipt"] == first.json()["receipt"]
        assert await house.balance() == ONE_USD - 2 * COST

    @pytest.mark.parametrize("stream", [False, True])
    async def test_says_again_that_credit_cut_it_short(self, house: House, link: ScriptedLink, stream: bool) -> None:
        link.length = 50
        key = await house.tenant(usd="0.011")
        first, again = [await send(house, key, max_tokens=50, stream=stream) for _ in range(2)]
        assert "incomplete_details" in first.text
        assert again.text == first.text

    async def test_costs_nothing_even_where_nothing_is_left(self, house: House) -> None:
        key = await house.tenant(usd="0.015")
        assert [(await send(house, key, max_tokens=5)).status_code for _ in range(3)] == [200, 200, 200]
        assert await house.balance() == 0

    async def test_means_the_same_body_however_it_is_written(self, house: House) -> None:
        key = await house.tenant()
        headers = bearer(key) | {"idempotency-key": "k", "content-type": "application/json"}
        one = b'{"model":"pirate","messages":[{"role":"user","content":"one"}]}'
        two = b'{ "messages": [{"content": "\\u006fne", "role": "user"}], "model": "pirate" }'
        replies = [await house.client.post("/v1/chat/completions", content=raw, headers=headers) for raw in (one, two)]
        assert [reply.status_code for reply in replies] == [200, 200]
        assert len(house.link.jobs) == 1

    @pytest.mark.parametrize(
        "change", [{"max_tokens": 9}, {"stream": True}, {"seed": 1}, {"user": "someone"}, {"path": "/v1/completions"}]
    )
    async def test_with_another_body_is_refused(self, house: House, change: Body) -> None:
        key = await house.tenant()
        await send(house, key)
        refused(await send(house, key, **change), 422, "idempotency_key_reused")  # type: ignore[arg-type]
        assert len(house.link.jobs) == 1

    async def test_without_a_key_is_a_request_of_its_own(self, house: House) -> None:
        key = await house.tenant(usd="1.00")
        await send(house, key, None)
        await send(house, key, None)
        await send(house, key, "k-2")
        assert len(house.link.jobs) == 3
        assert await house.balance() == ONE_USD - 3 * COST


class TestAKey:
    async def test_is_the_tenants_whichever_api_key_sends_it(self, house: House) -> None:
        acme, other = await house.tenant("acme"), await house.tenant("other")
        second, stored = new_key(TenantId("acme"), 0)
        await house.services.tenants.add_key(stored)
        first = await send(house, acme)
        assert (await send(house, second)).json() == first.json()
        theirs = await send(house, other)
        assert theirs.json()["id"] != first.json()["id"]
        assert await house.balance("other") == ONE_USD - COST

    async def test_is_no_way_around_the_scope_of_an_api_key(self, house: House) -> None:
        scoped, stored = new_key(TenantId("acme"), 0, models=("gratis",))
        await send(house, await house.tenant())
        await house.services.tenants.add_key(stored)
        refused(await send(house, scoped), 403, "model_not_allowed")

    @pytest.mark.parametrize("name", ["", " ", "two words", "tab\tbed", "ü", "x" * 256])
    async def test_that_could_be_misread_is_refused_before_anything_runs(self, house: House, name: str) -> None:
        headers = [(b"authorization", f"Bearer {await house.tenant()}".encode()), (b"idempotency-key", name.encode())]
        reply = await house.client.post("/v1/chat/completions", json=chat(), headers=headers)
        body = refused(reply, 400, "invalid_request")
        assert "Idempotency-Key" in str(body["detail"])
        assert house.link.jobs == []

    async def test_sent_twice_is_refused(self, house: House) -> None:
        headers = [
            ("authorization", f"Bearer {await house.tenant()}"),
            ("idempotency-key", "a"),
            ("idempotency-key", "b"),
        ]
        refused(await house.client.post("/v1/chat/completions", json=chat(), headers=headers), 400, "invalid_request")

    @pytest.mark.parametrize("name", ["x" * 255, "!", "~", '"8e03978e-40d5-43dd-bc93-6894a57f9324"'])
    async def test_of_any_printable_kind_is_taken(self, house: House, name: str) -> None:
        key = await house.tenant()
        assert [(await send(house, key, name)).status_code for _ in range(2)] == [200, 200]
        assert len(house.link.jobs) == 1

    async def test_is_not_used_up_by_a_request_that_is_malformed(self, house: House) -> None:
        key = await house.tenant()
        refused(await send(house, key, temperature=9), 400, "invalid_request")
        assert (await send(house, key)).status_code == 200


class TestWhileItRuns:
    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_repeat_is_told_when_to_come_back(self, house: House, link: ScriptedLink, stream: bool) -> None:
        link.length, link.pause_s = 10, 0.03
        key = await house.tenant(usd="1.00")
        task = asyncio.create_task(send(house, key, stream=stream))
        await until(lambda: bool(link.steps))
        reply = await house.client.post(
            "/v1/chat/completions", json=chat(stream=stream), headers=bearer(key) | {"idempotency-key": "k-1"}
        )
        refused(reply, 409, "idempotency_key_in_use")
        assert int(reply.headers["retry-after"]) >= 1
        assert "x-should-retry" not in reply.headers
        assert (await task).status_code == 200
        assert (await send(house, key, stream=stream)).headers["idempotent-replayed"] == "true"

    async def test_of_many_at_once_one_runs(self, house: House, link: ScriptedLink) -> None:
        link.pause_s = 0.01
        key = await house.tenant(usd="1.00")
        replies = await asyncio.gather(*(send(house, key) for _ in range(30)))
        assert {reply.status_code for reply in replies} <= {200, 409}
        assert len(link.jobs) == 1
        assert await house.balance() == ONE_USD - COST

    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_request_whose_key_was_taken_over_delivers_and_charges_nothing(
        self, house: House, link: ScriptedLink, stream: bool
    ) -> None:
        link.pause_s = 0.05
        key = await house.tenant(usd="1.00")
        task = asyncio.create_task(send(house, key, stream=stream))
        await until(lambda: bool(link.jobs))
        [name] = [name async for name in house.redis.scan_iter("*:answer:*")]
        await house.redis.hset(name, "request", "req_another")
        reply = await task
        refused(reply, 409, "idempotency_key_in_use")
        assert "tok" not in reply.text
        assert (await house.balance(), await house.open_holds()) == (ONE_USD, 0)


class TestAFailure:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("failure", "fails_at"),
        [(Overloaded("full"), 0), (ReplicaLost("gone"), 0), (EngineFailed("broke"), 0), (RuntimeError("a bug"), 0)],
    )
    async def test_before_the_first_token_frees_the_key(
        self, house: House, link: ScriptedLink, failure: Exception, fails_at: int, stream: bool
    ) -> None:
        link.failure, link.fails_at = failure, fails_at
        key = await house.tenant(usd="1.00")
        assert (await send(house, key, stream=stream)).status_code >= 500
        link.failure = None
        reply = await send(house, key, stream=stream)
        assert (reply.status_code, "idempotent-replayed" in reply.headers) == (200, False)
        assert await house.balance() == ONE_USD - COST

    async def test_of_an_answer_on_its_way_is_free_and_frees_the_key(self, house: House, link: ScriptedLink) -> None:
        link.failure, link.fails_at = ReplicaLost("gone"), 3
        key = await house.tenant(usd="1.00")
        refused(await send(house, key), 503, "replica_lost")
        link.failure = None
        assert (await send(house, key)).status_code == 200
        assert await house.balance() == ONE_USD - COST

    async def test_of_a_stream_that_delivered_is_charged_once_and_not_run_again(
        self, house: House, link: ScriptedLink
    ) -> None:
        link.failure, link.fails_at = ReplicaLost("gone"), 3
        key = await house.tenant(usd="1.00")
        first = await send(house, key, stream=True)
        assert events(first)[-1]["error"]["code"] == "replica_lost"  # type: ignore[index]
        link.failure = None
        again = await send(house, key, stream=True)
        [record] = await records(house)
        assert refused(again, 409, "idempotency_answer_incomplete")["record_id"] == record.record_id
        assert again.headers["x-should-retry"] == "false"
        assert record.charged_nanos > 0
        assert (await send(house, key, "k-2", stream=True)).status_code == 200

    async def test_to_pay_frees_the_key_for_when_there_is_credit(self, house: House) -> None:
        key = await house.tenant(usd="0")
        refused(await send(house, key), 402, "insufficient_credits")
        await house.services.ledger.grant(Grant("test:more", TenantId("acme"), Unit.NANOS, int(ONE_USD)))
        assert (await send(house, key)).status_code == 200

    async def test_of_a_limit_frees_the_key(self, house: House) -> None:
        key = await house.tenant(plan="free", usd="0")
        for number in range(3):
            await send(house, key, f"k-{number}")
        refused(await send(house, key, "k-4"), 429, "rate_limit_exceeded")
        assert len([name async for name in house.redis.scan_iter("*:answer:*")]) == 3

    @pytest.mark.parametrize("stream", [False, True])
    async def test_of_the_client_to_wait_is_charged_once(self, house: House, link: ScriptedLink, stream: bool) -> None:
        link.length, link.pause_s = 10, 0.02
        key = await house.tenant(usd="1.00")
        task = asyncio.create_task(send(house, key, stream=stream))
        await until(lambda: max(link.steps.values(), default=0) >= 3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: not house.services.gateway.open_runs)
        await house.settled()
        [record] = await records(house)
        assert record.charged_nanos > 0
        reply = await send(house, key, stream=stream)
        if record.status is Status.CANCELLED:
            refused(reply, 409, "idempotency_answer_incomplete")
        assert [r.charged_nanos for r in await records(house)] == [record.charged_nanos]

    async def test_of_the_client_to_wait_for_its_hold_frees_the_key(self, house: House) -> None:
        key = await house.tenant(usd="1.00")
        task = asyncio.create_task(send(house, key))
        while not house.services.gateway.settler.tasks:  # noqa: ASYNC110, a moment that no event marks
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await house.settled()
        assert (await send(house, key)).status_code == 200
        assert await house.balance() == ONE_USD - COST


class WordyLink(ScriptedLink):
    """Each token is long."""

    async def generate(self, job: GenerateRequest):  # type: ignore[no-untyped-def, override]
        self.jobs.append(job)
        for number in (1, 2):
            reason = FinishReason.STOP if number == 2 else None
            text = "x" * (MAX_ANSWER_BYTES // 2 + 1)
            yield OutputDelta((number,), text, len(job.prompt_token_ids), 0, number, 1, reason)


class TestAnAnswerTooLarge:
    @pytest.fixture
    def link(self) -> ScriptedLink:
        return WordyLink()

    @pytest.mark.parametrize("stream", [False, True])
    async def test_is_delivered_and_charged_once_and_its_repeat_names_the_record(
        self, house: House, stream: bool
    ) -> None:
        key = await house.tenant(usd="1.00")
        assert (await send(house, key, stream=stream)).status_code == 200
        again = await send(house, key, stream=stream)
        [record] = await records(house)
        assert refused(again, 409, "idempotency_answer_too_large")["record_id"] == record.record_id
        assert again.headers["x-should-retry"] == "false"
        assert len(house.link.jobs) == 1


@pytest.mark.prompt
class TestAStoreThatHangs:
    async def test_takes_no_keyed_request_and_blocks_no_key(self, fragile: Fragile) -> None:
        house = fragile.house
        key = await house.tenant(usd="1.00")
        fragile.hang()
        refused(
            await house.client.post(
                "/v1/chat/completions", json=chat(), headers=bearer(key) | {"idempotency-key": "k-1"}
            ),
            503,
            "metering_unavailable",
        )
        fragile.resume()
        await house.settled()
        assert len(house.link.jobs) == 0

    @pytest.mark.parametrize("stream", [False, True])
    async def test_while_an_answer_runs_leads_to_one_charge(
        self, fragile: Fragile, link: ScriptedLink, stream: bool
    ) -> None:
        house = fragile.house
        key = await house.tenant(usd="1.00")
        link.length, link.pause_s = 10, 0.03
        task = asyncio.create_task(send(house, key, stream=stream))
        await until(lambda: max(link.steps.values(), default=0) >= 3)
        fragile.hang()
        reply = await task
        assert "metering_unavailable" in reply.text
        fragile.resume()
        await until(lambda: not house.services.gateway.settler.spooled)
        again = await send(house, key, stream=stream)
        if again.status_code != 200:  # it was delivered, and could not be staged in time
            assert stream
            refused(again, 409, "idempotency_answer_incomplete")
        charges = [record.charged_nanos for record in await records(house) if record.charged_nanos]
        assert charges == [parse_usd("0.005") + 10 * parse_usd("0.002")]


class TestTheOpenAiSdk:
    def client(self, house: House, key: str, retries: int = 0) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            api_key=key, base_url="http://farebox/v1", http_client=house.client, max_retries=retries
        )

    async def test_gets_the_same_completion_and_stream_again(self, house: House) -> None:
        client = self.client(house, await house.tenant(usd="1.00"))
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
        assert len(house.link.jobs) == 2

    async def test_retries_by_itself_until_the_answer_is_there(self, house: House, link: ScriptedLink) -> None:
        link.pause_s = 0.1
        client = self.client(house, await house.tenant(usd="1.00"), retries=2)

        async def ask() -> str | None:
            reply = await client.chat.completions.create(
                model="pirate", messages=[{"role": "user", "content": "one"}], extra_headers={"Idempotency-Key": "a"}
            )
            return reply.choices[0].message.content

        assert await asyncio.gather(ask(), ask()) == ["tok0 tok1 tok2 tok3 tok4 "] * 2
        assert len(link.jobs) == 1

    async def test_sees_what_is_wrong_with_its_key(self, house: House) -> None:
        client = self.client(house, await house.tenant())
        ask = {"model": "pirate", "extra_headers": {"Idempotency-Key": "a"}}
        await client.completions.create(prompt="one", **ask)  # type: ignore[call-overload]
        with pytest.raises(openai.UnprocessableEntityError) as refusal:
            await client.completions.create(prompt="two", **ask)  # type: ignore[call-overload]
        assert refusal.value.code == "idempotency_key_reused"


async def test_an_unfinished_answer_of_a_gateway_that_died_does_not_block_its_key(
    house: House, link: ScriptedLink
) -> None:
    link.length, link.pause_s = 60, 0.02
    key = await house.tenant(usd="1.00")
    task = asyncio.create_task(send(house, key, max_tokens=50))
    await until(lambda: max(link.steps.values(), default=0) >= 3)
    [request_id] = link.steps
    for loop in house.services.gateway._loops:
        loop.cancel()
    await house.redis.zadd(shard_for(TenantId("acme")).leases, {request_id: 1})
    await house.services.ledger.expire()
    link.length, link.pause_s = 5, 0
    reply = await house.client.post(
        "/v1/chat/completions", json=chat(max_tokens=50), headers=bearer(key) | {"idempotency-key": "k-1"}
    )
    assert reply.status_code == 200
    assert (await task).status_code in (409, 503)
    assert await house.balance() == ONE_USD - COST
