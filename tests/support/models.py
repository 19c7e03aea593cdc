"""A tiny random model, adapters made by PEFT, PEFT itself as the oracle, and small engine settings."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deployments.inference.native.settings import EngineSettings

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


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE, so that random tokens are often incomplete characters."""
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


def make_base(path: Path, tokenizer: Tokenizer) -> Path:
    """A random Llama whose greedy tokens differ from prompt to prompt."""
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
    LlamaForCausalLM(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=TEMPLATE).save_pretrained(
        path
    )
    return path


def make_adapters(root: Path, base_path: Path) -> dict[str, Path]:
    """Adapters of mixed ranks and targets, made and saved by PEFT, with weights that change the greedy tokens."""
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        torch.manual_seed(100 + seed)
        with peft_on_newer_transformers():
            model = get_peft_model(LlamaForCausalLM.from_pretrained(base_path), config)
        for key, weight in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(weight, std=0.15)
        model.save_pretrained(root / name)
    return {name: root / name for name in ADAPTERS}


@dataclass
class Oracle:
    """PEFT, one request at a time. Its greedy tokens are computed once."""

    model: PeftModel
    base: LlamaForCausalLM
    computed: dict[tuple[str | None, tuple[int, ...], int], tuple[int, ...]] = field(default_factory=dict)

    def logits(self, adapter: str | None, tokens: tuple[int, ...]) -> torch.Tensor:
        """Logits after the last of these tokens."""
        if adapter is not None:
            self.model.set_adapter(adapter)
        model = self.base if adapter is None else self.model
        with torch.inference_mode():
            last: torch.Tensor = model(input_ids=torch.tensor([tokens])).logits[0, -1]
        return last

    def greedy(self, adapter: str | None, prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
        key = (adapter, prompt, max_tokens)
        if key not in self.computed:
            if adapter is not None:
                self.model.set_adapter(adapter)
            model = self.base if adapter is None else self.model
            with torch.inference_mode():
                output = model.generate(
                    input_ids=torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                    max_new_tokens=max_tokens,
                    do_sample=False,
                    pad_token_id=0,
                )
            self.computed[key] = tuple(output[0, len(prompt) :].tolist())
        return self.computed[key]


def make_oracle(base_path: Path, adapter_paths: Mapping[str, Path]) -> Oracle:
    names = list(adapter_paths)
    with peft_on_newer_transformers():
        model = PeftModel.from_pretrained(
            LlamaForCausalLM.from_pretrained(base_path), adapter_paths[names[0]], adapter_name=names[0]
        )
        for name in names[1:]:
            model.load_adapter(adapter_paths[name], adapter_name=name)
    return Oracle(model=model.eval(), base=LlamaForCausalLM.from_pretrained(base_path).eval())


def small_settings(base_path: Path) -> EngineSettings:
    """Small sizes, so that chunked prefill, waiting and eviction happen."""
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
