"""Two replicas on a real Serve cluster: routing by adapter, and draining."""

import asyncio
import json
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from tests.support.gateway import bearer
from tests.support.serve_cluster import Cluster, config_of, serving, with_context
from tests.support.waiting import eventually

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ADAPTERS = [f"adapter{number}" for number in range(8)]
SLOTS = 6
"""Too few for all on one replica."""
REPEATS = 200


@pytest.fixture(scope="module")
def group(base_path: Path, adapter_paths: dict[str, Path]) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="g", dir="/tmp"))
    copies = {name: copied(adapter_paths["attention4"], folder / name) for name in ADAPTERS}
    config = config_of(with_context(base_path, folder / "base"), copies, folder)
    farebox = config["applications"][0]  # type: ignore[index]
    farebox["args"]["engine"] |= {"adapter_slots": SLOTS}
    farebox["deployments"][1] |= {"num_replicas": 2, "graceful_shutdown_timeout_s": 90}
    try:
        with serving(config, folder, haproxy=True) as made:
            yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def copied(adapter: Path, out: Path) -> Path:
    """The same weights under another digest."""
    shutil.copytree(adapter, out)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config, indent=len(out.name) + int(out.name[-1])))
    return out


async def ask(group: Cluster, models: Sequence[str], max_tokens: int, at_once: int, stream: bool = False) -> list[str]:
    """Every reply's whole text, in order; none may be refused."""
    gate = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=group.base_url, headers=bearer(group.key), timeout=120) as client:

        async def one(model: str) -> str:
            body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": max_tokens}
            async with gate:
                while True:
                    reply = await client.post(
                        "/v1/chat/completions", json=body | {"ignore_eos": True, "stream": stream}
                    )
                    if reply.status_code != 503 or "retry-after" not in reply.headers:
                        break
                    await asyncio.sleep(0.2)  # as a client's SDK does, where the machine is busy
            assert reply.status_code == 200, reply.text
            return reply.text

        return await asyncio.gather(*(one(model) for model in models))


def residents(group: Cluster) -> list[set[str]]:
    """By replica, the names of the adapters in its slots."""
    return [
        {str(identity).partition("@")[0] for identity in engine["adapters_resident"]}  # type: ignore[attr-defined]
        for engine in group.engines()
    ]


def test_repeats_reach_replica_with_adapter(group: Cluster) -> None:
    eventually(lambda: len(group.engines()) == 2)
    for model in ADAPTERS:
        asyncio.run(ask(group, [model], 2, at_once=1))
        eventually(lambda model=model: any(model in held for held in residents(group)))  # type: ignore[misc]
    first_loads = sum(engine["adapter_loads"] for engine in group.engines())
    assert first_loads == len(ADAPTERS)
    assert all(len(held) < len(ADAPTERS) for held in residents(group)), "they are spread"
    chosen = random.Random(1).choices(ADAPTERS, k=REPEATS)
    asyncio.run(ask(group, chosen, 2, at_once=6))
    misses = sum(engine["adapter_loads"] for engine in group.engines()) - first_loads
    assert misses <= REPEATS // 10, f"{misses} of {REPEATS} repeats had to load their adapter"


def test_hot_adapter_spreads(group: Cluster) -> None:
    asyncio.run(ask(group, ["adapter0"] * 64, 60, at_once=64))
    assert all("adapter0" in held for held in residents(group))


def all_run(group: Cluster) -> bool:
    engines = group.engines()
    return len(engines) == 2 and all(engine["running"] for engine in engines)


def test_draining_replica_finishes_streams(group: Cluster) -> None:
    async def scale_down_under_load() -> list[str]:
        config = json.loads(json.dumps(group.config))
        config["applications"][0]["deployments"][1]["num_replicas"] = 1
        (group.folder / "one.json").write_text(json.dumps(config))
        streams = asyncio.create_task(ask(group, ADAPTERS * 2, 1500, at_once=16, stream=True))
        await asyncio.to_thread(eventually, lambda: streams.done() or all_run(group), 60)
        await asyncio.to_thread(group.ask, f"deploy {group.folder / 'one.json'}")
        return await streams

    replies = asyncio.run(scale_down_under_load())
    cut = [reply[-300:] for reply in replies if not reply.rstrip().endswith("data: [DONE]")]
    assert not cut
    eventually(lambda: len(group.replica_pids("LoraReplica")) == 1, 60)
    assert group.account()["open_holds"] == 0
