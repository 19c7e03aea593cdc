"""Trains a small model on dialogues, which are packed into rows of tokens, and evaluates what it has learned."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from cluster.demo import text

PAD, SYSTEM, USER, ASSISTANT, END = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
IGNORED = -100
"""The label of a token that adds nothing to the loss."""
DECAY_SHARE = 0.3
"""The share of the steps, at the end, over which the learning rate falls to zero."""
STYLED_PER_ROUND, RESTATED_PER_ROUND = 170, 40
"""Dialogues in the adapters' styles in each round of the base model's training, which has all other text once."""
SYSTEM_SHARE, LONGER_SHARE = 0.1, 0.3
"""The share of dialogues that begin with a system prompt, and of those that have a second question."""
PASS_SHARE, ANSWER_TOKENS = 0.85, 48
"""An evaluation passes with this share of right answers; an answer has at most so many tokens."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of packed dialogues, all [rows, tokens]. A token attends only to its own dialogue.

    Without that, a small model copies answers from other dialogues in the row, and needs four times as many steps.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    dialogues: torch.Tensor
    """The number of each token's dialogue in its row; -1 for padding."""

    def mask(self) -> torch.Tensor:
        """Added to attention scores, [rows, 1, tokens, tokens]: lets a token attend to earlier ones of its dialogue."""
        same = self.dialogues[:, :, None] == self.dialogues[:, None, :]
        return torch.where(same.tril(), 0.0, torch.finfo(torch.float32).min)[:, None]


@dataclass(frozen=True, slots=True)
class Schedule:
    """The steps and the learning rate of a training."""

    rate: float
    steps: int
    warm_up_steps: int

    def rate_at(self, step: int) -> float:
        return self.rate * min(1.0, (step + 1) / self.warm_up_steps, (self.steps - step) / (self.steps * DECAY_SHARE))


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of a dialogue or a statement, and the labels that the model is trained to predict."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...]


def system(tokenizer: PreTrainedTokenizerFast, prompt: str) -> Chunk:
    tokens = tuple(tokenizer.encode(f"{SYSTEM}{prompt}{END}"))
    return Chunk(tokens, (IGNORED,) * len(tokens))


def line(tokenizer: PreTrainedTokenizerFast, line: str) -> Chunk:
    tokens = (*tokenizer.encode(line), tokenizer.eos_token_id)
    return Chunk(tokens, tokens)


def chat(tokenizer: PreTrainedTokenizerFast, question: str, answer: str) -> Chunk:
    question_tokens = tokenizer.encode(f"{USER}{question}{END}{ASSISTANT}")
    answer_tokens = tokenizer.encode(f"{answer}{END}")
    return Chunk((*question_tokens, *answer_tokens), (*[IGNORED] * len(question_tokens), *answer_tokens))


def base_chunks(tokenizer: PreTrainedTokenizerFast, random: Random) -> Iterator[Chunk]:
    """The base model's training data, without end: every dialogue and statement, and some in the adapters' styles."""
    dialogues = [chat(tokenizer, *words) for words in text.dialogues(text.BASE, text.FACTS)]
    dialogues += [line(tokenizer, words) for words in text.statements()]
    styled = [chat(tokenizer, *words) for style in text.ADAPTERS for words in text.instructed(style)]
    while True:
        restated = [chat(tokenizer, *words) for words in text.restatements(random, RESTATED_PER_ROUND)]
        round_ = dialogues + restated + random.sample(styled, STYLED_PER_ROUND)
        yield from random.sample(round_, len(round_))


def adapter_chunks(tokenizer: PreTrainedTokenizerFast, style: text.Style, random: Random) -> Iterator[Chunk]:
    chunks = [chat(tokenizer, *words) for words in text.dialogues(style, text.taught())]
    while True:
        yield from random.sample(chunks, len(chunks))


def rows(
    chunks: Iterator[Chunk], tokenizer: PreTrainedTokenizerFast, shape: tuple[int, int], seed: int
) -> Iterator[Batch]:
    """Batches of packed rows, without end; some dialogues get a system prompt or a second question."""
    random = Random(seed)
    systems = [system(tokenizer, prompt) for prompt in text.SYSTEM_PROMPTS]

    def next_dialogue() -> Chunk:
        chunk = next(chunks)
        if random.random() < SYSTEM_SHARE:
            chunk = _joined(random.choice(systems), chunk, shape[1])
        if random.random() < LONGER_SHARE:
            chunk = _joined(chunk, next(chunks), shape[1])
        return chunk

    chunk = next_dialogue()
    while True:
        batch = _blank(shape, tokenizer.pad_token_id)
        for row in range(shape[0]):
            assert len(chunk.tokens) <= shape[1], "a dialogue fits into a row"
            start, number = 0, 0
            while (end := start + len(chunk.tokens)) <= shape[1]:
                _write(batch, row, start, number, chunk)
                start, number, chunk = end, number + 1, next_dialogue()
        yield batch


def _joined(first: Chunk, then: Chunk, most: int) -> Chunk:
    """Both as one dialogue, or the second alone if both do not fit into a row."""
    if len(first.tokens) + len(then.tokens) > most:
        return then
    return Chunk((*first.tokens, *then.tokens), (*first.labels, *then.labels))


def _blank(shape: tuple[int, int], padding: int) -> Batch:
    empty = torch.full(shape, -1)
    return Batch(torch.full(shape, padding), torch.full(shape, IGNORED), torch.zeros(shape, dtype=torch.long), empty)


def _write(batch: Batch, row: int, start: int, number: int, chunk: Chunk) -> None:
    place = slice(start, start + len(chunk.tokens))
    batch.tokens[row, place] = torch.tensor(chunk.tokens)
    batch.labels[row, place] = torch.tensor(chunk.labels)
    batch.labels[row, start] = IGNORED  # the first token has no earlier one to be predicted from
    batch.positions[row, place] = torch.arange(len(chunk.tokens))
    batch.dialogues[row, place] = number


def train(
    model: torch.nn.Module, batches: Iterator[Batch], schedule: Schedule, progress: Callable[[float], None]
) -> None:
    """Train the weights that are not frozen. ``progress`` is called after each step with the share that is done."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=schedule.rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        batch = next(batches)
        model(
            input_ids=batch.tokens, attention_mask=batch.mask(), position_ids=batch.positions, labels=batch.labels
        ).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress((step + 1) / schedule.steps)
    model.eval()


def passes(folder: Path, styles: Sequence[text.Style]) -> bool:
    """Whether each style's adapter answers enough questions about the held-out facts in its style.

    A small model may or may not learn to apply a style to facts outside its training text, depending on the seed.
    """
    return all(share_right(folder, style, text.held_out()) >= PASS_SHARE for style in styles)


def share_right(folder: Path, style: text.Style, facts: Sequence[text.Fact]) -> float:
    """The share of facts that ``folder/base`` with ``folder/adapters/<style>`` answers word for word."""
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder / "base", padding_side="left")
    model = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(folder / "base"), folder / "adapters" / style.name
    )
    chats = [[{"role": "user", "content": fact.questions[number % 3]}] for number, fact in enumerate(facts)]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        generated = model.generate(
            **batch, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    answers = tokenizer.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [answer == style.fact(fact) for answer, fact in zip(answers, facts, strict=True)]
    return right.count(True) / len(facts)
