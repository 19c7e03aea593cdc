"""The values that go into an engine and come out of it, and its errors. All of them pickle.

Errors, by cause::

    EngineError
    |- RequestRejected    the request: too long, an unknown token, a parameter out of range
    |- AdapterRejected    the adapter's files
    |- ModelRejected      the model's files, or the engine's settings
    |- Overloaded         too many requests at present
    `- EngineFailed       the engine itself
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_BIAS = 100.0


class EngineError(Exception):
    """Base class of the engine's errors."""


class RequestRejected(EngineError):
    """The request cannot run on this engine, now or later."""


class AdapterRejected(EngineError):
    """The adapter cannot be loaded; the message names it and says why."""


class ModelRejected(EngineError):
    """The base model cannot be served, or not with these settings; the message says why."""


class Overloaded(EngineError):
    """The queue is full. Nothing was computed; the request may be sent again shortly."""


class EngineFailed(EngineError):
    """The engine failed while it computed the request, or it is stopping. The request may be sent to another one."""


class FinishReason(StrEnum):
    """Why a request, or one of its choices, has ended."""

    STOP = "stop"
    """An end token or a stop string."""
    LENGTH = "length"
    """``max_tokens``, or the end of the context."""
    ABORT = "abort"
    """Aborted by the caller, or its deadline passed."""
    ERROR = "error"
    """The request failed; ``OutputDelta.error`` says why."""


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One version of an adapter. The digest identifies it; the name is for messages and metrics."""

    name: str
    digest: str
    """SHA-256 of the adapter's files, 64 hex digits."""
    path: str
    """A local folder or fsspec URL in PEFT's format."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample tokens and when to stop. Temperature 0 is greedy.

    Raises:
        RequestRejected: a parameter is out of range.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    """The same seed gives the same tokens, whatever else is in the batch."""
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    """The number of choices, each sampled with a seed of its own, and each with up to ``max_tokens``."""
    min_tokens: int = 0
    """No end token and no stop string ends a choice before it has this many tokens."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of a token and what is added to its logit, -100 to 100."""
    logprobs: int | None = None
    """Report the log-probability of each token, and of this many likeliest tokens at its position."""

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
            raise RequestRejected("stop must not contain an empty string")


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A request to generate text. The prompt is rendered and encoded already."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: AdapterRef | None = None
    fairness_key: str = ""
    """Opaque. Requests with the same key take turns with other keys as one, and share a prefix cache."""
    fairness_weight: float = 1.0
    """How many tokens this key gets for each token of a key with weight 1."""
    time_to_live_s: float = 60.0
    """The engine aborts the request this long after ``submit``, unless ``extend`` moves the deadline."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's log-probability before penalties and temperature, and those of the likeliest tokens at its position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """What is new of one choice. Its last delta has a finish reason."""

    index: int
    text: str
    logprobs: tuple[Logprob, ...] = ()
    """One for each new token, if the request asked for them."""
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """What is new of one request's output. Counts are totals so far, over all choices; the prompt counts once.

    The request's last delta, and no other, has a finish reason.
    """

    token_ids: tuple[int, ...]
    """The new tokens."""
    text: str
    """The new text: whole characters, without any part of a stop string. Empty if there are ``choices``."""
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that were in the prefix cache."""
    completion_tokens: int
    compute_ms: int = 0
    """The request's share of the time of its steps, by tokens."""
    finish_reason: FinishReason | None = None
    error: str = ""
    is_adapter_rejected: bool = False
    """With ``ERROR``: the adapter cannot be loaded. Nothing was computed."""
    choices: tuple[Choice, ...] = ()
    """What is new of each choice, in order; only for requests with ``n`` above 1 or with ``logprobs``."""

    @property
    def as_choices(self) -> tuple[Choice, ...]:
        """The delta as choices, whether the request has one or several."""
        return self.choices or (Choice(0, self.text, finish_reason=self.finish_reason),)


Emit = Callable[[OutputDelta], None]
"""Receives one request's deltas. It is called from the engine's thread and must return at once."""


@dataclass(frozen=True, slots=True)
class AdapterStats:
    """One adapter that has requests, a slot or host memory."""

    name: str
    digest: str
    tier: str
    """``slot``, ``loading`` (into a slot) or ``host``; empty if it is in none of them."""
    running: int = 0
    waiting: int = 0
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine's counters and gauges at one moment."""

    steps: int = 0
    mixed_steps: int = 0
    """Steps with three or more different adapters in the batch; the base model counts as one."""
    max_adapters_in_step: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    cached_tokens: int = 0
    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0
    """The most tokens that the unfinished requests may compute."""
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    requests_finished: int = 0
    requests_aborted: int = 0
    adapter_loads: int = 0
    adapter_load_ms: int = 0
    """Time of all those loads, on the loader's thread."""
    adapter_disk_loads: int = 0
    """Loads whose adapter was not in host memory."""
    adapter_hits: int = 0
    """Requests whose adapter was loaded in a slot when they arrived."""
    adapter_requests: int = 0
    adapter_host_bytes: int = 0
    preemptions: int = 0
    """Times that a running sequence was preempted."""
    adapters_resident: tuple[str, ...] = ()
    """``name@digest`` of the adapters that are loaded in slots."""
    adapters: tuple[AdapterStats, ...] = ()
    """By digest."""
