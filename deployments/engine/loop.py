"""The engine: a thread that steps through scheduling, computing and sampling, and answers every request.

Its face is thread-safe; everything behind it belongs to the thread alone. Knows tokens and adapters;
knows no tenant, price, transport or cluster.
"""

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass

import torch

from deployments.engine.kv import KvTable
from deployments.engine.loader import Loaded, Loader
from deployments.engine.model import Model
from deployments.engine.output import Emit, Output
from deployments.engine.request import (
    AdapterRef,
    AdapterRejected,
    EngineFailed,
    EngineStats,
    FinishReason,
    GenerateRequest,
    Overloaded,
    RequestRejected,
    Tokens,
)
from deployments.engine.sampler import Row, sample
from deployments.engine.scheduler import Scheduler
from deployments.engine.sequence import Sequence, Work
from deployments.engine.settings import EngineSettings
from deployments.engine.slots import AdapterSlots
from deployments.engine.text import Text

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.25
"""Longest sleep while requests wait for something: deadlines are noticed this late at most."""
MIXED = 3
"""A step with this many different adapters counts as mixed, the base model being one."""


@dataclass(frozen=True, slots=True)
class _Submitted:
    output: Output


@dataclass(frozen=True, slots=True)
class _Aborted:
    request_id: str


@dataclass(frozen=True, slots=True)
class _Extended:
    deadlines: Mapping[str, float]
    """Request id to a moment on the engine's clock."""


@dataclass(frozen=True, slots=True)
class _Pinned:
    refs: tuple[AdapterRef, ...]


_Message = _Submitted | _Aborted | _Extended | _Pinned | Loaded


@dataclass(slots=True)
class _Counts:
    """Counters that only grow."""

    steps: int = 0
    mixed_steps: int = 0
    max_adapters_in_step: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    cached_tokens: int = 0
    requests_finished: int = 0
    requests_aborted: int = 0
    adapter_loads: int = 0


