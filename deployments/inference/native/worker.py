"""The engine's thread: receive messages, compute steps, send output deltas. Everything here belongs to that thread."""

import logging
import time
from dataclasses import dataclass, field

import torch

from deployments.inference.native.inbox import Abort, Extend, Inbox, Message, Pin, Submit
from deployments.inference.native.loader import Loaded, Loader
from deployments.inference.native.model import Model
from deployments.inference.native.output import RequestOutput, SequenceOutput
from deployments.inference.native.registry import AdapterRegistry
from deployments.inference.native.sampler import Logprobs, Row, sample
from deployments.inference.native.scheduler import Scheduler
from deployments.inference.native.sequence import ScheduledSequence, Sequence
from deployments.inference.request import FinishReason, Logprob

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.25
"""Longest wait for a message while requests wait for their adapters: a deadline is noticed at most this late."""
MIXED_ADAPTERS = 3
"""A step with this many different adapters counts as mixed; the base model counts as one."""


@dataclass(slots=True)
class Worker:
    """Runs the engine's steps. Each request taken gets exactly one last delta."""

    inbox: Inbox
    model: Model
    scheduler: Scheduler
    adapters: AdapterRegistry
    loader: Loader
    counters: "Counters"
    requests: dict[str, RequestOutput] = field(default_factory=dict)
    """Requests that have no last delta yet, by id."""
    deferred: list[tuple[SequenceOutput, int]] = field(default_factory=list)
    """Tokens that are detokenized while the GPU computes the next step; at most one of each sequence."""

    def run(self, torch_threads: int) -> None:
        """Work until the inbox is stopped, or something fails that is not one request's fault."""
        torch.set_num_threads(torch_threads)
        try:
            while not self.inbox.is_stopping:
                self._receive()
                self._step()
        except Exception as error:
            log.exception("the engine has failed")
            self.inbox.stop(failure=f"{type(error).__name__}: {error}")
        self._end_all()

    def _receive(self) -> None:
        """Wait for something to do, apply the messages, and abort what is past its deadline."""
        idle_s = IDLE_WAIT_S if self.requests else None
        for message in self.inbox.take(0.0 if self.scheduler.running else idle_s):
            self._apply(message)
        self._start_loads()
        now = time.monotonic()
        for request in [request for request in self.requests.values() if request.deadline <= now]:
            self._end(request, FinishReason.ABORT, error="its deadline has passed")

    def _apply(self, message: Message) -> None:
        match message:
            case Submit(request):
                self._accept(request)
            case Abort(request_id):
                if request_id in self.requests:
                    self._end(self.requests[request_id], FinishReason.ABORT)
            case Extend(deadlines):
                for request_id in deadlines.keys() & self.requests.keys():
                    self.requests[request_id].deadline = deadlines[request_id]
            case Pin(refs):
                self.adapters.pin(ref.digest for ref in refs)
                for ref in refs:
                    self.scheduler.prefetch(ref)
            case Loaded():
                self._loaded(message)

    def _accept(self, request: RequestOutput) -> None:
        self.requests[request.request.request_id] = request
        if request.digest:
            self.counters.adapter_requests += 1
            self.counters.adapter_hits += self.adapters.is_loaded(request.digest)
        self._schedule(request.outputs[0])

    def _schedule(self, output: SequenceOutput) -> None:
        output.is_scheduled = True
        self.scheduler.add(output.sequence, time.monotonic())

    def _loaded(self, message: Loaded) -> None:
        """Count a load; if it failed, end the adapter's requests."""
        ref = message.load.ref
        if not message.error:
            self.adapters.mark_loaded(ref.digest)
            self.counters.adapter_loads += 1
            self.counters.adapter_load_ms += message.seconds * 1000
            self.counters.adapter_disk_loads += message.is_from_disk
            return
        log.warning("adapter %s is rejected: %s", ref.name, message.error)
        self.adapters.mark_failed(ref.digest, message.error, time.monotonic())
        error = f"adapter {ref.name}: {message.error}"
        for request in [request for request in self.requests.values() if request.digest == ref.digest]:
            self._end(request, FinishReason.ERROR, error, is_adapter_rejected=True)

    def _start_loads(self) -> None:
        for load in self.adapters.take_loads():
            self.loader.submit(load)

    def _step(self) -> None:
        """Schedule, compute, sample, and deliver one token to each sequence that got one."""
        batch = self.scheduler.schedule(time.monotonic())
        self._start_loads()
        if not batch:
            self._send_deferred()
            return
        started = time.perf_counter()
        logits = self.model.forward([scheduled.span() for scheduled in batch])
        self._send_deferred()
        sampled = [scheduled.sequence for scheduled in batch if scheduled.is_sampled]
        rows = [_sampling_row(self._output_of(sequence)) for sequence in sampled]
        logprobs_of = Logprobs(logits, rows)
        tokens = sample(logits, rows)
        logprobs = logprobs_of.tokens(tokens)
        _share_time(batch, time.perf_counter() - started)
        self.counters.count_step(batch)
        for scheduled in batch:
            self.scheduler.mark_computed(scheduled)
        for row, (sequence, token) in enumerate(zip(sampled, tokens, strict=True)):
            if sequence.request_id in self.requests:
                self._deliver(self._output_of(sequence), token, logprobs.get(row))

    def _output_of(self, sequence: Sequence) -> SequenceOutput:
        return self.requests[sequence.request_id].outputs[sequence.index]

    def _deliver(self, output: SequenceOutput, token: int | None, logprob: Logprob | None) -> None:
        """Append a sampled token to its sequence and send its text, at once or deferred; None: not a number."""
        sequence = output.sequence
        request = self.requests[sequence.request_id]
        if token is None:
            name = f"adapter {sequence.adapter.name}" if sequence.adapter else "the base model"
            self._end(request, FinishReason.ERROR, error=f"{name} computed logits that are not finite numbers")
            return
        if sequence.index == 0 and not sequence.completion_tokens:
            self.counters.cached_tokens += sequence.cached_tokens
            for other in request.outputs[1:]:
                self._schedule(other)
        self.counters.generation_tokens += 1
        if logprob is not None:
            output.logprobs.append(logprob)
        is_deferred = self.model.is_asynchronous and output.continues_after(token)
        sequence.token_ids.append(token)
        if is_deferred:
            self.deferred.append((output, token))
            return
        text = output.detokenize(token)
        if output.finish_reason is not None:
            self._unschedule(output, is_valid=True)
        if request.is_finished:
            self._close(request, FinishReason.STOP)
            request.send(text, output, output.finish_reason)
        elif not request.send(text, output):
            self._end(request, FinishReason.ABORT)

    def _send_deferred(self) -> None:
        """Detokenize and send. A request whose receiver is closed is aborted by message: it may be in a step now."""
        deferred, self.deferred = self.deferred, []
        for output, token in deferred:
            if not self.requests[output.sequence.request_id].send(output.detokenize(token), output):
                self.inbox.post(Abort(output.sequence.request_id))

    def _unschedule(self, output: SequenceOutput, is_valid: bool) -> None:
        if output.is_scheduled:
            output.is_scheduled = False
            self.scheduler.remove(output.sequence, is_valid)

    def _close(self, request: RequestOutput, reason: FinishReason) -> None:
        """Free everything that the request holds, and count it."""
        del self.requests[request.request.request_id]
        for output in request.outputs:
            self._unschedule(output, is_valid=reason is not FinishReason.ERROR)
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.counters.requests_finished += 1
        else:
            self.counters.requests_aborted += 1
        self.inbox.finish(request.request.request_id)

    def _end(
        self, request: RequestOutput, reason: FinishReason, error: str = "", is_adapter_rejected: bool = False
    ) -> None:
        """End a request early, with a last delta for each choice that has none."""
        self._send_deferred()
        self._close(request, reason)
        *others, last = [output for output in request.outputs if output.finish_reason is None]
        for output in others:
            output.finish_reason = reason
            request.send(output.detokenizer.finish(), output)
        request.send(last.detokenizer.finish(), last, reason, error, is_adapter_rejected)

    def _end_all(self) -> None:
        """End every request, those still in the inbox too: nothing more will be computed."""
        for message in self.inbox.take(0):
            if isinstance(message, Submit):
                self._accept(message.request)
        for request in list(self.requests.values()):
            if self.inbox.failure:
                request.send("", request.outputs[0], FinishReason.ERROR, self.inbox.failure)
            else:
                self._end(request, FinishReason.ABORT, error="the engine is stopping")


