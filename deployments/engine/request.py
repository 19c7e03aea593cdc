"""What goes into the engine and what comes out: the values that cross its edge.

Knows tokens and adapters; knows no tenant, price or transport. Everything here pickles and
imports no torch.
"""

from dataclasses import dataclass, field
from enum import StrEnum


class EngineError(Exception):
    """Anything the engine refuses or fails to do."""


class Overloaded(EngineError):
    """The queue is full: nothing was computed; try again shortly."""


class RequestRejected(EngineError):
    """The request itself cannot run here (too long, unknown token, bad parameter)."""


class AdapterRejected(EngineError):
    """An adapter that will not be loaded; the message names it and says why."""


class ModelRefused(EngineError):
    """The base model, or the engine's sizes, cannot be served; the message says why."""


class EngineFailed(EngineError):
    """The engine failed while computing this request; it is not the request's fault."""


class FinishReason(StrEnum):
    STOP = "stop"
    """An end token or a stop string."""
    LENGTH = "length"
    """``max_tokens`` or the end of the context."""
    ABORT = "abort"
    """Cancelled, or its deadline passed."""
    ERROR = "error"
    """The engine failed on this request; ``Tokens.error`` says how."""


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One exact adapter: the name is for people, the digest is its identity."""

    name: str
    digest: str
    """SHA-256 of the adapter's files, 64 hex digits."""
    path: str
    """Local folder or fsspec URL in PEFT's format."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Temperature 0 is greedy."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    """The same seed gives the same tokens, alone or in a crowd."""
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 2.0),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise RequestRejected(f"{name} must be between {low:g} and {high:g}, not {value:g}")
        if self.top_p == 0.0:
            raise RequestRejected("top_p must be above 0")
        if self.max_tokens < 1:
            raise RequestRejected(f"max_tokens must be at least 1, not {self.max_tokens}")
        if self.top_k < 0:
            raise RequestRejected(f"top_k must be 0 (all) or more, not {self.top_k}")
        if any(not text for text in self.stop):
            raise RequestRejected("a stop string must not be empty")


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One job for the engine. The prompt is already rendered and encoded."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: AdapterRef | None = None
    fairness_key: str = ""
    """Opaque: requests with the same key share one turn in the queue, and a prefix cache."""
    time_to_live_s: float = 60.0
    """The engine aborts the request this long after it was submitted or last extended."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A piece of one request's output. Counts are totals so far; the last piece has a finish reason."""

    token_ids: tuple[int, ...]
    """New since the last piece."""
    text: str
    """New since the last piece; never half a character, never part of a stop string."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    compute_ms: int = 0
    finish_reason: FinishReason | None = None
    error: str = ""
    is_adapter_refused: bool = False
    """With ``ERROR``: the adapter cannot be loaded, and nothing was computed."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine's counters and gauges at one moment. Counters only grow."""

    steps: int = 0
    mixed_steps: int = 0
    """Steps whose batch held three or more different adapters, the base model counted as one."""
    max_adapters_in_step: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    cached_tokens: int = 0
    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    requests_finished: int = 0
    requests_aborted: int = 0
    adapter_loads: int = 0
    adapters_resident: tuple[str, ...] = field(default=())
    """``name@digest`` of the adapters in slots."""