class Engine:
    """One base model and its adapters, serving many requests at once.

    Construction loads the model and proves it, which takes as long as it takes.

    Raises:
        ModelRefused: the model or the settings cannot be served.
    """

    def __init__(self, config: EngineSettings) -> None:
        torch.set_num_threads(config.torch_threads)
        self.config = config
        self.text = Text(config.model_path)
        self._model = Model(config)
        self._kv = KvTable(config.max_running, self._model.kv, config.prefix_cache)
        self._slots = AdapterSlots(config.adapter_slots)
        self._scheduler = Scheduler(self._kv, self._slots, config.max_batched_tokens, config.adapter_wait_s)
        self._loader = Loader(
            pool=self._model.lora,
            linears=self._model.linears,
            max_rank=config.max_adapter_rank,
            host_bytes=config.adapter_host_mb << 20,
            root=config.adapter_root,
            report=self._post,
        )
        self._thread = threading.Thread(target=self._run, name="farebox-engine", daemon=True)
        self._changed = threading.Condition()
        self._inbox: list[_Message] = []
        self._requests: dict[str, int] = {}
        """Every request that has no answer yet, with the tokens it may compute; guarded by ``_changed``."""
        self._stopping = False
        self._failure = ""
        self._outputs: dict[str, Output] = {}
        self._counts = _Counts()

    def start(self) -> None:
        """Begin to work."""
        self._loader.start()
        self._thread.start()

    def stop(self) -> None:
        """Abort what is left, answer it, and end both threads."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()
            self._loader.stop()

    def submit(self, request: GenerateRequest, emit: Emit) -> None:
        """Take a request. ``emit`` is called from the engine's thread and must return at once.

        Its last call, and no other, has a finish reason.

        Raises:
            RequestRejected: it cannot run here.
            AdapterRejected: its adapter was found to be bad a short while ago.
            Overloaded: the queue is full.
            EngineFailed: the engine has died or is stopping.
        """
        self._validate(request)
        now = time.monotonic()
        sampling = request.sampling
        sequence = Sequence(
            request=request,
            deadline=now + request.time_to_live_s,
            seed=secrets.randbits(64) if sampling.seed is None else sampling.seed,
        )
        output = Output(
            sequence=sequence,
            detokenizer=self.text.detokenizer(sampling.stop),
            emit=emit,
            end_token_ids=self.text.eos_token_ids,
            max_context_tokens=self.config.max_context_tokens,
        )
        with self._changed:
            self._reserve(request)
            self._inbox.append(_Submitted(output))
            self._changed.notify()

    def abort(self, request_id: str) -> None:
        """End a request within one step; its last piece says ``abort``. No effect if it has ended."""
        self._post(_Aborted(request_id))

    def extend(self, deadlines: Mapping[str, float]) -> None:
        """Move deadlines: request id to seconds from now. Unknown ids are passed over."""
        now = time.monotonic()
        self._post(_Extended({request_id: now + seconds for request_id, seconds in deadlines.items()}))

    def pin(self, refs: Iterable[AdapterRef]) -> None:
        """Keep these in their slots, instead of those pinned before, and load what finds a slot now.

        The first of them come first; one slot always stays for others.
        """
        self._post(_Pinned(tuple(refs)))

    def check(self) -> None:
        """Raise ``EngineFailed`` if the engine's thread has died."""
        if self._failure:
            raise EngineFailed(self._failure)

    def stats(self) -> EngineStats:
        """Counters and gauges at this moment."""
        counts = self._counts
        with self._changed:
            requests = len(self._requests)
            running = min(self._kv.used, requests)
            queued_tokens = sum(self._requests.values())
        return EngineStats(
            steps=counts.steps,
            mixed_steps=counts.mixed_steps,
            max_adapters_in_step=counts.max_adapters_in_step,
            prompt_tokens=counts.prompt_tokens,
            generation_tokens=counts.generation_tokens,
            cached_tokens=counts.cached_tokens,
            running=running,
            waiting=requests - running,
            queued_tokens=queued_tokens,
            kv_blocks_used=self._kv.used,
            kv_blocks_total=self._kv.count,
            requests_finished=counts.requests_finished,
            requests_aborted=counts.requests_aborted,
            adapter_loads=counts.adapter_loads,
            adapters_resident=tuple(f"{r.ref.name}@{r.ref.digest}" for r in self._slots.residents),
        )

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Tokens]:
        """The request's pieces as they come; closing the iterator aborts. Raises as ``submit``."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Tokens] = asyncio.Queue()

        def emit(piece: Tokens) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        self.submit(request, emit)
        finished = False
        try:
            while not finished:
                piece = await pieces.get()
                finished = piece.finish_reason is not None
                yield piece
        finally:
            if not finished:
                self.abort(request.request_id)

    def _validate(self, request: GenerateRequest) -> None:
        prompt = request.prompt_token_ids
        if not prompt:
            raise RequestRejected("the prompt is empty")
        if len(prompt) >= self.config.max_context_tokens:
            raise RequestRejected(
                f"the prompt has {len(prompt)} tokens; the context is {self.config.max_context_tokens}, answer included"
            )
        if not 0 <= min(prompt) <= max(prompt) < self._model.limits.vocabulary:
            raise RequestRejected("the prompt has a token that the model doesn't know")
        if request.adapter and (reason := self._slots.failure(request.adapter.digest, time.monotonic())):
            raise AdapterRejected(f"adapter {request.adapter.name}: {reason}")

    def _reserve(self, request: GenerateRequest) -> None:
        """Count the request in, or refuse it; the caller holds the lock."""
        if self._failure or self._stopping:
            raise EngineFailed(self._failure or "the engine is stopping")
        if request.request_id in self._requests:
            raise RequestRejected(f"request {request.request_id} is already running")
        if len(self._requests) >= self.config.max_running + self.config.max_queued:
            raise Overloaded(f"{len(self._requests)} requests are running or waiting")
        self._requests[request.request_id] = len(request.prompt_token_ids) + request.sampling.max_tokens

    def _post(self, message: _Message) -> None:
        with self._changed:
            self._inbox.append(message)
            self._changed.notify()

    def _run(self) -> None:
        torch.set_num_threads(self.config.torch_threads)
        try:
            while self._receive():
                self._step()
        except Exception as error:
            log.exception("the engine has failed")
            with self._changed:
                self._failure = f"{type(error).__name__}: {error}"
        self._answer_all()

    def _receive(self) -> bool:
        """Wait for something to do, and apply what has come; False when it is time to end."""
        with self._changed:
            if not self._inbox and not self._stopping and not self._scheduler.running:
                self._changed.wait(IDLE_WAIT_S if self._outputs else None)
            messages, self._inbox = self._inbox, []
        for message in messages:
            self._apply(message)
        now = time.monotonic()
        for output in [output for output in self._outputs.values() if output.sequence.deadline <= now]:
            self._end(output, FinishReason.ABORT, error="its deadline has passed")
        return not self._stopping

    def _apply(self, message: _Message) -> None:
        match message:
            case _Submitted(output):
                self._outputs[output.sequence.request_id] = output
                self._scheduler.add(output.sequence)
            case _Aborted(request_id):
                if request_id in self._outputs:
                    self._end(self._outputs[request_id], FinishReason.ABORT)
            case _Extended(deadlines):
                for request_id, deadline in deadlines.items():
                    if request_id in self._outputs:
                        self._outputs[request_id].sequence.deadline = deadline
            case _Pinned(refs):
                self._slots.pin(ref.digest for ref in refs)
                for ref in refs:
                    self._scheduler.prepare(ref)
            case Loaded():
                self._loaded(message)
        self._start_loads()

    def _loaded(self, message: Loaded) -> None:
        ref = message.load.ref
        if not message.error:
            self._slots.loaded(ref.digest)
            self._counts.adapter_loads += 1
            return
        log.warning("adapter %s is refused: %s", ref.name, message.error)
        self._slots.failed(ref.digest, message.error, time.monotonic())
        for output in [output for output in self._outputs.values() if output.sequence.digest == ref.digest]:
            self._end(output, FinishReason.ERROR, error=f"adapter {ref.name}: {message.error}")

    def _start_loads(self) -> None:
        for load in self._slots.take_loads():
            self._loader.submit(load)

    def _step(self) -> None:
        plan = self._scheduler.schedule(time.monotonic())
        self._start_loads()
        if not plan:
            return
        started = time.perf_counter()
        logits = self._model.forward([work.span() for work in plan])
        completing = [work for work in plan if work.completes]
        tokens = sample(logits, [_row(work.sequence) for work in completing])
        self._account(plan, time.perf_counter() - started)
        for work in plan:
            self._scheduler.computed(work)
        for work, token in zip(completing, tokens, strict=True):
            self._deliver(self._outputs[work.sequence.request_id], token)

    def _account(self, plan: list[Work], elapsed_s: float) -> None:
        tokens = sum(work.count for work in plan)
        for work in plan:
            work.sequence.compute_s += elapsed_s * work.count / tokens
        counts = self._counts
        counts.steps += 1
        counts.prompt_tokens += sum(work.count for work in plan if not work.sequence.decoding)
        adapters = len({work.sequence.digest for work in plan})
        counts.max_adapters_in_step = max(counts.max_adapters_in_step, adapters)
        counts.mixed_steps += adapters >= MIXED

    def _deliver(self, output: Output, token: int | None) -> None:
        sequence = output.sequence
        if token is None:
            name = f"adapter {sequence.adapter.name}" if sequence.adapter else "the base model"
            self._end(output, FinishReason.ERROR, error=f"{name} computed something that is not a number")
            return
        if not sequence.completion_tokens:
            self._counts.cached_tokens += sequence.cached
        self._counts.generation_tokens += 1
        text, reason = output.take(token)
        if reason is not None:
            self._end(output, reason, text=text)
        elif not output.send(text):
            self._end(output, FinishReason.ABORT)

    def _end(self, output: Output, reason: FinishReason, text: str | None = None, error: str = "") -> None:
        """Free all that the request holds, then say its last word."""
        sequence = output.sequence
        del self._outputs[sequence.request_id]
        self._scheduler.remove(sequence, sound=reason is not FinishReason.ERROR)
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._counts.requests_finished += 1
        else:
            self._counts.requests_aborted += 1
        with self._changed:
            del self._requests[sequence.request_id]
        output.send(output.detokenizer.finish() if text is None else text, reason, error)

    def _answer_all(self) -> None:
        """Nothing will be computed any more: tell everybody, those in the inbox too."""
        with self._changed:
            self._stopping = True
            messages, self._inbox = self._inbox, []
        for message in messages:
            if isinstance(message, _Submitted):
                self._outputs[message.output.sequence.request_id] = message.output
                self._scheduler.add(message.output.sequence)
        for output in list(self._outputs.values()):
            if self._failure:
                output.send("", FinishReason.ERROR, self._failure)
            else:
                self._end(output, FinishReason.ABORT, error="the engine is stopping")


def _row(sequence: Sequence) -> Row:
    return Row(
        sampling=sequence.request.sampling,
        seed=sequence.seed,
        generated=sequence.token_ids[sequence.prompt_tokens :],
    )
