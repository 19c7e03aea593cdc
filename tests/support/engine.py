"""Short ways to ask an engine and to collect its answers."""

import threading

from deployments.inference.native.engine import Engine
from deployments.inference.request import AdapterRef, GenerateRequest, OutputDelta, SamplingParams


class Collector:
    """Takes one request's pieces; ``wait`` returns when the last has come."""

    def __init__(self) -> None:
        self.pieces: list[OutputDelta] = []
        self._done = threading.Event()

    def __call__(self, piece: OutputDelta) -> None:
        assert not self._done.is_set(), "a piece after the last"
        self.pieces.append(piece)
        if piece.finish_reason is not None:
            self._done.set()

    def wait(self, seconds: float = 30) -> OutputDelta:
        assert self._done.wait(seconds), "no answer"
        return self.pieces[-1]

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for piece in self.pieces for token in piece.token_ids)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


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
    """A greedy request that doesn't stop early, unless told otherwise."""
    return GenerateRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=sampling or SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        adapter=adapter,
        fairness_key=fairness_key,
        time_to_live_s=time_to_live_s,
    )


def run(engine: Engine, *requests: GenerateRequest) -> list[Collector]:
    """Submit all at once and wait for all."""
    collectors = [Collector() for _ in requests]
    for one, collector in zip(requests, collectors, strict=True):
        engine.submit(one, collector)
    for collector in collectors:
        collector.wait()
    return collectors
