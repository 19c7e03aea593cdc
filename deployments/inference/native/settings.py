"""Sizes and places of one engine, checked before anything is loaded. Knows no file format and no torch."""

from dataclasses import dataclass

from deployments.inference.request import ModelRejected

GPU_BLOCK_TOKENS = 32


@dataclass(frozen=True, slots=True)
class KvSizes:
    """The KV memory: so many blocks of so many tokens, for sequences of at most ``context`` tokens."""

    blocks: int
    block_tokens: int
    context: int

    @property
    def each(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.context // self.block_tokens)

    def own(self, slot: int) -> tuple[int, ...]:
        """The blocks of a slot where every slot has as many as the longest sequence needs."""
        return tuple(range(slot * self.each, (slot + 1) * self.each))


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What one engine runs and how much of it. Tokens, rows and slots are counts.

    Raises:
        ModelRejected: sizes that cannot work together.
    """

    model_path: str
    """Local Hugging Face folder: config, weights and ``tokenizer.json``."""
    max_context_tokens: int = 512
    """Prompt and completion of one request together."""
    max_running: int = 16
    """Requests that hold KV memory at the same time, hence rows in one batch."""
    max_queued: int = 256
    """Requests that may wait beyond those; the next one is ``Overloaded``."""
    max_batched_tokens: int = 512
    """Tokens in one step: every running decode and a chunk of prefill."""
    adapter_slots: int = 8
    """Different adapters that may share one step; the base model needs none."""
    max_adapter_rank: int = 64
    adapter_host_mb: int = 1024
    """Host memory for adapters that are loaded but may have lost their slot, in MiB."""
    device: str = "auto"
    """``auto``, ``cpu`` or ``cuda``."""
    dtype: str = "auto"
    """``auto`` (float32 on a CPU, bfloat16 on a GPU), ``float32``, ``bfloat16`` or ``float16``."""
    torch_threads: int = 1
    adapter_root: str = ""
    """When set, an adapter's real path must lie under this folder."""
    adapter_wait_s: float = 3.0
    """After waiting this long for a slot, an adapter makes the one with least work left take no new requests;
    after three times as long, that one's running requests are set back."""
    preempt_after_s: float = 0.25
    """After waiting this long for a place in the batch, a key makes one that holds two more places give up one."""
    prefix_cache: bool = True
    """Reuse the computed start of a prompt between requests of one fairness key and adapter."""
    shared_prefixes: bool = False
    """Reuse it between all fairness keys. By the time to its first token, each can then tell what others asked."""
    kv_block_tokens: int = 0
    """Tokens in one block of a GPU's KV memory; 0: 32. A prompt's start is reused by whole blocks."""
    kv_blocks: int = 0
    """Blocks of a GPU's KV memory; 0: enough for ``max_running`` requests of ``max_context_tokens``.

    Most requests are shorter. To let more of them run, raise ``max_running`` and set this to what the weights and
    adapters leave of the memory, over a block's bytes: 2 x layers x key-value heads x head size x bytes of the dtype
    x ``kv_block_tokens``. Should they grow beyond that, the newest are set back and computed again later. On a CPU a
    request has one block of ``max_context_tokens``."""

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
                "each running request decodes one token a step, and prefill needs room beside them"
            )
        if self.max_adapter_rank < 8 or self.max_adapter_rank % 8:
            raise ModelRejected(f"max_adapter_rank must be a multiple of 8, not {self.max_adapter_rank}")
        if self.torch_threads < 1:
            raise ModelRejected(f"torch_threads must be at least 1, not {self.torch_threads}")

    def kv_sizes(self, is_paged: bool) -> KvSizes:
        """Of the KV memory; ``is_paged``: the attention that runs reads block tables.

        Raises:
            ModelRejected: it does not, or the longest request would not fit.
        """
        context, tokens = self.max_context_tokens, self.kv_block_tokens or GPU_BLOCK_TOKENS
        if not is_paged:
            if self.kv_block_tokens or self.kv_blocks:
                raise ModelRejected("kv_block_tokens and kv_blocks are for a GPU: a CPU's KV memory is not paged")
            return KvSizes(self.max_running, context, context)
        each = -(-context // tokens)
        sizes = KvSizes(self.kv_blocks or self.max_running * each, tokens, context)
        if sizes.blocks < each:
            raise ModelRejected(
                f"kv_blocks ({sizes.blocks}) of {tokens} tokens do not hold one request of max_context_tokens "
                f"({context}): raise kv_blocks to {each} or more, or lower max_context_tokens"
            )
        return sizes
