"""The engine's thread: take messages, step, answer. Everything here belongs to that thread alone."""

import logging
import time
from dataclasses import dataclass, field

import torch

from deployments.inference.native.inbox import Aborted, Extended, Inbox, Message, Pinned, Submitted
from deployments.inference.native.loader import Loaded, Loader
from deployments.inference.native.model import Model
from deployments.inference.native.output import Answer, Output
from deployments.inference.native.sampler import Likelihoods, Row, sample
from deployments.inference.native.scheduler import Scheduler
from deployments.inference.native.sequence import Sequence, Work
from deployments.inference.native.slots import AdapterSlots
from deployments.inference.request import FinishReason, Logprob

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.25
"""Longest sleep while requests wait for something: deadlines are noticed this late at most."""
MIXED = 3
"""A step with this many different adapters counts as mixed, the base model being one."""


@dataclass(slots=True)
class Counts:
    """Counters that only grow; see ``EngineStats``."""

    steps: int = 0
    mixed_steps: int = 0
    max_adapters_in_step: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    cached_tokens: int = 0
    requests_finished: int = 0
    requests_aborted: int = 0
    adapter_loads: int = 0
    adapter_load_s: float = 0.0
    adapter_disk_loads: int = 0
    adapter_requests: int = 0
    adapter_hits: int = 0

    def step(self, plan: list[Work]) -> None:
        """A step has computed this work."""
        self.steps += 1
        self.prompt_tokens += sum(work.count for work in plan if not work.sequence.decoding)
        adapters = len({work.sequence.digest for work in plan})
        self.max_adapters_in_step = max(self.max_adapters_in_step, adapters)
        self.mixed_steps += adapters >= MIXED


