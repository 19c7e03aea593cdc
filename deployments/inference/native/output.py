"""What one request has been told so far: turns sampled tokens into pieces of output and an end."""

import logging
from dataclasses import dataclass, field

from deployments.inference.native.sequence import Sequence
from deployments.inference.request import Choice, Emit, FinishReason, GenerateRequest, Logprob, OutputDelta
from deployments.inference.text import Detokenizer

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Answer:
    """One of a request's answers: its tokens, and how they become text."""

    sequence: Sequence
    detokenizer: Detokenizer
    end_token_ids: frozenset[int]
    max_context_tokens: int
    logprobs: list[Logprob] = field(default_factory=list)
    """Of tokens that were not sent yet."""
    sent_tokens: int = 0
    finish_reason: FinishReason | None = None
    scheduled: bool = False
    """The scheduler has its sequence."""

    def take(self, token_id: int) -> str:
        """Append a sampled token to the sequence; return the text it releases. It may be the last."""
        self.append(token_id)
        return self.release(token_id)

    def append(self, token_id: int) -> None:
        """Take a token whose text is not asked for yet."""
        self.sequence.token_ids.append(token_id)

    def goes_on_after(self, token_id: int) -> bool:
        """Whatever its text, this next token ends nothing, so that its text may wait; of several answers none waits."""
        sequence, sampling = self.sequence, self.sequence.request.sampling
        full = min(sequence.prompt_tokens + sampling.max_tokens, self.max_context_tokens)
        may_end = sampling.stop or sampling.n > 1 or token_id in self.end_token_ids
        return not may_end and len(sequence.token_ids) + 1 < full

    def release(self, token_id: int) -> str:
        """The text that the newest token, this one, releases."""
        sequence, sampling = self.sequence, self.sequence.request.sampling
        may_stop = sequence.completion_tokens >= sampling.min_tokens
        if token_id in self.end_token_ids and not sampling.ignore_eos and may_stop:
            self.finish_reason = FinishReason.STOP
            return self.detokenizer.finish()
        text = self.detokenizer.feed(token_id, may_stop)
        full = len(sequence.token_ids) >= self.max_context_tokens
        if self.detokenizer.stopped:
            self.finish_reason = FinishReason.STOP
        elif full or sequence.completion_tokens >= sampling.max_tokens:
            self.finish_reason = FinishReason.LENGTH
            text += self.detokenizer.finish()
        return text

    @property
    def forbidden(self) -> frozenset[int]:
        """Tokens that it must not get next."""
        sampling = self.sequence.request.sampling
        is_short = sampling.min_tokens > self.sequence.completion_tokens and not sampling.ignore_eos
        return self.end_token_ids if is_short else frozenset()

    def unsent(self) -> tuple[int, ...]:
        """Its tokens since the last call."""
        start = self.sequence.prompt_tokens + self.sent_tokens
        self.sent_tokens = self.sequence.completion_tokens
        return tuple(self.sequence.token_ids[start:])


@dataclass(slots=True, eq=False)
class Output:
    """One request's way out. The last piece sent, and no other, has a finish reason."""

    request: GenerateRequest
    answers: tuple[Answer, ...]
    """The first has the prompt computed; the others begin when it has."""
    emit: Emit
    deadline: float
    """On the engine's clock, in seconds."""

    @property
    def digest(self) -> str:
        return self.answers[0].sequence.digest

    @property
    def is_over(self) -> bool:
        return all(answer.finish_reason is not None for answer in self.answers)

    def send(
        self,
        text: str,
        answer: Answer,
        finish_reason: FinishReason | None = None,
        error: str = "",
        is_adapter_rejected: bool = False,
    ) -> bool:
        """Emit what is new of an answer; False if nobody is there to take it any more."""
        sampling = self.request.sampling
        choices: tuple[Choice, ...] = ()
        if sampling.n > 1 or sampling.logprobs is not None:
            reason = answer.finish_reason or finish_reason
            choices = (Choice(answer.sequence.index, text, tuple(answer.logprobs), reason),)
            answer.logprobs.clear()
            text = ""
        sequences = [each.sequence for each in self.answers]
        piece = OutputDelta(
            token_ids=answer.unsent(),
            text=text,
            prompt_tokens=sequences[0].prompt_tokens,
            cached_tokens=sequences[0].cached,
            completion_tokens=sum(sequence.completion_tokens for sequence in sequences),
            compute_ms=round(sum(sequence.compute_s for sequence in sequences) * 1000),
            finish_reason=finish_reason,
            error=error,
            is_adapter_rejected=is_adapter_rejected,
            choices=choices,
        )
        try:
            self.emit(piece)
        except RuntimeError as closed:
            log.warning("request %s: its listener is gone (%s)", self.request.request_id, closed)
            return False
        return True
