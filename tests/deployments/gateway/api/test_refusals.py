"""Every refusal: its status, its code, one body for all, our request id on each, and nothing charged."""

import httpx
import pytest

from billing.clock import now_ms
from billing.money import parse_usd
from deployments.inference.request import AdapterRejected, EngineFailed, Overloaded, RequestRejected
from deployments.token_stream.link import ReplicaLost
from tests.support.gateway import House, bearer
from tests.support.scripted import ScriptedLink


def check(reply: httpx.Response, status: int, code: str) -> dict[str, object]:
    """The one shape of every error."""
    assert reply.status_code == status, reply.text
    body: dict[str, object] = reply.json()
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.headers["x-request-id"].startswith("req_")
    assert body["type"] == f"urn:farebox:problem:{code.replace('_', '-')}"
    assert body["status"] == status
    assert isinstance(body["detail"], str)
    error = body["error"]
    assert isinstance(error, dict)
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["message"]
    return body


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ({}, "invalid_api_key"),
        ({"authorization": "Basic abc"}, "invalid_api_key"),
        ({"authorization": "Bearer "}, "invalid_api_key"),
        ({"authorization": "Bearer fbx_unknownunknownunknownunknown00"}, "invalid_api_key"),
        ({"authorization": "Bearer not-one-of-ours"}, "invalid_api_key"),
    ],
)
async def test_no_key_no_answer(house: House, header: dict[str, str], code: str) -> None:
    body = {"model": "pirate", "messages": [{"role": "user", "content": "one"}]}
    reply = await house.client.post("/v1/chat/completions", json=body, headers=header)
    check(reply, 401, code)
    assert reply.headers["www-authenticate"] == "Bearer"
    check(await house.client.get("/v1/models", headers=header), 401, code)


async def test_a_revoked_key_and_a_suspended_tenant_are_refused(house: House) -> None:
    key = await house.tenant()
    admin = bearer("admin-key-of-the-tests")
    [stored] = (await house.client.get("/admin/tenants/acme/keys", headers=admin)).json()["data"]
    await house.client.delete(f"/admin/tenants/acme/keys/{stored['id']}", headers=admin)
    check(await house.chat(key), 401, "invalid_api_key")
    other = await house.tenant("other")
    await house.client.post("/admin/tenants/other/suspend", headers=admin)
    check(await house.chat(other), 403, "tenant_suspended")


async def test_a_model_that_is_not_for_this_key(house: House) -> None:
    stranger, scoped = await house.tenant("other"), await house.tenant("acme", models=("gratis",))
    check(await house.chat(stranger, model="nobody"), 404, "model_not_found")
    check(await house.chat(stranger, model="acme/private:1"), 404, "model_not_found")
    check(await house.chat(stranger, model="unpriced"), 404, "model_not_found")
    check(await house.chat(scoped, model="pirate"), 403, "model_not_allowed")
    check(await house.client.get("/v1/models/nobody", headers=bearer(stranger)), 404, "model_not_found")


async def test_without_credit_the_refusal_says_what_is_missing_and_where_to_get_it(house: House) -> None:
    key = await house.tenant(usd="0.003")
    reply = await house.chat(key)
    body = check(reply, 402, "insufficient_credits")
    assert body["balance"] == "0.003000"
    assert parse_usd(str(body["required"])) > parse_usd("0.003")
    assert body["max_affordable_tokens"] == 0
    assert str(body["top_up_url"]).endswith("/v1/checkout")
    assert house.link.jobs == []


async def test_pay_as_you_go_without_its_subscription_names_that(house: House) -> None:
    body = check(await house.chat(await house.tenant(usd="0", plan="payg")), 402, "insufficient_credits")
    assert body["limit_source"] == "subscription"


async def test_too_many_requests_say_when_to_come_back(house: House) -> None:
    key = await house.tenant(plan="free", usd="0")
    for _ in range(3):
        assert (await house.chat(key)).status_code == 200
    reply = await house.chat(key)
    check(reply, 429, "rate_limit_exceeded")
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.headers["x-ratelimit-remaining-requests"] == "0"
    assert reply.headers["ratelimit-policy"] == '"requests";q=3;w=60;qu="requests"'
    assert reply.headers["ratelimit"] == f'"requests";r=0;t={reply.headers["retry-after"]}'


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, None),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"model": None}, "model"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 17}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": 5}, None),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
async def test_a_malformed_request_names_its_field(house: House, body: dict[str, object], param: str | None) -> None:
    refused = check(await house.chat(await house.tenant(), **body), 400, "invalid_request")
    error = refused["error"]
    assert isinstance(error, dict)
    if param is not None:
        assert error["param"] == param
    assert house.link.jobs == []


async def test_a_body_that_is_no_json(house: House) -> None:
    key = await house.tenant()
    for content in (b"{", b"[]", b"", b'"x"', b"\xff\xfe"):
        headers = bearer(key) | {"content-type": "application/json"}
        reply = await house.client.post("/v1/chat/completions", content=content, headers=headers)
        check(reply, 400, "invalid_request")