@dataclass(slots=True)
class Worker:
    """Turns messages into answers; every request submitted gets exactly one last piece."""

    inbox: Inbox
    model: Model
    scheduler: Scheduler
    slots: AdapterSlots
    loader: Loader
    outputs: dict[str, Output]
    """Requests that were taken in and have no last piece yet, by id."""
    counts: Counts
    late: list[tuple[Answer, int]] = field(default_factory=list)
    """Tokens whose text is made while the next step is computed elsewhere; at most one of an answer."""

    def run(self, torch_threads: int) -> None:
        """Work until the inbox is stopped, or something fails that no single request can be blamed for."""
        torch.set_num_threads(torch_threads)
        try:
            while not self.inbox.stopping:
                self._receive()
                self._step()
        except Exception as error:
            log.exception("the engine has failed")
            self.inbox.stop(failure=f"{type(error).__name__}: {error}")
        self._answer_all()

    def _receive(self) -> None:
        """Wait for something to do, and apply what has come."""
        idle_s = IDLE_WAIT_S if self.outputs else None
        for message in self.inbox.take(0.0 if self.scheduler.running else idle_s):
            self._apply(message)
        self._start_loads()
        now = time.monotonic()
        for output in [output for output in self.outputs.values() if output.deadline <= now]:
            self._end(output, FinishReason.ABORT, error="its deadline has passed")

    def _apply(self, message: Message) -> None:
        match message:
            case Submitted(output):
                self._take_in(output)
            case Aborted(request_id):
                if request_id in self.outputs:
                    self._end(self.outputs[request_id], FinishReason.ABORT)
            case Extended(deadlines):
                for request_id in deadlines.keys() & self.outputs.keys():
                    self.outputs[request_id].deadline = deadlines[request_id]
            case Pinned(refs):
                self.slots.pin(ref.digest for ref in refs)
                for ref in refs:
                    self.scheduler.prepare(ref)
            case Loaded():
                self._loaded(message)

    def _take_in(self, output: Output) -> None:
        self.outputs[output.request.request_id] = output
        if output.digest:
            self.counts.adapter_requests += 1
            self.counts.adapter_hits += self.slots.is_ready(output.digest)
        self._begin(output.answers[0])

    def _begin(self, answer: Answer) -> None:
        answer.scheduled = True
        self.scheduler.add(answer.sequence, time.monotonic())

    def _loaded(self, message: Loaded) -> None:
        ref = message.load.ref
        if not message.error:
            self.slots.loaded(ref.digest)
            self.counts.adapter_loads += 1
            self.counts.adapter_load_s += message.seconds
            self.counts.adapter_disk_loads += message.is_from_disk
            return
        log.warning("adapter %s is refused: %s", ref.name, message.error)
        self.slots.failed(ref.digest, message.error, time.monotonic())
        for output in [output for output in self.outputs.values() if output.digest == ref.digest]:
            self._end(
                output, FinishReason.ERROR, error=f"adapter {ref.name}: {message.error}", is_adapter_rejected=True
            )

    def _start_loads(self) -> None:
        for load in self.slots.take_loads():
            self.loader.submit(load)

    def _step(self) -> None:
        plan = self.scheduler.schedule(time.monotonic())
        self._start_loads()
        if not plan:
            self._send_late()
            return
        started = time.perf_counter()
        logits = self.model.forward([work.span() for work in plan])
        self._send_late()
        completing = [work.sequence for work in plan if work.completes]
        rows = [_row(self._answer_of(sequence)) for sequence in completing]
        likelihoods = Likelihoods(logits, rows)
        tokens = sample(logits, rows)
        logprobs = likelihoods.of(tokens)
        _share_time(plan, time.perf_counter() - started)
        self.counts.step(plan)
        for work in plan:
            self.scheduler.computed(work)
        for row, (sequence, token) in enumerate(zip(completing, tokens, strict=True)):
            if sequence.request_id in self.outputs:
                self._deliver(self._answer_of(sequence), token, logprobs.get(row))

    def _answer_of(self, sequence: Sequence) -> Answer:
        return self.outputs[sequence.request_id].answers[sequence.index]

    def _deliver(self, answer: Answer, token: int | None, logprob: Logprob | None) -> None:
        sequence = answer.sequence
        output = self.outputs[sequence.request_id]
        if token is None:
            name = f"adapter {sequence.adapter.name}" if sequence.adapter else "the base model"
            self._end(output, FinishReason.ERROR, error=f"{name} computed something that is not a number")
            return
        if sequence.index == 0 and not sequence.completion_tokens:
            self.counts.cached_tokens += sequence.cached
            for other in output.answers[1:]:
                self._begin(other)
        self.counts.generation_tokens += 1
        if logprob is not None:
            answer.logprobs.append(logprob)
        if self.model.is_asynchronous and answer.goes_on_after(token):
            answer.append(token)
            self.late.append((answer, token))
            return
        text = answer.take(token)
        if answer.finish_reason is not None:
            self._remove(answer, sound=True)
        if output.is_over:
            self._close(output, FinishReason.STOP)
            output.send(text, answer, answer.finish_reason)
        elif not output.send(text, answer):
            self._end(output, FinishReason.ABORT)

    def _send_late(self) -> None:
        """A request that nobody listens to ends when messages are read: a step with it may be under way."""
        late, self.late = self.late, []
        for answer, token in late:
            if not self.outputs[answer.sequence.request_id].send(answer.release(token), answer):
                self.inbox.post(Aborted(answer.sequence.request_id))

    def _remove(self, answer: Answer, sound: bool) -> None:
        if answer.scheduled:
            answer.scheduled = False
            self.scheduler.remove(answer.sequence, sound)

    def _close(self, output: Output, reason: FinishReason) -> None:
        """Free all that the request holds."""
        del self.outputs[output.request.request_id]
        for answer in output.answers:
            self._remove(answer, sound=reason is not FinishReason.ERROR)
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.counts.requests_finished += 1
        else:
            self.counts.requests_aborted += 1
        self.inbox.answered(output.request.request_id)

    def _end(self, output: Output, reason: FinishReason, error: str = "", is_adapter_rejected: bool = False) -> None:
        """End a request before its time, and say the last word of each of its answers."""
        self._send_late()
        self._close(output, reason)
        *others, last = [answer for answer in output.answers if answer.finish_reason is None]
        for answer in others:
            answer.finish_reason = reason
            output.send(answer.detokenizer.finish(), answer)
        output.send(last.detokenizer.finish(), last, reason, error, is_adapter_rejected)

    def _answer_all(self) -> None:
        """Nothing will be computed any more: tell everybody, those in the inbox too."""
        for message in self.inbox.take(0):
            if isinstance(message, Submitted):
                self._take_in(message.output)
        for output in list(self.outputs.values()):
            if self.inbox.failure:
                output.send("", output.answers[0], FinishReason.ERROR, self.inbox.failure)
            else:
                self._end(output, FinishReason.ABORT, error="the engine is stopping")


def _share_time(plan: list[Work], elapsed_s: float) -> None:
    """Each sequence's part of a step's time, by its tokens."""
    tokens = sum(work.count for work in plan)
    for work in plan:
        work.sequence.compute_s += elapsed_s * work.count / tokens


def _row(answer: Answer) -> Row:
    sequence = answer.sequence
    return Row(
        sampling=sequence.request.sampling,
        seed=sequence.seed,
        generated=sequence.token_ids[sequence.prompt_tokens :],
        forbidden=tuple(answer.forbidden),
    )
