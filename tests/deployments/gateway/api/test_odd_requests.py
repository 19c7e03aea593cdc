"""Malformed and unusual requests get a clear error in OpenAI's shape, or their answer."""

import json

import pytest

from tests.support.gateway import ADMIN_KEY, Harness, assert_problem, bearer, events
from tests.support.scripted import ScriptedLink

CHAT = b'"model":"pirate","messages":[{"role":"user","content":"one"}],"max_tokens":2'
JSON = {"content-type": "application/json"}


def chat(more: str | bytes = "") -> bytes:
    """A valid request with more fields at its end."""
    more = more.encode() if isinstance(more, str) else more
    return b"{" + CHAT + (b"," + more if more else b"") + b"}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"12",
        b"\xff\xfe\x00",
        chat(b'"user":"\xe4"'),
        chat('"metadata":' + "[" * 5_000 + "]" * 5_000),
        b'{"model":"pirate","messages":' + b"[" * 900 + b"]" * 900 + b"}",
        chat('"seed":' + "1" * 5_000),
        chat('"temperature":NaN'),
        chat('"temperature":Infinity'),
        chat('"temperature":1e400'),
        chat('"presence_penalty":1e308'),
        chat('"max_tokens":NaN'),
        chat('"max_tokens":-1'),
        chat('"max_tokens":1e-400'),
        chat('"max_tokens":2.5'),
        chat('"top_k":99999999999999999999999'),
        chat('"seed":0.5'),
        chat('"n":-1'),
        chat('"n":0'),
        chat('"n":17'),
        chat('"best_of":-1'),
        chat('"stream":"perhaps"'),
        chat('"stream":true,"stream_options":[]'),
        chat('"stream":true,"stream_options":{"include_usage":"perhaps"}'),
        chat('"model":5'),
        chat('"model":""'),
        chat(f'"model":"{"x" * 257}"'),
        chat('"model":"\\ud800"'),
        chat('"user":"\\ud83d"'),
        chat('"messages":[{"role":"user","content":"\\udc00"}]'),
        chat('"messages":[{"role":"user","content":[{"type":"text","text":"\\ud83d"}]}]'),
        chat('"stop":"\\ud83d"'),
        chat('"\\ud83d":1'),
    ],
    ids=lambda body: body[-40:].decode("latin-1"),
)
async def test_meaningless_body_refused(harness: Harness, body: bytes) -> None:
    key = await harness.tenant()
    reply = await harness.client.post("/v1/chat/completions", content=body, headers=bearer(key) | JSON)
    assert_problem(reply, 400, "invalid_request")
    assert harness.link.requests == []
    assert await harness.open_holds() == 0


@pytest.mark.parametrize(
    "body",
    [
        b"\xef\xbb\xbf" + chat(),
        b'{"model":"unknown",' + CHAT + b"}",
        chat('"user":"\\ud83d\\ude00 \\u0000"'),
        chat('"messages":[{"role":"user","content":"a\\u0000b"}]'),
        chat('"messages":[{"role":"user","content":null}]'),
        chat('"messages":[{"role":"user","content":[]}]'),
        chat('"temperature":-0'),
        chat('"seed":99999999999999999999999'),
        chat('"max_tokens":99999999999999999999999'),
        chat('"n":1'),
        chat('"metadata":' + '{"a":' * 400 + "1" + "}" * 400),
        chat('"stream_options":{"include_usage":true}'),
    ],
    ids=lambda body: body[-40:].decode("latin-1"),
)
@pytest.mark.parametrize("name", [{}, {"idempotency-key": "k"}], ids=["", "keyed"])
async def test_odd_but_valid_body_answered(harness: Harness, body: bytes, name: dict[str, str]) -> None:
    key = await harness.tenant()
    reply = await harness.client.post("/v1/chat/completions", content=body, headers=bearer(key) | JSON | name)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["completion_tokens"] >= 2


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "///;"])
async def test_content_type_other_than_json_refused(harness: Harness, kind: str | None) -> None:
    headers = bearer(await harness.tenant()) | ({} if kind is None else {"content-type": kind})
    reply = await harness.client.post("/v1/chat/completions", content=chat(), headers=headers)
    assert "Content-Type: application/json" in str(assert_problem(reply, 400, "invalid_request")["detail"])


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": True}])
async def test_stream_ends_with_usage_whatever_its_options(
    harness: Harness, link: ScriptedLink, options: dict[str, bool] | None
) -> None:
    reply = await harness.chat(await harness.tenant(), stream=True, stream_options=options)
    last = events(reply)[-1]
    assert last["choices"] == []
    assert json.loads(json.dumps(last["usage"]))["completion_tokens"] == 5


@pytest.mark.parametrize("prompt", [None, [[]], [10**30], ["one", 2], {"a": 1}, [None]])
async def test_meaningless_prompt_refused(harness: Harness, prompt: object) -> None:
    reply = await harness.post(await harness.tenant(), "/v1/completions", model="pirate", prompt=prompt)
    assert_problem(reply, 400, "invalid_request")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("/v1/usage?start=2025-13-01", "start"),
        ("/v1/usage?end=", "end"),
        ("/v1/usage?end=9999-12-31", "end"),
        ("/v1/usage?group_by=week", "group_by"),
        ("/v1/usage/records?limit=0", "limit"),
        ("/v1/usage/records?limit=1001", "limit"),
        ("/v1/usage/records?limit=many", "limit"),
        ("/v1/usage/records?cursor=%00", "cursor"),
        ("/v1/usage/records?cursor=1-2-3", "cursor"),
        ("/v1/usage/records?cursor=99999999999999999999-1", "cursor"),
        ("/v1/usage/records?cursor=1-99999999999999999999", "cursor"),
    ],
)
async def test_bad_query_names_parameter(harness: Harness, query: str, param: str) -> None:
    reply = await harness.client.get(query, headers=bearer(await harness.tenant()))
    error = assert_problem(reply, 400, "invalid_request")["error"]
    assert isinstance(error, dict)
    assert error["param"] == param


async def test_long_model_id_is_shortened_in_error(harness: Harness) -> None:
    reply = await harness.client.get("/v1/models/" + "x" * 5_000, headers=bearer(await harness.tenant()))
    assert_problem(reply, 404, "model_not_found")
    assert len(reply.content) < 1_500


@pytest.mark.parametrize("url", ["javascript:alert(1)", "ftp://x", "//x", "x" * 3_000])
async def test_checkout_return_url_must_be_http(harness: Harness, url: str) -> None:
    reply = await harness.post(await harness.tenant(), "/v1/checkout", pack="small", return_url=url)
    assert_problem(reply, 400, "invalid_request")


async def test_surrogate_in_admin_body_refused(harness: Harness) -> None:
    body = b'{"id":"new","email":"a@b.c","name":"\\ud800"}'
    reply = await harness.client.post("/admin/tenants", content=body, headers=bearer(ADMIN_KEY) | JSON)
    assert_problem(reply, 400, "invalid_request")