@dataclass(slots=True)
class Counters:
    """The counters of ``EngineStats`` that the worker increments."""

    steps: int = 0
    mixed_steps: int = 0
    max_adapters_in_step: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    cached_tokens: int = 0
    requests_finished: int = 0
    requests_aborted: int = 0
    adapter_loads: int = 0
    adapter_load_ms: float = 0.0
    adapter_disk_loads: int = 0
    adapter_requests: int = 0
    adapter_hits: int = 0

    def count_step(self, batch: list[ScheduledSequence]) -> None:
        """Count a step; call it before the batch is marked as computed."""
        self.steps += 1
        self.prompt_tokens += sum(one.count for one in batch if not one.sequence.is_decoding)
        adapters = len({one.sequence.digest for one in batch})
        self.max_adapters_in_step = max(self.max_adapters_in_step, adapters)
        self.mixed_steps += adapters >= MIXED_ADAPTERS


def _share_time(batch: list[ScheduledSequence], elapsed_s: float) -> None:
    """Add to each sequence its share of a step's time, by its tokens."""
    tokens = sum(scheduled.count for scheduled in batch)
    for scheduled in batch:
        scheduled.sequence.compute_s += elapsed_s * scheduled.count / tokens


def _sampling_row(output: SequenceOutput) -> Row:
    sequence = output.sequence
    return Row(
        sampling=sequence.request.sampling,
        seed=sequence.seed,
        generated=sequence.token_ids[sequence.prompt_tokens :],
        forbidden=tuple(output.forbidden_token_ids),
    )
