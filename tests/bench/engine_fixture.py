"""The model and adapters that the engine's benchmarks run on: a random 28-million-parameter Llama and r=16 adapters.

Made once, kept in a folder that git ignores; the same files serve every peer.
"""

import random
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deployments.inference.adapters import digest_adapter
from deployments.inference.request import AdapterRef

SCRATCH = Path(".farebox/bench/engine")
VOCABULARY = 4096
CONTEXT = 1024
ADAPTERS = 16
RANK = 16
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Fixture:
    """Folders in Hugging Face's and PEFT's formats."""

    base: Path
    adapters: tuple[Path, ...]

    @property
    def refs(self) -> list[AdapterRef]:
        return [AdapterRef(path.name, digest_adapter(path), str(path)) for path in self.adapters]


def make(scratch: Path = SCRATCH) -> Fixture:
    """Make what is missing."""
    base = scratch / "base"
    if not (base / "model.safetensors").is_file():
        _make_base(base)
    paths = tuple(scratch / "adapters" / f"adapter{i}" for i in range(ADAPTERS))
    for i, path in enumerate(paths):
        if not (path / "adapter_model.safetensors").is_file():
            _make_adapter(base, path, seed=100 + i)
    return Fixture(base, paths)


def prompts(count: int, length: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Random prompts, no two with a common start."""
    rng = random.Random(f"{seed} {length}")
    return [tuple(rng.randrange(4, VOCABULARY) for _ in range(length)) for _ in range(count)]


def _make_base(path: Path) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), eos_token="<|end|>").save_pretrained(path)


def _tokenizer() -> Tokenizer:
    """Every byte, then made-up words up to the vocabulary's size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|end|>", *alphabet]
    words += [f"{first}{second}" for first in alphabet for second in alphabet][: VOCABULARY - len(words)]
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    return made


def _make_adapter(base: Path, path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=ALL_LINEAR)
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
        for key, weight in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(weight, std=0.05)
        model.save_pretrained(path)
