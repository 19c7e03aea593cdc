"""A sequence is a prompt with one completion while it is in the engine; a span is the part of it that a step computes.

A request with ``n`` above 1 has that many sequences.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from deployments.inference.request import AdapterRef, GenerateRequest


@dataclass(slots=True, eq=False)
class Sequence:
    """The tokens of one completion and what it holds: KV cache and an adapter slot."""

    request: GenerateRequest
    seed: int = 0
    index: int = 0
    """The index of its choice in the request."""
    token_ids: list[int] = field(default_factory=list)
    """The prompt, then what was generated."""
    computed_tokens: int = 0
    """How many of ``token_ids``, from the first, are in the KV cache."""
    cached_tokens: int = 0
    """Prompt tokens that were in the KV cache when it was first admitted: its prefix cache hit."""
    kv_slot: int = -1
    """Its row of the block table, or its slot of a KV cache without blocks; -1 while it waits."""
    blocks: tuple[int, ...] = ()
    """The blocks of a paged KV cache that hold its tokens, in order. Replaced, never changed in place."""
    block_keys: list[bytes] = field(default_factory=list)
    """The keys of its first whole blocks, filled as far as they were needed; see ``KvBlockAllocator``."""
    adapter_slot: int = -1
    """-1 for the base model, and while it waits."""
    blocked_since: float | None = None
    """When it first could not be admitted because its adapter had no slot and none was free."""
    waiting_since: float = 0.0
    was_admitted: bool = False
    """Its prompt has been charged to its fairness key, and ``cached_tokens`` no longer changes."""
    tokens_at_admission: int = 0
    """The length of ``token_ids`` when it was last admitted."""
    compute_s: float = 0.0
    """Its share of the time of the steps it was in, by tokens."""

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def adapter(self) -> AdapterRef | None:
        return self.request.adapter

    @property
    def digest(self) -> str:
        """The digest of its adapter; empty for the base model."""
        return self.request.adapter.digest if self.request.adapter else ""

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_tokens

    @property
    def tokens_left(self) -> int:
        """The most tokens that it may still compute."""
        return self.prompt_tokens + self.request.sampling.max_tokens - self.computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Only its newest token is left to compute, and that one was generated."""
        return self.computed_tokens >= self.prompt_tokens and self.computed_tokens + 1 == len(self.token_ids)

    @property
    def has_progressed(self) -> bool:
        """It got a token since it was last admitted."""
        return len(self.token_ids) > self.tokens_at_admission

    @property
    def is_verified(self) -> bool:
        """A token was sampled from its KV cache, so all of that is finite. No other sequence may read it before."""
        return self.completion_tokens > 0


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """A sequence in a step, and how many of its tokens the step computes."""

    sequence: Sequence
    count: int

    @property
    def is_sampled(self) -> bool:
        """The step computes its newest token, so that the next one can be sampled."""
        return self.sequence.computed_tokens + self.count == len(self.sequence.token_ids)

    def span(self) -> "Span":
        sequence, start = self.sequence, self.sequence.computed_tokens
        return Span(
            kv_slot=sequence.kv_slot,
            adapter_slot=sequence.adapter_slot,
            start=start,
            token_ids=sequence.token_ids[start : start + self.count],
            sampled=self.is_sampled,
            blocks=sequence.blocks,
        )


@dataclass(frozen=True, slots=True)
class Span:
    """A run of one sequence's tokens, as the model computes it."""

    kv_slot: int
    adapter_slot: int
    start: int
    """Position of the first token. Everything before it is in the KV cache."""
    token_ids: Seq[int]
    sampled: bool
    """Return the logits after the last token."""
    blocks: tuple[int, ...] = ()
    """As in ``Sequence``."""
