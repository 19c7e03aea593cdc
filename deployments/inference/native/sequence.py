"""One request's course through the engine: its tokens, and what it holds of memory and adapters."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from deployments.inference.request import AdapterRef, GenerateRequest


@dataclass(slots=True, eq=False)
class Sequence:
    """A request while it is in the engine. ``computed`` tokens of ``token_ids`` are in the KV cache."""

    request: GenerateRequest
    seed: int = 0
    index: int = 0
    """Which of its request's answers this is."""
    token_ids: list[int] = field(default_factory=list)
    """The prompt, then what was generated."""
    computed: int = 0
    cached: int = 0
    """Prompt tokens that a prefix hit spared."""
    kv_slot: int = -1
    """Its place in the KV memory, where that is paged its row of the block table; -1 while it waits."""
    blocks: tuple[int, ...] = ()
    """Where the KV memory is paged: those that hold its tokens, in order. A new tuple whenever they change."""
    block_keys: list[bytes] = field(default_factory=list)
    """Of as many whole blocks of its tokens as somebody has asked for; they never change."""
    adapter_slot: int = -1
    """-1 for the base model."""
    blocked_since: float | None = None
    """When its turn first came and no adapter slot could be had."""
    waiting_since: float = 0.0
    admitted: bool = False
    """It ran before: its prompt is charged to its key, and ``cached`` stays as it is."""
    tokens_before: int = 0
    """How many it had when it was last taken in."""
    compute_s: float = 0.0
    """Its share of the steps it took part in, by tokens."""

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
        """Its adapter's identity; empty for the base model."""
        return self.request.adapter.digest if self.request.adapter else ""

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_tokens

    @property
    def tokens_left(self) -> int:
        """The most it may still compute: its longest remaining stay in the engine."""
        return self.prompt_tokens + self.request.sampling.max_tokens - self.computed

    @property
    def decoding(self) -> bool:
        """All but its newest token are computed, and that one was generated."""
        return self.computed >= self.prompt_tokens and self.computed + 1 == len(self.token_ids)

    @property
    def got_on(self) -> bool:
        """It got a token since it was last taken in."""
        return len(self.token_ids) > self.tokens_before

    @property
    def covered(self) -> bool:
        """The newest token was sampled over everything in the cache, so that all of it is known to be sound."""
        return self.completion_tokens > 0


@dataclass(frozen=True, slots=True)
class Span:
    """A run of one sequence's tokens to compute in this step, for a model that knows no requests."""

    kv_slot: int
    adapter_slot: int
    start: int
    """Position of the first token; everything before it is in the cache."""
    token_ids: Seq[int]
    sampled: bool
    """The logits after the last token are wanted."""
    blocks: tuple[int, ...] = ()
    """As in ``Sequence``."""


@dataclass(frozen=True, slots=True)
class Work:
    """A sequence's part in a step."""

    sequence: Sequence
    count: int

    @property
    def completes(self) -> bool:
        """The step computes the newest token, so that the next one can be sampled."""
        return self.sequence.computed + self.count == len(self.sequence.token_ids)

    def span(self) -> Span:
        sequence, start = self.sequence, self.sequence.computed
        return Span(
            kv_slot=sequence.kv_slot,
            adapter_slot=sequence.adapter_slot,
            start=start,
            token_ids=sequence.token_ids[start : start + self.count],
            sampled=self.completes,
            blocks=sequence.blocks,
        )
