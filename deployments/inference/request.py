"""What goes into the engine and what comes out: the values that cross its edge.

Knows tokens and adapters; knows no tenant, price or transport. Everything here pickles and
imports no torch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_BIAS = 100.0


class EngineError(Exception):
    """Anything the engine refuses or fails to do."""


class Overloaded(EngineError):
    """The queue is full: nothing was computed; try again shortly."""


class RequestRejected(EngineError):
    """The request itself cannot run here (too long, unknown token, bad parameter)."""


class AdapterRejected(EngineError):
    """An adapter that will not be loaded; the message names it and says why."""


class ModelRejected(EngineError):
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
    """The engine failed on this request; ``OutputDelta.error`` says how."""


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
    n: int = 1
    """Answers to the one prompt, each with a seed of its own; ``max_tokens`` bounds each of them."""
    min_tokens: int = 0
    """No end token and no stop string ends an answer before it has this many tokens."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token to what is added to its logit, -100 to 100."""
    logprobs: int | None = None
    """Report each token's log-probability, and that many of the likeliest beside it."""

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
        if not 1 <= self.n <= MAX_CHOICES:
            raise RequestRejected(f"n must be between 1 and {MAX_CHOICES}, not {self.n}")
        if self.min_tokens < 0:
            raise RequestRejected(f"min_tokens must be 0 or more, not {self.min_tokens}")
        if not 0 <= (self.logprobs or 0) <= MAX_LOGPROBS:
            raise RequestRejected(f"logprobs must be between 0 and {MAX_LOGPROBS}, not {self.logprobs}")
        if len(self.logit_bias) > MAX_BIASES:
            raise RequestRejected(f"logit_bias takes at most {MAX_BIASES} tokens, not {len(self.logit_bias)}")
        for token, bias in self.logit_bias:
            if not (math.isfinite(bias) and abs(bias) <= MAX_BIAS and token >= 0):
                raise RequestRejected(
                    f"logit_bias takes token ids and numbers between {-MAX_BIAS:g} and {MAX_BIAS:g}, "
                    f"not {bias:g} for {token}"
                )
        if any(not text for text in self.stop):
            raise RequestRejected("stop takes no empty strings")


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One job for the engine. The prompt is already rendered and encoded."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: AdapterRef | None = None
    fairness_key: str = ""
    """Opaque: requests with the same key share one turn in the queue, and a prefix cache."""
    fairness_weight: float = 1.0
    """How much of the service this key gets, beside keys of weight 1."""
    time_to_live_s: float = 60.0
    """The engine aborts the request this long after it was submitted or last extended."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token, how likely the model found it (before penalties and temperature), and the likeliest in its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """What is new of one of several answers. Its last piece has a finish reason."""

    index: int
    text: str
    logprobs: tuple[Logprob, ...] = ()
    """One for each of its new tokens, if the request asked for them."""
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """A piece of one request's output. Counts are totals so far, over all its answers; the prompt counts once.

    The request's last piece, and no other, has a finish reason.
    """

    token_ids: tuple[int, ...]
    """New since the last piece."""
    text: str
    """New since the last piece; never half a character, never part of a stop string. Empty if there are choices."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    compute_ms: int = 0
    finish_reason: FinishReason | None = None
    error: str = ""
    is_adapter_rejected: bool = False
    """With ``ERROR``: the adapter cannot be loaded, and nothing was computed."""
    choices: tuple[Choice, ...] = ()
    """What is new of which answer, in order; only for requests with ``n`` above 1 or with ``logprobs``."""

    @property
    def as_choices(self) -> tuple[Choice, ...]:
        """What is new of which answer, whatever the request asked for."""
        return self.choices or (Choice(0, self.text, finish_reason=self.finish_reason),)


Emit = Callable[[OutputDelta], None]
"""Takes one request's deltas. The engine's thread calls it, so it must return at once."""


@dataclass(frozen=True, slots=True)
class AdapterStats:
    """One adapter that is in use or resident."""

    name: str
    digest: str
    tier: str
    """``slot``, ``host`` or ``loading``; empty where it only waits."""
    running: int = 0
    waiting: int = 0
    pinned: bool = False


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
    adapter_load_ms: int = 0
    """Time that all those loads took, away from the engine's thread."""
    adapter_disk_loads: int = 0
    """Loads whose adapter was not in host memory."""
    adapter_hits: int = 0
    """Requests whose adapter was in its slot when they came."""
    adapter_requests: int = 0
    adapter_host_bytes: int = 0
    preemptions: int = 0
    """Times a running request had to give up its place, to be computed again later."""
    adapters_resident: tuple[str, ...] = field(default=())
    """``name@digest`` of the adapters in slots."""
    adapters: tuple[AdapterStats, ...] = field(default=())
    """Each adapter that has requests, a slot or host memory."""
