"""Teaches words to a small model: dialogues become rows of tokens, rows become steps.

Knows how to train; knows neither which models the demo has nor where they are kept.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import torch
from transformers import PreTrainedTokenizerFast

from cluster.demo import text

PAD, SYSTEM, USER, ASSISTANT, END = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
IGNORED = -100
LOSSES = 25
"""Losses whose mean is compared with ``Course.enough_loss``."""
STYLED_PER_ROUND, RESTATED_PER_ROUND = 170, 70
"""Dialogues in the adapters' styles that the base model reads for each time it reads everything else."""
SYSTEM_SHARE = 0.3
"""Rows that begin with a system prompt."""

Batch = tuple[torch.Tensor, torch.Tensor]
"""Token ids and labels, both [rows, tokens]; a label of -100 teaches nothing."""


@dataclass(frozen=True, slots=True)
class Course:
    """How long to learn and how fast.

    At the full rate until the loss is low enough, or ``most_steps``; then the rate falls to nothing. A small
    model understands its text quite suddenly, and not at the same step on every machine.
    """

    rate: float
    most_steps: int
    settle_steps: int
    warm_up_steps: int
    enough_loss: float = 0.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens that stay together in a row, and what the model is to learn of them."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...]


def system(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    tokens: list[int] = tokenizer.encode(f"{SYSTEM}{prompt}{END}")
    return tokens


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
    """Batches of rows filled with chunks, for ever: several dialogues in a row are one long one."""
    random = Random(seed)
    systems = [system(tokenizer, prompt) for prompt in text.SYSTEM_PROMPTS]
    chunk = next(chunks)
    while True:
        tokens = torch.full(shape, tokenizer.pad_token_id)
        labels = torch.full(shape, IGNORED)
        for row in range(shape[0]):
            filled = list(random.choice(systems)) if random.random() < SYSTEM_SHARE else []
            known = [IGNORED] * len(filled)
            while len(filled) + len(chunk.tokens) <= shape[1]:
                filled += chunk.tokens
                known += chunk.labels
                chunk = next(chunks)
            tokens[row, : len(filled)] = torch.tensor(filled)
            labels[row, : len(known)] = torch.tensor(known)
        yield tokens, labels


def train(model: torch.nn.Module, batches: Iterator[Batch], course: Course, stepped: Callable[[float], None]) -> None:
    """Train what is not frozen; ``stepped`` is told after each step which share of all steps is done."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=course.rate, betas=(0.9, 0.98), weight_decay=0.01)
    losses: deque[float] = deque(maxlen=LOSSES)
    step, end = 0, course.most_steps + course.settle_steps
    model.train()
    while step < end:
        for group in optimizer.param_groups:
            group["lr"] = course.rate * min(1.0, (step + 1) / course.warm_up_steps, (end - step) / course.settle_steps)
        tokens, labels = next(batches)
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step += 1
        if step >= LOSSES and sum(losses) < course.enough_loss * LOSSES:
            end = min(end, step + course.settle_steps)
        stepped(step / end)
    model.eval()
