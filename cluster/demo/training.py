"""Teaches words to a small model: dialogues become rows of tokens, rows become steps.

Knows how to train; knows neither which models the demo has nor where they are kept.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import torch
from transformers import PreTrainedTokenizerFast

from cluster.demo import text

PAD, SYSTEM, USER, ASSISTANT, END = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
IGNORED = -100
FALL = 0.3
"""Share of the steps over which the rate falls to nothing."""
STYLED_PER_ROUND, RESTATED_PER_ROUND = 170, 40
"""Dialogues in the adapters' styles that the base model reads for each time it reads everything else."""
SYSTEM_SHARE, LONGER_SHARE = 0.1, 0.3
"""Dialogues that begin with a system prompt, and those that go on with a second question."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of dialogues, each dialogue blind to the others in its row: all are [rows, tokens].

    Without that a small model looks for its answers among the neighbours, and needs four times as long to learn.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    """A label of -100 teaches nothing."""
    positions: torch.Tensor
    dialogues: torch.Tensor
    """The number of each token's dialogue in its row; -1 for padding."""

    def mask(self) -> torch.Tensor:
        """Added to attention scores, [rows, 1, tokens, tokens]: a token sees the earlier ones of its dialogue."""
        same = self.dialogues[:, :, None] == self.dialogues[:, None, :]
        return torch.where(same.tril(), 0.0, torch.finfo(torch.float32).min)[:, None]


@dataclass(frozen=True, slots=True)
class Course:
    """How long to learn and how fast."""

    rate: float
    steps: int
    warm_up_steps: int

    def rate_at(self, step: int) -> float:
        return self.rate * min(1.0, (step + 1) / self.warm_up_steps, (self.steps - step) / (self.steps * FALL))


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens that stay together in a row, and what the model is to learn of them."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...]


def system(tokenizer: PreTrainedTokenizerFast, prompt: str) -> Chunk:
    tokens = tuple(tokenizer.encode(f"{SYSTEM}{prompt}{END}"))
    return Chunk(tokens, (IGNORED,) * len(tokens))


def line(tokenizer: PreTrainedTokenizerFast, line: str) -> Chunk:
    tokens = (*tokenizer.encode(line), tokenizer.eos_token_id)
    return Chunk(tokens, tokens)


def chat(tokenizer: PreTrainedTokenizerFast, question: str, answer: str) -> Chunk:
    asked = tokenizer.encode(f"{USER}{question}{END}{ASSISTANT}")
    said = tokenizer.encode(f"{answer}{END}")
    return Chunk((*asked, *said), (*[IGNORED] * len(asked), *said))


def base_chunks(tokenizer: PreTrainedTokenizerFast, random: Random) -> Iterator[Chunk]:
    """What the base model reads, for ever: every dialogue and statement, and some in the adapters' styles."""
    known = [chat(tokenizer, *words) for words in text.dialogues(text.BASE, text.FACTS)]
    known += [line(tokenizer, words) for words in text.statements()]
    styled = [chat(tokenizer, *words) for style in text.ADAPTERS for words in text.instructed(style)]
    while True:
        restated = [chat(tokenizer, *words) for words in text.restatements(random, RESTATED_PER_ROUND)]
        read = known + restated + random.sample(styled, STYLED_PER_ROUND)
        yield from random.sample(read, len(read))


def adapter_chunks(tokenizer: PreTrainedTokenizerFast, style: text.Style, random: Random) -> Iterator[Chunk]:
    chunks = [chat(tokenizer, *words) for words in text.dialogues(style, text.taught())]
    while True:
        yield from random.sample(chunks, len(chunks))


def rows(
    chunks: Iterator[Chunk], tokenizer: PreTrainedTokenizerFast, shape: tuple[int, int], seed: int
) -> Iterator[Batch]:
    """Batches of rows filled with dialogues, for ever; some begin with a system prompt, some have two questions."""
    random = Random(seed)
    systems = [system(tokenizer, prompt) for prompt in text.SYSTEM_PROMPTS]

    def introduced() -> Chunk:
        chunk = next(chunks)
        if random.random() < SYSTEM_SHARE:
            chunk = _joined(random.choice(systems), chunk, shape[1])
        if random.random() < LONGER_SHARE:
            chunk = _joined(chunk, next(chunks), shape[1])
        return chunk

    chunk = introduced()
    while True:
        batch = _blank(shape, tokenizer.pad_token_id)
        for row in range(shape[0]):
            assert len(chunk.tokens) <= shape[1], "a dialogue fits into a row"
            start, number = 0, 0
            while (end := start + len(chunk.tokens)) <= shape[1]:
                _write(batch, row, start, number, chunk)
                start, number, chunk = end, number + 1, introduced()
        yield batch


def _joined(first: Chunk, then: Chunk, most: int) -> Chunk:
    """Both as one dialogue, or the second alone where that would be too long."""
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
    batch.labels[row, start] = IGNORED  # nothing comes before the first token that it could follow from
    batch.positions[row, place] = torch.arange(len(chunk.tokens))
    batch.dialogues[row, place] = number


def train(model: torch.nn.Module, batches: Iterator[Batch], course: Course, stepped: Callable[[float], None]) -> None:
    """Train what is not frozen; ``stepped`` is told after each step which share of all steps is done."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=course.rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(course.steps):
        for group in optimizer.param_groups:
            group["lr"] = course.rate_at(step)
        batch = next(batches)
        model(
            input_ids=batch.tokens, attention_mask=batch.mask(), position_ids=batch.positions, labels=batch.labels
        ).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        stepped((step + 1) / course.steps)
    model.eval()
