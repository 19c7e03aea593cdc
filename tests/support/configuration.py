"""A folder with the shipped configuration file and models that fit it, for tests of its check."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from transformers import LlamaConfig

from cluster.checking.check import check
from cluster.checking.findings import CheckReport
from deployments.inference.adapters import CONFIG_FILE, WEIGHTS_FILE

ADAPTERS = ("pirate", "yaml", "support")
HIDDEN = 16


def make_base(folder: Path) -> None:
    LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)


def make_adapter(folder: Path, *, hidden: int = HIDDEN, rank: int = 8, fill: float = 0.5) -> Path:
    folder.mkdir(parents=True)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {
        f"{module}.lora_A.weight": np.full((rank, hidden), fill, np.float32),
        f"{module}.lora_B.weight": np.full((hidden, rank), fill, np.float32),
    }
    save_file(weights, folder / WEIGHTS_FILE)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return folder


class Workspace:
    """A folder with the shipped configuration and models that fit it."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder, self.text = folder, text
        self.models = folder / ".farebox" / "models"
        make_base(self.models / "base")
        for number, name in enumerate(ADAPTERS):
            make_adapter(self.models / "adapters" / name, fill=number + 0.5)

    @property
    def file(self) -> Path:
        path = self.folder / "serve_config.yaml"
        path.write_text(self.text)
        return path

    def edit(self, old: str, new: str) -> None:
        assert old in self.text, f"the shipped file no longer has {old!r}"
        self.text = self.text.replace(old, new, 1)

    def line_of(self, text: str) -> int:
        return 1 + next(number for number, line in enumerate(self.text.splitlines()) if text in line)

    def check(self) -> CheckReport:
        return check(self.file)

    def only_error(self) -> tuple[str, str, int]:
        """Place, problem and line of the one error that the check finds."""
        report = self.check()
        assert len(report.errors) == 1, [str(finding) for finding in report.errors]
        assert not report.is_valid
        return report.errors[0].where, report.errors[0].problem, report.errors[0].line
