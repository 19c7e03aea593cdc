"""A tiny random model and PEFT adapters on it, made once, and engines that run them."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from deployments.engine.adapters import digest_adapter
from deployments.engine.loop import Engine
from deployments.engine.request import AdapterRef, GenerateRequest, SamplingParams, Tokens
from deployments.engine.settings import EngineSettings
from tests.engine.models import Oracle, make_adapters, make_base, make_oracle, make_tokenizer, small_settings


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="session")
def base_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base", tokenizer)


@pytest.fixture(scope="session")
def adapter_paths(tmp_path_factory: pytest.TempPathFactory, base_path: Path) -> dict[str, Path]:
    return make_adapters(tmp_path_factory.mktemp("adapters"), base_path)


@pytest.fixture(scope="session")
def refs(adapter_paths: dict[str, Path]) -> dict[str, AdapterRef]:
    return {name: AdapterRef(name, digest_adapter(path), str(path)) for name, path in adapter_paths.items()}


@pytest.fixture(scope="session")
def oracle(base_path: Path, adapter_paths: dict[str, Path]) -> Oracle:
    return make_oracle(base_path, adapter_paths)


class Collector:
    """Takes one request's pieces; ``wait`` returns when the last has come."""

    def __init__(self) -> None:
        self.pieces: list[Tokens] = []
        self._done = threading.Event()

    def __call__(self, piece: Tokens) -> None:
        assert not self._done.is_set(), "a piece after the last"
        self.pieces.append(piece)
        if piece.finish_reason is not None:
            self._done.set()

    def wait(self, seconds: float = 30) -> Tokens:
        assert self._done.wait(seconds), "no answer"
        return self.pieces[-1]

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for piece in self.pieces for token in piece.token_ids)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@pytest.fixture(scope="session")
def settings(base_path: Path) -> EngineSettings:
    return small_settings(base_path)


@pytest.fixture
def start() -> Iterator[Callable[[EngineSettings], Engine]]:
    """Starts engines, and stops them at the end."""
    engines: list[Engine] = []

    def start_engine(settings: EngineSettings) -> Engine:
        engine = Engine(settings)
        engines.append(engine)
        engine.start()
        return engine

    yield start_engine
    for engine in engines:
        engine.stop()


@pytest.fixture
def engine(start: Callable[[EngineSettings], Engine], settings: EngineSettings) -> Engine:
    return start(settings)


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
