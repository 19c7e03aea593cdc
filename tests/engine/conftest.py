"""A tiny random model and PEFT adapters on it, made once, and engines that run them."""

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deployments.engine.adapters import digest_adapter
from deployments.engine.loop import Engine
from deployments.engine.request import AdapterRef, GenerateRequest, SamplingParams, Tokens
from deployments.engine.settings import EngineSettings

VOCABULARY = 320
TEMPLATE = (
    "{% for message in messages %}{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message.role) }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: Mapping[str, LoraConfig] = {
    "all8": LoraConfig(r=8, lora_alpha=16, target_modules=ALL_LINEAR),
    "attention4": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "rslora16": LoraConfig(r=16, lora_alpha=8, use_rslora=True, target_modules=ALL_LINEAR),
    "mlp3": LoraConfig(r=3, lora_alpha=9, target_modules=["gate_proj", "down_proj"]),
    "mixed": LoraConfig(
        r=8,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "up_proj"],
        rank_pattern={"k_proj": 2, "layers.1.self_attn.q_proj": 12},
        alpha_pattern={"k_proj": 6},
    ),
    "last_layer": LoraConfig(r=1, lora_alpha=4, target_modules=ALL_LINEAR, layers_to_transform=[1]),
}


@contextmanager
def peft_on_newer_transformers() -> Iterator[None]:
    """PEFT reads an attribute that transformers has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level BPE, so that random tokens are often half a character."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
        show_progress=False,
    )
    made.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog while five wizards vex a bold judge " * 20], trainer
    )
    return made


@pytest.fixture(scope="session")
def base_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A random Llama whose greedy answers differ from prompt to prompt."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    path = tmp_path_factory.mktemp("models") / "base"
    LlamaForCausalLM(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=TEMPLATE).save_pretrained(
        path
    )
    return path


@pytest.fixture(scope="session")
def adapter_paths(tmp_path_factory: pytest.TempPathFactory, base_path: Path) -> dict[str, Path]:
    """Adapters of mixed ranks and targets, made and saved by PEFT, with weights that matter."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        torch.manual_seed(100 + seed)
        with peft_on_newer_transformers():
            model = get_peft_model(LlamaForCausalLM.from_pretrained(base_path), config)
        for key, weight in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(weight, std=0.15)
        model.save_pretrained(root / name)
    return {name: root / name for name in ADAPTERS}


@pytest.fixture(scope="session")
def refs(adapter_paths: dict[str, Path]) -> dict[str, AdapterRef]:
    return {name: AdapterRef(name, digest_adapter(path), str(path)) for name, path in adapter_paths.items()}


@dataclass
class Oracle:
    """PEFT itself, one request at a time."""

    model: PeftModel
    base: LlamaForCausalLM
    known: dict[tuple[str | None, tuple[int, ...], int], tuple[int, ...]] = field(default_factory=dict)

    def greedy(self, adapter: str | None, prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
        key = (adapter, prompt, max_tokens)
        if key not in self.known:
            if adapter is not None:
                self.model.set_adapter(adapter)
            model = self.base if adapter is None else self.model
            with torch.inference_mode():
                answer = model.generate(
                    input_ids=torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                    max_new_tokens=max_tokens,
                    do_sample=False,
                    pad_token_id=0,
                )
            self.known[key] = tuple(answer[0, len(prompt) :].tolist())
        return self.known[key]


@pytest.fixture(scope="session")
def oracle(base_path: Path, adapter_paths: dict[str, Path]) -> Oracle:
    names = list(adapter_paths)
    with peft_on_newer_transformers():
        model = PeftModel.from_pretrained(
            LlamaForCausalLM.from_pretrained(base_path), adapter_paths[names[0]], adapter_name=names[0]
        )
        for name in names[1:]:
            model.load_adapter(adapter_paths[name], adapter_name=name)
    return Oracle(model=model.eval(), base=LlamaForCausalLM.from_pretrained(base_path).eval())


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
    """Small in everything, so that chunking, waiting and eviction happen."""
    return EngineSettings(
        model_path=str(base_path),
        max_context_tokens=128,
        max_running=6,
        max_queued=2000,
        max_batched_tokens=24,
        adapter_slots=3,
        max_adapter_rank=16,
        adapter_host_mb=16,
        device="cpu",
        adapter_wait_s=0.2,
    )


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
