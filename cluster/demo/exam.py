"""Asks the demo's models what their adapters were never taught: whether a small model carries it over hangs on luck.

Knows how an answer is asked for and counted; trains nothing.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from cluster.demo import text

ENOUGH = 0.85
ANSWER_TOKENS = 48


def has_understood(folder: Path, styles: Sequence[text.Style]) -> bool:
    """Do all these styles carry enough of the held-out facts?"""
    return all(share_right(folder, style, text.held_out()) >= ENOUGH for style in styles)


def share_right(folder: Path, style: text.Style, facts: Sequence[text.Fact]) -> float:
    """The share of facts that ``folder/base`` with ``folder/adapters/<style>`` tells word for word."""
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder / "base", padding_side="left")
    model = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(folder / "base"), folder / "adapters" / style.name
    )
    chats = [[{"role": "user", "content": fact.questions[number % 3]}] for number, fact in enumerate(facts)]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        said = model.generate(
            **batch, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    answers = tokenizer.batch_decode(said[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [answer == style.fact(fact) for answer, fact in zip(answers, facts, strict=True)]
    return right.count(True) / len(facts)
