"""Refusals: status, code and body, the request id, and that nothing is charged."""

from dataclasses import replace

import pytest

from billing.clock import now_ms
from billing.money import parse_usd
from deployments.gateway.catalog_holder import CatalogHolder
from deployments.inference.request import AdapterRejected, EngineFailed, Overloaded, RequestRejected
from deployments.token_stream.errors import ReplicaLost
from tests.support.gateway import ADMIN_KEY, Harness, assert_problem, bearer
from tests.support.scripted import ScriptedLink


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
async def test_request_refused_without_valid_key(harness: Harness, header: dict[str, str], code: str) -> None:
    body = {"model": "pirate", "messages": [{"role": "user", "content": "one"}]}
    reply = await harness.client.post("/v1/chat/completions", json=body, headers=header)
    assert_problem(reply, 401, code)
    assert reply.headers["www-authenticate"] == "Bearer"
    assert_problem(await harness.client.get("/v1/models", headers=header), 401, code)


async def test_revoked_key_and_suspended_tenant_refused(harness: Harness) -> None:
    key = await harness.tenant()
    admin = bearer(ADMIN_KEY)
    [stored] = (await harness.client.get("/admin/tenants/acme/keys", headers=admin)).json()["data"]
    await harness.client.delete(f"/admin/tenants/acme/keys/{stored['id']}", headers=admin)
    assert_problem(await harness.chat(key), 401, "invalid_api_key")
    other = await harness.tenant("other")
    await harness.client.post("/admin/tenants/other/suspend", headers=admin)
    assert_problem(await harness.chat(other), 403, "tenant_suspended")


async def test_model_refused_for_other_key(harness: Harness) -> None:
    stranger, scoped = await harness.tenant("other"), await harness.tenant("acme", models=("gratis",))
    assert_problem(await harness.chat(stranger, model="unknown"), 404, "model_not_found")
    assert_problem(await harness.chat(stranger, model="acme/private:1"), 404, "model_not_found")
    assert_problem(await harness.chat(stranger, model="unpriced"), 404, "model_not_found")
    assert_problem(await harness.chat(scoped, model="pirate"), 403, "model_not_allowed")
    assert_problem(await harness.client.get("/v1/models/unknown", headers=bearer(stranger)), 404, "model_not_found")


async def test_insufficient_credits_shows_balance_and_top_up_url(harness: Harness) -> None:
    key = await harness.tenant(usd="0.003")
    reply = await harness.chat(key)
    body = assert_problem(reply, 402, "insufficient_credits")
    assert body["balance"] == "0.003000"
    assert parse_usd(str(body["required"])) > parse_usd("0.003")
    assert body["max_affordable_tokens"] == 0
    assert str(body["top_up_url"]).startswith(f"{harness.gateway.config.public_url}/top-up/")
    assert harness.link.requests == []


async def test_pay_as_you_go_refused_without_subscription(harness: Harness) -> None:
    body = assert_problem(await harness.chat(await harness.tenant(usd="0", plan="payg")), 402, "insufficient_credits")
    assert body["limit_source"] == "subscription"


async def test_rate_limited_with_retry_after(harness: Harness) -> None:
    key = await harness.tenant(plan="free", usd="0")
    for _ in range(3):
        assert (await harness.chat(key)).status_code == 200
    reply = await harness.chat(key)
    assert_problem(reply, 429, "rate_limit_exceeded")
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
async def test_malformed_request_names_field(harness: Harness, body: dict[str, object], param: str | None) -> None:
    refused = assert_problem(await harness.chat(await harness.tenant(), **body), 400, "invalid_request")
    error = refused["error"]
    assert isinstance(error, dict)
    if param is not None:
        assert error["param"] == param
    assert harness.link.requests == []


async def test_body_that_is_not_json_refused(harness: Harness) -> None:
    key = await harness.tenant()
    for content in (b"{", b"[]", b"", b'"x"', b"\xff\xfe"):
        headers = bearer(key) | {"content-type": "application/json"}
        reply = await harness.client.post("/v1/chat/completions", content=content, headers=headers)
        assert_problem(reply, 400, "invalid_request")


