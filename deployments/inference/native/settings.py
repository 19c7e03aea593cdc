"""The settings of one engine, checked before anything is loaded. Imports no torch."""

from dataclasses import dataclass

from deployments.inference.request import ModelRejected

GPU_BLOCK_TOKENS = 32
"""The default of ``kv_block_tokens`` on a GPU."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What one engine runs, and its sizes. ``deployments.config.EngineConfig`` has a subset of the same fields.

    Raises:
        ModelRejected: a value out of range, or sizes that do not fit each other.
    """

    model_path: str
    """A local Hugging Face folder with configuration, weights and ``tokenizer.json``."""
    max_context_tokens: int = 512
    """The most tokens of one sequence, prompt and completion together."""
    max_running: int = 16
    """The most sequences that run at the same time."""
    max_queued: int = 256
    """Requests that may wait besides; the next one raises ``Overloaded``."""
    max_batched_tokens: int = 512
    """The most tokens of one step: one of each sequence that decodes, the rest is prefill."""
    adapter_slots: int = 8
    """Adapters that are resident at the same time, hence in one step. The base model needs no slot."""
    max_adapter_rank: int = 64
    adapter_host_mb: int = 1024
    """Host memory for adapters, in MiB: an evicted one is swapped in again from there."""
    device: str = "auto"
    """``auto``, ``cpu`` or ``cuda``."""
    dtype: str = "auto"
    """``auto`` (float32 on a CPU, bfloat16 on a GPU), ``float32``, ``bfloat16`` or ``float16``."""
    torch_threads: int = 1
    adapter_root: str = ""
    """If set, the folder in which adapters must lie, symbolic links resolved."""
    adapter_wait_s: float = 3.0
    """How long an adapter waits for a slot before another one is drained: the one with the least work left, no more
    sequences of which are admitted. After three times as long, its running sequences are preempted."""
    preempt_after_s: float = 0.25
    """How long a fairness key waits to be admitted before it preempts a sequence of a key that runs two more."""
    prefix_cache: bool = True
    """Reuse the KV cache of a common prefix between requests of the same fairness key and adapter."""
    shared_prefixes: bool = False
    """Reuse it between all fairness keys. From its time to first token a key can then infer the prompts of others."""
    kv_block_tokens: int = 0
    """Tokens of one block of a GPU's KV cache; 0: 32. Prefixes are reused by whole blocks."""
    kv_blocks: int = 0
    """Blocks of a GPU's KV cache; 0: enough for ``max_running`` sequences of ``max_context_tokens``.

    Most sequences are shorter. To let more of them run, raise ``max_running``, and set this to the memory that weights
    and adapters leave, divided by the bytes of a block: 2 x layers x key-value heads x head size x bytes of the dtype
    x ``kv_block_tokens``. If sequences outgrow it, the last admitted are preempted. On a CPU each
    sequence has one block of ``max_context_tokens``."""

    def __post_init__(self) -> None:
        for name in ("max_context_tokens", "max_running", "max_queued", "adapter_slots", "adapter_host_mb"):
            if getattr(self, name) < 1:
                raise ModelRejected(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("kv_block_tokens", "kv_blocks"):
            if getattr(self, name) < 0:
                raise ModelRejected(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.max_batched_tokens <= self.max_running:
            raise ModelRejected(
                f"max_batched_tokens ({self.max_batched_tokens}) must exceed max_running ({self.max_running}): "
                "each running sequence decodes one token a step, and prefill needs room beside them"
            )
        if self.max_adapter_rank < 8 or self.max_adapter_rank % 8:
            raise ModelRejected(f"max_adapter_rank must be a multiple of 8 and at least 8, not {self.max_adapter_rank}")
        if self.torch_threads < 1:
            raise ModelRejected(f"torch_threads must be at least 1, not {self.torch_threads}")

    def kv_sizes(self, is_paged: bool) -> "KvSizes":
        """The sizes of the KV cache; paged if the attention reads block tables, as on a GPU.

        Raises:
            ModelRejected: the longest sequence would not fit, or blocks are set without paging.
        """
        context, tokens = self.max_context_tokens, self.kv_block_tokens or GPU_BLOCK_TOKENS
        if not is_paged:
            if self.kv_block_tokens or self.kv_blocks:
                raise ModelRejected(
                    "kv_block_tokens and kv_blocks are for a GPU: the KV cache of a CPU is not paged. Leave them at 0"
                )
            return KvSizes(self.max_running, context, context)
        needed = -(-context // tokens)
        sizes = KvSizes(self.kv_blocks or self.max_running * needed, tokens, context)
        if sizes.blocks < needed:
            raise ModelRejected(
                f"kv_blocks ({sizes.blocks}) of {tokens} tokens do not hold one sequence of max_context_tokens "
                f"({context}): raise kv_blocks to {needed} or more, or lower max_context_tokens"
            )
        return sizes


@dataclass(frozen=True, slots=True)
class KvSizes:
    """The KV cache: this many blocks of this many tokens, for sequences of at most ``context`` tokens."""

    blocks: int
    block_tokens: int
    context: int

    @property
    def blocks_per_sequence(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.context // self.block_tokens)

    def blocks_of(self, slot: int) -> tuple[int, ...]:
        """The blocks of a slot, if every slot has as many as the longest sequence needs."""
        return tuple(range(slot * self.blocks_per_sequence, (slot + 1) * self.blocks_per_sequence))
