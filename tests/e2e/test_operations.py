"""What operators and data scientists do to a running farebox, while clients use it."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e import books
from tests.support import load
from tests.support.stack import Stack, running
from tests.support.waiting import eventually

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # connections cut by a kill
    pytest.mark.filterwarnings("ignore:.*config file:UserWarning", "ignore:.*remote file:UserWarning"),  # of peft
]

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module", params=["haproxy", "serve proxy"])
def either(
    request: pytest.FixtureRequest, config: Path, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """The shared stack behind HAProxy, then another one behind Serve's Python proxy."""
    if request.param == "haproxy":
        yield request.getfixturevalue("stack")
        return
    with running(tmp_path_factory.mktemp("fp"), config, models, haproxy=False) as up:
        yield up


@pytest.fixture(scope="module")
def trained(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that PEFT trained for a few steps on random text."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float32)
    lora = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    peft = get_peft_model(model, lora)
    optimizer = torch.optim.AdamW((p for p in peft.parameters() if p.requires_grad), lr=0.02)
    batch = torch.randint(10, model.config.vocab_size, (4, 24))
    for _ in range(6):
        loss = peft(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    out = tmp_path_factory.mktemp("adapter") / "random"
    peft.save_pretrained(out)
    return out


def peft_tokens(models: Path, adapter: Path, max_tokens: int) -> list[int]:
    """The greedy answer of PEFT itself."""
    base = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=max_tokens, do_sample=False)
    return [int(token) for token in output[0, prompt["input_ids"].shape[1] :]]


def with_adapter(config: Path, entry: dict[str, object], out: Path) -> Path:
    """The configuration with one more adapter."""
    raw = yaml.safe_load(config.read_text())
    gateway = raw["applications"][0]["deployments"][0]
    gateway["user_config"]["adapters"].append(entry)
    out.write_text(yaml.safe_dump(raw, sort_keys=False))
    return out


def test_deployed_adapter_answers_as_peft_under_load(
    either: Stack, config: Path, models: Path, trained: Path, tmp_path: Path
) -> None:
    entry: dict[str, object] = {"id": "random", "path": str(trained), "price": {"output_per_1m": "2.00"}}
    changed = with_adapter(config, entry, tmp_path / "serve_config.yaml")
    before = {process.pid for process in either.processes("farebox:")}

    async def deploy_under_load() -> tuple[load.Outcome, float]:
        running_load = asyncio.create_task(load.run(either, [either.tenants["prepaid"]], 120, at_once=16))
        await asyncio.sleep(1)
        await asyncio.to_thread(either.cli, "check", str(changed))
        await asyncio.to_thread(either.cli, "deploy", str(changed))
        deployed = time.monotonic()
        reply = await asyncio.to_thread(complete, either, "random", 16)
        answered = time.monotonic() - deployed
        assert reply.status_code == 200, reply.text
        return await running_load, answered

    outcome, answered_s = asyncio.run(deploy_under_load())
    assert not outcome.broken
    assert not outcome.refusals
    assert {process.pid for process in either.processes("farebox:")} == before, "no process was restarted"
    assert answered_s < 10, "loads on first use, while a load runs"

    expected = peft_tokens(models, trained, 16)
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    reply = complete(either, "random", 16).json()
    assert reply["choices"][0]["message"]["content"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert reply["usage"]["completion_tokens"] == len(expected)


def test_broken_adapter_is_refused_by_name(either: Stack, config: Path, trained: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text((trained / "adapter_config.json").read_text())
    (broken / "adapter_model.safetensors").write_bytes(b"\x00" * 64)
    entry: dict[str, object] = {"id": "broken", "path": str(broken), "price": {"output_per_1m": "2.00"}}
    changed = with_adapter(config, entry, tmp_path / "serve_config.yaml")
    for command in ("check", "deploy"):
        done = either.cli(command, str(changed), check=False)
        assert done.returncode != 0
        assert "broken" in done.stdout + done.stderr
    assert complete(either, "pirate", 8).status_code == 200
    assert complete(either, "broken", 8).status_code == 404


def test_hung_up_client_stops_the_engine_and_pays(either: Stack) -> None:
    tenant = either.tenants["prepaid"]
    known = {record["record_id"] for record in books.records(either, tenant)}
    read_one_chunk(either, tenant.api_key)

    def settled() -> list[books.Record]:
        return [record for record in books.records(either, tenant) if record["record_id"] not in known]

    (record,) = eventually(settled)
    assert record["status"] == "cancelled"
    assert 0 < record["usage"]["completion_tokens"] < 400
    assert_engine_idle(either)


def test_killed_gateway_leaves_no_hold_and_no_request(either: Stack) -> None:
    tenant = either.tenants["prepaid"]
    known = {record["record_id"] for record in books.records(either, tenant)}
    with httpx.Client(base_url=either.base_url, timeout=60) as client:
        headers = {"Authorization": f"Bearer {tenant.api_key}"}
        with client.stream("POST", "/v1/chat/completions", json=long_story(), headers=headers) as reply:
            lines = reply.iter_lines()
            next(lines)
            either.kill("farebox:Gateway")
    eventually(lambda: is_ready(either), 60)
    eventually(lambda: books.account(either, tenant)["open_holds"] == 0, 60)
    (record,) = [r for r in books.records(either, tenant) if r["record_id"] not in known]
    assert record["status"] == "expired"
    assert_engine_idle(either)


def test_scale_adds_and_removes_a_replica(stack: Stack) -> None:
    stack.cli("scale", "2")
    eventually(lambda: len(stack.processes("farebox:LoraReplica")) == 2, 90)
    outcome = asyncio.run(load.run(stack, [stack.tenants["prepaid"]], 40, at_once=16))
    stack.cli("scale", "1")
    outcome_while_draining = asyncio.run(load.run(stack, [stack.tenants["prepaid"]], 40, at_once=8, seed=2))
    eventually(lambda: len(stack.processes("farebox:LoraReplica")) == 1, 180)
    for seen in (outcome, outcome_while_draining):
        assert not seen.broken
        assert not seen.refusals


def test_autoscaling_to_three_replicas_and_back_cuts_nothing(stack: Stack, config: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load(config.read_text())
    scaling = raw["applications"][0]["deployments"][1]["autoscaling_config"]
    scaling |= {"max_replicas": 3, "look_back_period_s": 5, "upscale_delay_s": 1, "downscale_delay_s": 5}
    scaling["policy"]["policy_kwargs"] = {"target_queued_tokens": 200}
    plans = raw["applications"][0]["deployments"][0]["user_config"]["plans"]
    del plans["prepaid"]["limits"]  # a fast machine reaches them
    elastic = tmp_path / "serve_config.yaml"
    elastic.write_text(yaml.safe_dump(raw, sort_keys=False))
    stack.cli("deploy", str(elastic))
    assert healthy_replicas(stack) == 1
    tenant = stack.tenants["prepaid"]

    async def rise_and_fall() -> list[load.Outcome]:
        seen = []
        while len(stack.processes("farebox:LoraReplica")) < 3:
            assert len(seen) < 40, "no third replica"
            seen.append(await load.run(stack, [tenant], 80, at_once=40, seed=len(seen)))
        while healthy_replicas(stack) < 3:
            assert len(seen) < 80, "the third replica is not healthy"
            seen.append(await load.run(stack, [tenant], 80, at_once=40, seed=len(seen)))
        while len(stack.processes("farebox:LoraReplica")) > 1:
            assert len(seen) < 300, "three replicas are still there"
            seen.append(await load.run(stack, [tenant], 4, at_once=2, seed=len(seen)))
        return seen

    outcomes = asyncio.run(rise_and_fall())
    assert healthy_replicas(stack) == 1
    for outcome in outcomes:
        assert not outcome.broken
        assert not outcome.refusals
    eventually(lambda: books.account(stack, tenant)["open_holds"] == 0)
    stack.cli("deploy", str(config))


def healthy_replicas(stack: Stack) -> int:
    """How many replicas are running, by Ray's dashboard API."""
    applications = json.loads(stack.cli("status", "--json", check=False).stdout)["applications"]
    (replica,) = [d for d in applications["farebox"]["deployments"] if d["name"] == "LoraReplica"]
    return sum(state == "RUNNING" for state in replica["replicas"])


def complete(stack: Stack, model: str, max_tokens: int) -> httpx.Response:
    headers = {"Authorization": f"Bearer {stack.tenants['prepaid'].api_key}"}
    body = {"model": model, "messages": MESSAGES, "max_tokens": max_tokens, "temperature": 0}
    return httpx.post(f"{stack.base_url}/v1/chat/completions", json=body, headers=headers, timeout=60)


def long_story() -> dict[str, object]:
    """A stream that goes on to the end of the context."""
    return {"model": "pirate", "messages": MESSAGES, "max_tokens": 450, "stream": True, "ignore_eos": True}


def read_one_chunk(stack: Stack, api_key: str) -> None:
    headers = {"Authorization": f"Bearer {api_key}"}
    with (
        httpx.Client(base_url=stack.base_url, timeout=60) as client,
        client.stream("POST", "/v1/chat/completions", json=long_story(), headers=headers) as reply,
    ):
        for line in reply.iter_lines():
            if line.startswith("data: ") and json.loads(line.removeprefix("data: "))["choices"]:
                return


def assert_engine_idle(stack: Stack) -> None:
    """Assert that the engine soon takes no more steps."""

    def steps() -> int:
        engines = stack.admin("engines").json()["data"]
        assert engines, "no engine reports"
        return sum(engine["steps"] for engine in engines)

    def is_still() -> bool:
        first = steps()
        time.sleep(1)
        return steps() == first

    eventually(is_still, 40)


def is_ready(stack: Stack) -> bool:
    try:
        return httpx.get(f"{stack.base_url}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
