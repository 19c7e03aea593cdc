"""What one request has been told so far: turns sampled tokens into pieces of output and an end."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from deployments.engine.request import FinishReason, Tokens
from deployments.engine.sequence import Sequence
from deployments.engine.text import Detokenizer

log = logging.getLogger(__name__)

Emit = Callable[[Tokens], None]


@dataclass(slots=True, eq=False)
class Output:
    """One request's way out. The last piece sent, and no other, has a finish reason."""

    sequence: Sequence
    detokenizer: Detokenizer
    emit: Emit
    end_token_ids: frozenset[int]
    max_context_tokens: int
    _sent_tokens: int = field(default=0, init=False)

    def take(self, token_id: int) -> tuple[str, FinishReason | None]:
        """Append a sampled token to the sequence; return the text it releases, and whether it was the last."""
        sequence = self.sequence
        sequence.token_ids.append(token_id)
        if token_id in self.end_token_ids and not sequence.request.sampling.ignore_eos:
            return self.detokenizer.finish(), FinishReason.STOP
        text = self.detokenizer.feed(token_id)
        if self.detokenizer.stopped:
            return text, FinishReason.STOP
        full = len(sequence.token_ids) >= self.max_context_tokens
        if full or sequence.completion_tokens >= sequence.request.sampling.max_tokens:
            return text + self.detokenizer.finish(), FinishReason.LENGTH
        return text, None

    def send(
        self, text: str, finish_reason: FinishReason | None = None, error: str = "", is_adapter_refused: bool = False
    ) -> bool:
        """Emit what is new; False if nobody is there to take it any more."""
        sequence = self.sequence
        start = sequence.prompt_tokens + self._sent_tokens
        piece = Tokens(
            token_ids=tuple(sequence.token_ids[start:]),
            text=text,
            prompt_tokens=sequence.prompt_tokens,
            cached_tokens=sequence.cached,
            completion_tokens=sequence.completion_tokens,
            compute_ms=round(sequence.compute_s * 1000),
            finish_reason=finish_reason,
            error=error,
            is_adapter_refused=is_adapter_refused,
        )
        self._sent_tokens = sequence.completion_tokens
        try:
            self.emit(piece)
        except RuntimeError as closed:
            log.warning("request %s: its listener is gone (%s)", sequence.request_id, closed)
            return False
        return True
