"""Ten thousand registered adapters, a few slots, requests that follow Zipf's law: memory, hits, loads and stalls."""

import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from deployments.inference.adapters import local_adapter
from deployments.inference.native.engine import Engine
from deployments.inference.native.settings import EngineSettings
from deployments.inference.request import AdapterRef, GenerateRequest, OutputDelta, SamplingParams
from tests.bench import engine_fixture, figures
from tests.bench.engine_fixture import Fixture
from tests.bench.engine_peers import Vllm
from tests.bench.figures import Row

REGISTERED, SLOTS, HOST_MB, REQUESTS, CLIENTS = 10_000, 32, 64, 2_000, 24
RANK, OUT = 8, 12
T = TypeVar("T")


def register(fixture: Fixture, folder: Path) -> list[AdapterRef]:
    """Adapters with different digests: each has its own configuration, and the weights of one of sixteen."""
    torch.manual_seed(0)
    if not (folder / str(REGISTERED - 1)).is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(fixture.base), LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"])
        )
        for i in range(16):
            for key, weight in model.named_parameters():
                if "lora_" in key:
                    torch.nn.init.normal_(weight, std=0.05)
            model.save_pretrained(folder / "weights" / str(i))
        config = json.loads((folder / "weights" / "0" / "adapter_config.json").read_text())
        for i in range(REGISTERED):
            (folder / str(i)).mkdir()
            (folder / str(i) / "adapter_config.json").write_text(json.dumps(config | {"revision": str(i)}))
            name = "adapter_model.safetensors"
            os.link(folder / "weights" / str(i % 16) / name, folder / str(i) / name)
    return [local_adapter(folder / str(i)) for i in range(REGISTERED)]


class Timed:
    """Seconds of every call of a function."""

    def __init__(self, call: Callable[..., T]) -> None:
        self._call = call
        self.seconds: list[float] = []

    def __call__(self, *args: object) -> T:
        started = time.perf_counter()
        try:
            return self._call(*args)
        finally:
            self.seconds.append(time.perf_counter() - started)


class Steady:
    """Sends one request of the base model after the other, and records the gaps between their tokens."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._count = 0
        self._last = 0.0
        self.gaps: list[float] = []
        self.is_over = False

    def begin(self) -> None:
        self._count += 1
        self._last = 0.0
        params = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
        request = GenerateRequest(f"steady{self._count}", (5, 6, 7), params, fairness_key="steady", time_to_live_s=600)
        self._engine.submit(request, self._receive)

    def _receive(self, delta: OutputDelta) -> None:
        now = time.perf_counter()
        if self._last:
            self.gaps.append(now - self._last)
        self._last = now
        if delta.finish_reason is not None and not self.is_over:
            self.begin()


def load(engine: Engine, refs: list[AdapterRef]) -> None:
    """Closed loop: ``CLIENTS`` clients, each with one request at a time."""
    rng = random.Random(3)
    weights = list(accumulate(1 / (rank + 1) for rank in range(len(refs))))
    order = list(range(len(refs)))
    rng.shuffle(order)
    wanted = [refs[order[i]] for i in rng.choices(range(len(refs)), cum_weights=weights, k=REQUESTS)]
    clients, done = threading.Semaphore(CLIENTS), threading.Semaphore(0)
    params = SamplingParams(max_tokens=OUT, temperature=0.0, ignore_eos=True)
    failures: list[str] = []

    def receive(delta: OutputDelta) -> None:
        if delta.finish_reason is not None:
            if delta.error:
                failures.append(delta.error)
            clients.release()
            done.release()

    for i, (ref, prompt) in enumerate(zip(wanted, engine_fixture.prompts(REQUESTS, 16), strict=True)):
        clients.acquire()
        engine.submit(GenerateRequest(str(i), prompt, params, ref, str(i % 7), time_to_live_s=600), receive)
    for _ in wanted:
        done.acquire()
    assert not failures, failures[0]


def table(fixture: Fixture, vllm: Vllm | None, rounds: int) -> str:
    refs = register(fixture, engine_fixture.SCRATCH / "registered")
    engine = Engine(
        EngineSettings(
            model_path=str(fixture.base),
            max_running=16,
            max_batched_tokens=256,
            adapter_slots=SLOTS,
            max_adapter_rank=RANK,
            adapter_host_mb=HOST_MB,
            adapter_root=str(engine_fixture.SCRATCH),
        )
    )
    steps, loads = Timed(engine._model.forward), Timed(engine._loader._load)
    engine._model.forward, engine._loader._load = steps, loads  # type: ignore[method-assign]
    engine.start()
    steady = Steady(engine)
    steady.begin()
    process, before = psutil.Process(), 0
    for part in (refs[:200], refs):
        load(engine, part)
        before = before or process.memory_info().rss
    grown = (process.memory_info().rss - before) / 2**20
    steady.is_over = True
    stats = engine.stats()
    engine.stop()
    usual, step, gap = figures.percentile(steps.seconds, 50), max(steps.seconds), max(steady.gaps)
    took = [seconds * 1000 for seconds in loads.seconds]
    host_hits = stats.adapter_loads - stats.adapter_disk_loads
    rows = [
        Row("registered adapters; slots; host memory", f"{REGISTERED:,}; {SLOTS}; {HOST_MB} MiB"),
        Row("requests whose adapter was in a slot", f"{stats.adapter_hits / stats.adapter_requests:.0%}"),
        Row("loads; of those from host memory", f"{stats.adapter_loads:,}; {host_hits / stats.adapter_loads:.0%}"),
        Row("a load, p50 and p99", f"{figures.percentile(took, 50):.1f} and {figures.percentile(took, 99):.1f} ms"),
        figures.at_most("adapters in host memory", stats.adapter_host_bytes / 2**20, HOST_MB, "MiB"),
        figures.at_most("growth of the process from 200 adapters to all", grown, HOST_MB, "MiB"),
        Row("a step, p50 and longest", f"{usual * 1000:.0f} and {step * 1000:.0f} ms"),
        figures.at_most(
            "longest wait of a running decode over the longest step", gap / step, 2, reach="<= one step more"
        ),
    ]
    return figures.verdicts(rows)
