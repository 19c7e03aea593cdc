"""Kill the roles of a whole farebox under Ray, one after another, while clients read their streams.

It is started as an operator does: Ray Serve behind HAProxy, the engine with a small model made here, the store, the
supervisor.
"""

import asyncio
import json
import random
import tempfile
from collections import Counter
from pathlib import Path

import yaml

from cluster.demo.models import Recipe, make_models
from cluster.demo.training import Schedule
from tests.chaos.clients import NOT_OURS, Seen, ask_until, nanos_of
from tests.chaos.table import Row
from tests.e2e import books
from tests.support.stack import REPO, Stack, running
from tests.support.waiting import eventually, until

NAME = "whole-stack"
KILLS = {"LoraReplica": 20, "Gateway": 20, "BillingActor": 20}
APPLICATION = {"LoraReplica": "farebox", "Gateway": "farebox", "BillingActor": "billing"}
MODELS = ("farebox-base", "pirate", "support")
TENANTS = ("prepaid", "payg", "pro")
CLIENTS, STREAMING = 8, 3
REFUSALS = {NOT_OURS, "replica_lost", "overloaded", "metering_unavailable"}
BACK_S, FLUSH_S = 90.0, 120.0
SEED = 20_261_130
BRIEF = Schedule(rate=1e-3, steps=2, warm_up_steps=1)
SMALL = Recipe(hidden=32, layers=1, heads=2, intermediate=32, rows=2, base=BRIEF, adapter=BRIEF)
"""Its answers make no sense, and come as fast as those of a large model on a GPU."""


def run() -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="chaos") as name:
        folder = Path(name)
        make_models(folder / "small", recipe=SMALL)
        with running(folder / "fb", _config(folder), folder / "unused") as stack:
            return [_kill_often(stack, role, KILLS[role]) for role in KILLS]


def _config(folder: Path) -> Path:
    """The shipped configuration with the small models, one replica, shorter leases and quicker flushes."""
    raw = yaml.safe_load((REPO / "serve_config.yaml").read_text().replace(".farebox/models", str(folder / "small")))
    farebox, billing = raw["applications"]
    farebox["args"] |= {"lease_s": 6, "checkpoint_s": 0.5}
    billing["args"] |= {"flush_interval_s": 1, "expire_interval_s": 1}
    farebox["deployments"][1]["autoscaling_config"]["max_replicas"] = 1
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def _kill_often(stack: Stack, role: str, kills: int) -> Row:
    seen = Seen()
    asyncio.run(_storm(stack, role, kills, seen))
    books.wait_until_flushed(stack, FLUSH_S)
    refusals = f"{dict(seen.statuses)} {dict(seen.codes)}"
    assert set(seen.statuses) <= {200, 500, 503}, f"statuses that are not 200, 500 or 503: {refusals}"
    assert set(seen.codes) <= REFUSALS, f"an unexpected refusal: {refusals}"
    assert seen.receipts, "no client was served between the kills"
    return _row(stack, f"{role} killed under Ray, mid-stream", kills, seen)


async def _storm(stack: Stack, role: str, kills: int, seen: Seen) -> None:
    stopped = asyncio.Event()
    keys = [stack.tenants[name].api_key for name in TENANTS]
    load = asyncio.create_task(ask_until(stopped, stack.base_url, keys, seen, CLIENTS, SEED, _body))
    try:
        for _ in range(kills):
            await _streams(seen, load)
            await asyncio.to_thread(_kill, stack, f"{APPLICATION[role]}:{role}")
        await _streams(seen, load)
    finally:
        stopped.set()
        await load


def _body(chance: random.Random) -> dict[str, object]:
    """A request, mostly a stream that is long enough to be cut in its middle."""
    return {
        "model": chance.choice(MODELS),
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "max_tokens": chance.randint(100, 300),
        "ignore_eos": True,
        "stream": chance.random() < 0.75,
    }


async def _streams(seen: Seen, load: asyncio.Task[None]) -> None:
    """Wait until enough clients are in the middle of streams that began after the last kill."""
    began = seen.begun

    def enough_stream() -> bool:
        assert not load.done(), "the clients stopped"
        return seen.streaming >= STREAMING and seen.begun >= began + STREAMING

    await until(enough_stream, BACK_S)


def _kill(stack: Stack, title: str) -> None:
    """Kill a process and wait until it is gone, so that the next one killed is another."""
    victim = stack.kill(title)
    eventually(lambda: victim.pid not in [one.pid for one in stack.processes(title)])


def _row(stack: Stack, name: str, tries: int, seen: Seen) -> Row:
    """Compare receipts with records, and all other books by ``farebox reconcile``."""
    records = [record for tenant in stack.tenants.values() for record in books.records(stack, tenant)]
    charged = {str(record["record_id"]): nanos_of(str(record["charged_usd"])) for record in records}
    lost = sum(charged.get(record_id) != cost for record_id, cost in seen.receipts.items())
    counts = Counter(str(record["record_id"]) for record in records)
    done = stack.cli("reconcile", "--json", "--calls-per-minute", "120", check=False)
    report = json.loads(done.stdout)
    difference = sum(abs(int(row["difference"])) for row in report["drift"] if row["unit"] == "nanos")
    assert done.returncode == 0 or difference, f"reconcile failed: {done.stdout}"
    return Row(name, tries, lost, sum(count - 1 for count in counts.values()), difference)
