"""Turn sampled tokens into output deltas: text, log-probabilities and finish reasons.

A ``RequestOutput`` has one ``SequenceOutput`` for each of the request's choices.
"""

import logging
from dataclasses import dataclass, field

from deployments.inference.native.sequence import Sequence
from deployments.inference.request import Choice, Emit, FinishReason, GenerateRequest, Logprob, OutputDelta
from deployments.inference.text import Detokenizer

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class RequestOutput:
    """One request from ``submit`` to its last delta, the only one with a finish reason."""

    request: GenerateRequest
    outputs: "tuple[SequenceOutput, ...]"
    """By index. The first computes the prompt; the others start when it is computed."""
    emit: Emit
    deadline: float
    """In seconds on the clock of ``time.monotonic``."""

    @property
    def digest(self) -> str:
        """The digest of the request's adapter; empty for the base model."""
        return self.outputs[0].sequence.digest

    @property
    def is_finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)

    def send(
        self,
        text: str,
        output: "SequenceOutput",
        finish_reason: FinishReason | None = None,
        error: str = "",
        is_adapter_rejected: bool = False,
    ) -> bool:
        """Emit what is new of one sequence; False if the receiver is closed. The finish reason is the request's."""
        sampling = self.request.sampling
        choices: tuple[Choice, ...] = ()
        if sampling.n > 1 or sampling.logprobs is not None:
            reason = output.finish_reason or finish_reason
            choices = (Choice(output.sequence.index, text, tuple(output.logprobs), reason),)
            output.logprobs.clear()
            text = ""
        sequences = [one.sequence for one in self.outputs]
        delta = OutputDelta(
            token_ids=output.take_unsent(),
            text=text,
            prompt_tokens=sequences[0].prompt_tokens,
            cached_tokens=sequences[0].cached_tokens,
            completion_tokens=sum(sequence.completion_tokens for sequence in sequences),
            compute_ms=round(sum(sequence.compute_s for sequence in sequences) * 1000),
            finish_reason=finish_reason,
            error=error,
            is_adapter_rejected=is_adapter_rejected,
            choices=choices,
        )
        try:
            self.emit(delta)
        except RuntimeError as closed:
            log.warning("request %s is aborted: its receiver is closed (%s)", self.request.request_id, closed)
            return False
        return True


@dataclass(slots=True, eq=False)
class SequenceOutput:
    """What becomes of one sequence's tokens."""

    sequence: Sequence
    detokenizer: Detokenizer
    end_token_ids: frozenset[int]
    max_context_tokens: int
    logprobs: list[Logprob] = field(default_factory=list)
    """Of the tokens that were not sent yet."""
    sent_tokens: int = 0
    finish_reason: FinishReason | None = None
    is_scheduled: bool = False
    """The scheduler has its sequence."""

    def detokenize(self, token_id: int) -> str:
        """The text that the sequence's newest token, this one, completes. Sets the finish reason if it is the last."""
        sequence, sampling = self.sequence, self.sequence.request.sampling
        may_stop = sequence.completion_tokens >= sampling.min_tokens
        if token_id in self.end_token_ids and not sampling.ignore_eos and may_stop:
            self.finish_reason = FinishReason.STOP
            return self.detokenizer.finish()
        text = self.detokenizer.feed(token_id, may_stop)
        is_full = len(sequence.token_ids) >= self.max_context_tokens
        if self.detokenizer.stopped:
            self.finish_reason = FinishReason.STOP
        elif is_full or sequence.completion_tokens >= sampling.max_tokens:
            self.finish_reason = FinishReason.LENGTH
            text += self.detokenizer.finish()
        return text

    def continues_after(self, token_id: int) -> bool:
        """True if this next token cannot be the last, so that its text may be made later.

        Never of requests with several choices, or with stop strings.
        """
        sequence, sampling = self.sequence, self.sequence.request.sampling
        max_length = min(sequence.prompt_tokens + sampling.max_tokens, self.max_context_tokens)
        may_end = sampling.stop or sampling.n > 1 or token_id in self.end_token_ids
        return not may_end and len(sequence.token_ids) + 1 < max_length

    @property
    def forbidden_token_ids(self) -> frozenset[int]:
        """Tokens that must not be sampled next: end tokens, before ``min_tokens``."""
        sampling = self.sequence.request.sampling
        is_short = sampling.min_tokens > self.sequence.completion_tokens and not sampling.ignore_eos
        return self.end_token_ids if is_short else frozenset()

    def take_unsent(self) -> tuple[int, ...]:
        """The tokens since the last call."""
        start = self.sequence.prompt_tokens + self.sent_tokens
        self.sent_tokens = self.sequence.completion_tokens
        return tuple(self.sequence.token_ids[start:])
