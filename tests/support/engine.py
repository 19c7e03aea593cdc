"""Make requests of an engine and collect their output."""

import threading

from deployments.inference.native.engine import Engine
from deployments.inference.request import AdapterRef, GenerateRequest, OutputDelta, SamplingParams


class Collector:
    """Receives one request's deltas; ``wait`` returns the last one."""

    def __init__(self) -> None:
        self.deltas: list[OutputDelta] = []
        self._done = threading.Event()

    def __call__(self, delta: OutputDelta) -> None:
        assert not self._done.is_set(), "a delta after the last"
        self.deltas.append(delta)
        if delta.finish_reason is not None:
            self._done.set()

    def wait(self, seconds: float = 30) -> OutputDelta:
        assert self._done.wait(seconds), "no last delta"
        return self.deltas[-1]

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for delta in self.deltas for token in delta.token_ids)

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)


def request(
    request_id: str,
    prompt: tuple[int, ...] = (5, 6, 7),
    adapter: AdapterRef | None = None,
    *,
    fairness_key: str = "",
    time_to_live_s: float = 60.0,
    sampling: SamplingParams | None = None,
    max_tokens: int = 8,
) -> GenerateRequest:
    """A request; greedy and without end token, unless ``sampling`` is given."""
    return GenerateRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=sampling or SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        adapter=adapter,
        fairness_key=fairness_key,
        time_to_live_s=time_to_live_s,
    )


def run(engine: Engine, *requests: GenerateRequest) -> list[Collector]:
    """Submit these requests at once, and wait until all have ended."""
    collectors = [Collector() for _ in requests]
    for one, collector in zip(requests, collectors, strict=True):
        engine.submit(one, collector)
    for collector in collectors:
        collector.wait()
    return collectors


class RecordedRows:
    """KV cache rows that record what is done to them."""

    def __init__(self) -> None:
        self.copies: list[tuple[int, int, int]] = []
        self.cleared: list[int] = []

    def copy(self, source: int, target: int, rows: int) -> None:
        self.copies.append((source, target, rows))

    def clear(self, slot: int) -> None:
        self.cleared.append(slot)
