"""Requests on a real Serve cluster, in its default mode and behind HAProxy: adapters, disconnects, kills."""

import json
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import pytest

from deployments.inference.adapters import digest_adapter
from tests.support.gateway import ADMIN_KEY, bearer
from tests.support.serve_cluster import Cluster, config_of, serving, with_context
from tests.support.waiting import eventually

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", params=["default", "haproxy"])
def cluster(request: pytest.FixtureRequest, base_path: Path, adapter_paths: dict[str, Path]) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="g", dir="/tmp"))
    chosen = {name: adapter_paths[name] for name in ("all8", "attention4")}
    config = config_of(with_context(base_path, folder / "base"), chosen, folder)
    try:
        with serving(config, folder, request.param == "haproxy") as made:
            yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def raw_post(path: str, body: dict[str, object], key: str) -> bytes:
    """A request as bytes, for a client that closes its connection."""
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: farebox", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(content)}", f"Authorization: Bearer {key}", "", ""]
    return "\r\n".join(lines).encode() + content


def tokens_of(record: dict[str, object]) -> int:
    usage = record["usage"]
    assert isinstance(usage, dict)
    return int(usage["completion_tokens"])


def chat(cluster: Cluster, model: str, **more: object) -> openai.types.chat.ChatCompletion:
    asked = {"max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}} | more
    messages = [{"role": "user", "content": "the quick brown fox"}]
    return cluster.client().chat.completions.create(model=model, messages=messages, **asked)  # type: ignore[call-overload, no-any-return]


def test_adapters_and_base_answer_differently(cluster: Cluster) -> None:
    answers = {model: chat(cluster, model) for model in ("farebox-base", "all8", "attention4")}
    assert len({reply.choices[0].message.content for reply in answers.values()}) == 3
    for model, reply in answers.items():
        receipt = reply.model_extra["receipt"] if reply.model_extra else {}
        assert receipt["adapter"].partition("@")[0] == model
        assert reply.usage is not None
        assert reply.usage.completion_tokens == 12
        assert reply._request_id == receipt["record_id"].removeprefix("rec_")
        assert cluster.record(receipt["record_id"])["status"] == "complete"


def test_stream_is_same_answer(cluster: Cluster) -> None:
    whole = chat(cluster, "all8").choices[0].message.content
    chunks = list(chat(cluster, "all8", stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-1].receipt["adapter"].startswith("all8@")


def test_steering_headers_have_no_effect(cluster: Cluster) -> None:
    headers = bearer(cluster.key) | {
        "x-request-id": "req_forged",
        "x-request-timeout-seconds": "0.000001",
        "x-request-disconnect-disabled": "?1",
        "serve_multiplexed_model_id": "unknown",
        "x-session-id": "mine",
    }
    body = {"model": "all8", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    reply = httpx.post(f"{cluster.base_url}/v1/chat/completions", json=body, headers=headers, timeout=30)
    assert reply.status_code == 200, reply.text
    assert reply.headers.get_list("x-client-request-id") == ["req_forged"]
    [request_id] = reply.headers.get_list("x-request-id")
    assert reply.json()["receipt"]["record_id"] == f"rec_{request_id}"


def test_errors_keep_shape_through_serve(cluster: Cluster) -> None:
    reply = httpx.get(f"{cluster.base_url}/v1/nothing")
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "not_found"
    assert len(reply.headers.get_list("x-request-id")) == 1
    with pytest.raises(openai.AuthenticationError) as refused:
        cluster.client().with_options(api_key="no").models.list()
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError):
        cluster.client().models.retrieve("unknown")


@pytest.mark.parametrize("stream", [True, False])
def test_disconnected_client_stops_engine_and_is_billed(cluster: Cluster, stream: bool) -> None:
    before, aborted = len(cluster.records()), cluster.stats()["requests_aborted"]
    body = {
        "model": "all8",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 4000,
        "ignore_eos": True,
        "stream": stream,
    }
    generated = cluster.stats()["generation_tokens"]
    with socket.create_connection(cluster.address, timeout=30) as connection:
        connection.sendall(raw_post("/v1/chat/completions", body, cluster.key))
        eventually(lambda: cluster.stats()["generation_tokens"] > generated)
    record = eventually(lambda: cluster.records()[0] if len(cluster.records()) > before else None)
    assert record["status"] == "cancelled"
    assert tokens_of(record) < 3000
    eventually(lambda: cluster.stats()["requests_aborted"] > aborted)
    settled = cluster.stats()
    assert settled["running"] == 0
    time.sleep(0.3)
    assert cluster.stats()["generation_tokens"] == settled["generation_tokens"]


def test_new_adapter_serves_without_restart(cluster: Cluster, adapter_paths: dict[str, Path]) -> None:
    pids = cluster.replica_pids("Gateway"), cluster.replica_pids("LoraReplica")
    config = json.loads(json.dumps(cluster.config))
    adapters = config["applications"][0]["deployments"][0]["user_config"]["adapters"]
    price = {"output_per_1m": "2.00"}
    path = adapter_paths["rslora16"]
    adapters.append({"id": "fourth", "path": str(path), "digest": digest_adapter(path), "price": price})
    adapters.append({"id": "changed", "path": str(path), "digest": "0" * 64, "price": price})
    adapters.append({"id": "broken", "path": str(path), "digest": digest_adapter(path)})
    (cluster.folder / "next.json").write_text(json.dumps(config))
    assert cluster.ask(f"deploy {cluster.folder / 'next.json'}") == "deployed"
    eventually(lambda: "fourth" in {model.id for model in cluster.client().models.list()})
    assert chat(cluster, "fourth").choices[0].message.content
    assert chat(cluster, "all8").choices[0].message.content
    with pytest.raises(openai.NotFoundError):
        chat(cluster, "broken")
    with pytest.raises(openai.InternalServerError) as refused:
        chat(cluster, "changed")
    assert refused.value.code == "adapter_unavailable"
    assert (cluster.replica_pids("Gateway"), cluster.replica_pids("LoraReplica")) == pids
    listed = httpx.get(f"{cluster.base_url}/admin/catalogue", headers=bearer(ADMIN_KEY)).json()["quarantined"]
    assert [entry["id"] for entry in listed] == ["broken"]


def test_killed_gateway_is_billed_by_checkpoint(cluster: Cluster) -> None:
    before = len(cluster.records())
    body = {
        "model": "all8",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 4000,
        "ignore_eos": True,
        "stream": True,
    }
    url = f"{cluster.base_url}/v1/chat/completions"
    with (
        suppress(httpx.HTTPError),
        httpx.stream("POST", url, json=body, headers=bearer(cluster.key), timeout=60) as reply,
    ):
        lines = reply.iter_lines()
        next(lines)
        time.sleep(1.2)
        [pid] = cluster.replica_pids("Gateway")
        os.kill(pid, signal.SIGKILL)
        for _ in lines:
            pass
    eventually(lambda: _is_ready(cluster), 60)
    record = eventually(lambda: cluster.records()[0] if len(cluster.records()) > before else None, 30)
    assert record["status"] == "expired"
    assert 0 < tokens_of(record) < 4000
    assert cluster.account()["open_holds"] == 0
    eventually(lambda: cluster.stats()["running"] == 0)


def test_killed_replica_is_replaced(cluster: Cluster) -> None:
    before = len(cluster.records())
    body = {
        "model": "all8",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 4000,
        "ignore_eos": True,
        "stream": True,
    }
    url = f"{cluster.base_url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=bearer(cluster.key), timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        [pid] = cluster.replica_pids("LoraReplica")
        os.kill(pid, signal.SIGKILL)
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"
    record = eventually(lambda: cluster.records()[0] if len(cluster.records()) > before else None)
    assert record["status"] == "failed"
    assert cluster.account()["open_holds"] == 0
    eventually(lambda: _is_ready(cluster), 60)
    assert chat(cluster, "all8").choices[0].message.content


def _is_ready(cluster: Cluster) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"{cluster.base_url}/readyz", timeout=3).status_code == 200
    return False