async def test_a_prompt_that_fills_the_context(house: House) -> None:
    key = await house.tenant()
    check(await house.chat(key, text="one " * 62), 400, "context_length_exceeded")
    reply = await house.chat(key, text="one " * 61)
    assert reply.status_code == 200
    assert reply.json()["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("prompt", ["", [], [999], [-1], ["a", "b"], [[1], [2]], {"a": 1}])
async def test_a_prompt_that_cannot_be_one(house: House, prompt: object) -> None:
    reply = await house.post(await house.tenant(), "/v1/completions", model="pirate", prompt=prompt)
    check(reply, 400, "invalid_request")


async def test_paths_and_methods_that_do_not_exist(house: House) -> None:
    check(await house.client.get("/v1/nothing"), 404, "not_found")
    reply = await house.client.get("/v1/chat/completions")
    check(reply, 405, "method_not_allowed")
    assert reply.headers["allow"] == "POST"
    reply = await house.client.put("/admin/tenants")
    check(reply, 405, "method_not_allowed")
    assert reply.headers["allow"] == "GET, POST"
    for path in ("/docs", "/redoc", "/v1/account/"):
        check(await house.client.get(path), 404, "not_found")


async def test_a_body_beyond_the_limit_is_refused_unread(house: House) -> None:
    key = await house.tenant()
    check(await house.chat(key, text="x" * 17_000), 413, "request_too_large")

    async def chunks():  # type: ignore[no-untyped-def]
        for _ in range(40):
            yield b"x" * 1000

    headers = bearer(key) | {"content-type": "application/json"}
    reply = await house.client.post("/v1/chat/completions", content=chunks(), headers=headers)
    check(reply, 413, "request_too_large")


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (Overloaded("full"), 503, "overloaded"),
        (RequestRejected("no"), 400, "invalid_request"),
        (AdapterRejected("bad bytes"), 503, "adapter_unavailable"),
        (ReplicaLost("gone"), 503, "replica_lost"),
        (EngineFailed("broke"), 500, "engine_failed"),
    ],
)
async def test_what_fails_before_the_first_token_is_an_honest_status_and_free(
    house: House, link: ScriptedLink, failure: Exception, status: int, code: str, is_streamed: bool
) -> None:
    link.failure = failure
    key = await house.tenant(usd="1.00")
    reply = await house.chat(key, stream=is_streamed)
    check(reply, status, code)
    assert ("retry-after" in reply.headers) == (code in ("overloaded", "replica_lost"))
    assert await house.balance() == parse_usd("1.00")
    assert await house.open_holds() == 0


async def test_our_own_bug_says_nothing_of_itself_and_keeps_its_request_id(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(house.services.gateway.catalog_holder.__class__, "current", property(broken))
    reply = await house.chat(await house.tenant())
    check(reply, 500, "internal_error")
    assert "secret" not in reply.text


async def test_before_its_configuration_came_a_gateway_is_not_ready(house: House) -> None:
    key = await house.tenant()
    house.services.gateway.catalog_holder._catalog = None
    check(await house.chat(key), 503, "not_ready")
    reply = await house.client.get("/readyz")
    assert reply.status_code == 503
    assert reply.json()["checks"] == {"store": True, "catalogue": False, "replica": True}


async def test_a_gateway_whose_clock_is_wrong_admits_nothing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    key = await house.tenant()
    monkeypatch.setattr(house.services.ledger, "_clock", lambda: now_ms() + 3_600_000)
    for path in ("/v1/completions", "/v1/quote"):
        reply = await house.post(key, path, model="pirate", prompt="one")
        check(reply, 503, "metering_unavailable")
        assert "retry shortly" in reply.json()["detail"]
    assert house.link.jobs == []


async def test_readiness_needs_a_replica_and_liveness_nothing(house: House, link: ScriptedLink) -> None:
    assert (await house.client.get("/readyz")).status_code == 200
    link.is_up = False
    assert (await house.client.get("/readyz")).status_code == 503
    assert (await house.client.get("/healthz")).status_code == 200


async def test_a_clients_request_id_is_echoed_beside_ours_and_never_used(house: House) -> None:
    key = await house.tenant()
    headers = bearer(key) | {"x-request-id": "req_mine", "x-client-request-id": "theirs-1"}
    body = {"model": "pirate", "messages": [{"role": "user", "content": "one"}]}
    seen = set()
    for _ in range(2):
        reply = await house.client.post("/v1/chat/completions", json=body, headers=headers)
        assert reply.status_code == 200
        assert reply.headers.get_list("x-client-request-id") == ["theirs-1"]
        assert len(reply.headers.get_list("x-request-id")) == 1
        seen.add(reply.headers["x-request-id"])
    assert len(seen) == 2
    assert "req_mine" not in seen
