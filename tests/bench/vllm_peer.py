"""vLLM in a process of its own: reads commands as JSON lines on stdin, and prints replies after ``@@``.

It imports nothing of Farebox, because it runs in a Python environment of its own.
"""

import json
import os
import sys
import time
from typing import Any

REPLY = "@@"


def reply(value: object) -> None:
    print(REPLY + json.dumps(value), flush=True)


class Peer:
    """One ``LLM`` with LoRA, greedy."""

    def __init__(self, base: str, adapters: list[str], context: int, rank: int) -> None:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        self._params = SamplingParams
        self._loras = [LoRARequest(f"adapter{i}", i + 1, path) for i, path in enumerate(adapters)]
        self._llm = LLM(
            model=base,
            enable_lora=True,
            max_loras=len(adapters) + 1,
            max_lora_rank=rank,
            max_model_len=context,
            max_num_seqs=16,
            dtype="float32",
            enable_prefix_caching=False,
            disable_log_stats=True,
        )

    def _sampling(self, out: int) -> Any:
        return self._params(temperature=0.0, max_tokens=out, ignore_eos=True, detokenize=False)

    def _lora(self, adapter: int | None) -> Any:
        return None if adapter is None else self._loras[adapter]

    def batch(self, prompts: list[list[int]], adapters: list[int | None], out: int) -> dict[str, object]:
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        loras = [self._lora(adapter) for adapter in adapters]
        started = time.process_time()
        answers = self._llm.generate(asked, self._sampling(out), lora_request=loras, use_tqdm=False)
        cpu_s = time.process_time() - started
        return {"cpu_s": cpu_s, "tokens": [list(answer.outputs[0].token_ids) for answer in answers]}

    def arrivals(self, requests: list[dict[str, Any]]) -> dict[str, object]:
        """The time of every token, in seconds after its request."""
        engine, waiting, seen = self._llm.llm_engine, list(requests), {}
        times: list[list[float]] = [[] for _ in requests]
        started = time.perf_counter()
        while waiting or engine.has_unfinished_requests():
            now = time.perf_counter() - started
            while waiting and waiting[0]["at"] <= now:
                one = waiting.pop(0)
                lora = self._lora(one["adapter"])
                prompt = {"prompt_token_ids": one["prompt"]}
                engine.add_request(str(one["id"]), prompt, self._sampling(one["out"]), lora_request=lora)
            if not engine.has_unfinished_requests():
                time.sleep(0.001)
                continue
            for output in engine.step():
                index = int(output.request_id.split("-")[0])
                moment = time.perf_counter() - started - requests[index]["at"]
                count = len(output.outputs[0].token_ids)
                times[index] += [moment] * (count - seen.get(index, 0))
                seen[index] = count
        return {"times": times}


def main() -> None:
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        HF_HUB_OFFLINE="1",
        VLLM_LOGGING_LEVEL="ERROR",
    )
    peer = Peer(**json.loads(sys.stdin.readline()))
    import torch

    torch.set_num_threads(1)
    reply("ready")
    for line in sys.stdin:
        asked = json.loads(line)
        work = {"batch": peer.batch, "arrivals": peer.arrivals}[asked.pop("do")]
        reply(work(**asked))


if __name__ == "__main__":
    main()