async def test_prompt_that_fills_context_refused(harness: Harness) -> None:
    key = await harness.tenant()
    assert_problem(await harness.chat(key, text="one " * 62), 400, "context_length_exceeded")
    reply = await harness.chat(key, text="one " * 61)
    assert reply.status_code == 200
    assert reply.json()["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("prompt", ["", [], [999], [-1], ["a", "b"], [[1], [2]], {"a": 1}])
async def test_invalid_prompt_refused(harness: Harness, prompt: object) -> None:
    reply = await harness.post(await harness.tenant(), "/v1/completions", model="pirate", prompt=prompt)
    assert_problem(reply, 400, "invalid_request")


async def test_unknown_paths_and_methods_refused(harness: Harness) -> None:
    assert_problem(await harness.client.get("/v1/nothing"), 404, "not_found")
    reply = await harness.client.get("/v1/chat/completions")
    assert_problem(reply, 405, "method_not_allowed")
    assert reply.headers["allow"] == "POST"
    reply = await harness.client.put("/admin/tenants")
    assert_problem(reply, 405, "method_not_allowed")
    assert reply.headers["allow"] == "GET, POST"
    for path in ("/docs", "/redoc", "/v1/account/"):
        assert_problem(await harness.client.get(path), 404, "not_found")


async def test_too_large_body_refused(harness: Harness) -> None:
    key = await harness.tenant()
    assert_problem(await harness.chat(key, text="x" * 17_000), 413, "request_too_large")

    async def chunks():  # type: ignore[no-untyped-def]
        for _ in range(40):
            yield b"x" * 1000

    headers = bearer(key) | {"content-type": "application/json"}
    reply = await harness.client.post("/v1/chat/completions", content=chunks(), headers=headers)
    assert_problem(reply, 413, "request_too_large")


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
async def test_failure_before_first_token_has_its_status_and_is_free(
    harness: Harness, link: ScriptedLink, failure: Exception, status: int, code: str, is_streamed: bool
) -> None:
    link.failure = failure
    key = await harness.tenant(usd="1.00")
    reply = await harness.chat(key, stream=is_streamed)
    assert_problem(reply, status, code)
    assert ("retry-after" in reply.headers) == (code in ("overloaded", "replica_lost"))
    assert await harness.balance() == parse_usd("1.00")
    assert await harness.open_holds() == 0


async def test_internal_error_hides_details(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(CatalogHolder, "current", property(broken))
    reply = await harness.chat(await harness.tenant())
    assert_problem(reply, 500, "internal_error")
    assert "secret" not in reply.text


async def test_gateway_not_ready_without_catalog(harness: Harness) -> None:
    key = await harness.tenant()
    harness.gateway.parts = replace(harness.gateway.parts, catalog_holder=CatalogHolder())
    assert_problem(await harness.chat(key), 503, "not_ready")
    reply = await harness.client.get("/readyz")
    assert reply.status_code == 503
    assert reply.json()["checks"] == {"store": True, "catalogue": False, "replica": True}


async def test_gateway_with_clock_skew_admits_nothing(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    key = await harness.tenant()
    monkeypatch.setattr(harness.gateway.parts.ledger, "_clock", lambda: now_ms() + 3_600_000)
    for path in ("/v1/completions", "/v1/quote"):
        reply = await harness.post(key, path, model="pirate", prompt="one")
        assert_problem(reply, 503, "metering_unavailable")
        assert "retry shortly" in reply.json()["detail"]
    assert harness.link.requests == []


async def test_readiness_needs_replica(harness: Harness, link: ScriptedLink) -> None:
    assert (await harness.client.get("/readyz")).status_code == 200
    link.is_up = False
    assert (await harness.client.get("/readyz")).status_code == 503
    assert (await harness.client.get("/healthz")).status_code == 200


async def test_client_request_id_is_echoed_and_not_used(harness: Harness) -> None:
    key = await harness.tenant()
    headers = bearer(key) | {"x-request-id": "req_mine", "x-client-request-id": "theirs-1"}
    body = {"model": "pirate", "messages": [{"role": "user", "content": "one"}]}
    seen = set()
    for _ in range(2):
        reply = await harness.client.post("/v1/chat/completions", json=body, headers=headers)
        assert reply.status_code == 200
        assert reply.headers.get_list("x-client-request-id") == ["theirs-1"]
        assert len(reply.headers.get_list("x-request-id")) == 1
        seen.add(reply.headers["x-request-id"])
    assert len(seen) == 2
    assert "req_mine" not in seen
