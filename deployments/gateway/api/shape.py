"""OpenAI's shape of an answer: whole, or in the events of a stream.

Knows field names and how tokens are written as text; knows no request's course and no money.
"""

import json
from collections.abc import Sequence

from deployments.gateway.api.idempotency import Head
from deployments.inference.request import Choice, FinishReason, Logprob
from deployments.inference.text import Text

Json = dict[str, object]


class Shape:
    """How one endpoint writes one request's answers."""

    def __init__(self, head: Head, text: Text) -> None:
        self._is_chat, self._answers, self._text = head.is_chat, head.answers, text
        kind = "chat.completion" if head.is_chat else "text_completion"
        base: Json = {"id": head.name, "created": head.created, "model": head.model}
        self._whole = base | {"object": kind}
        self._piece = base | {"object": "chat.completion.chunk" if head.is_chat else kind}
        self._offsets = [0] * head.answers
        """Characters of each answer that were written before."""

    def whole(self, choices: Sequence[Choice], closing: Json) -> Json:
        """``choices`` in order of index, each complete."""
        return self._whole | {"choices": [self._complete(choice) for choice in choices]} | closing

    def opening(self) -> str:
        """Chat streams begin with the role."""
        if not self._is_chat:
            return ""
        role = {"role": "assistant", "content": ""}
        return "".join(self._event(self._delta(index, role, None, None)) for index in range(self._answers))

    def piece(self, choice: Choice) -> str:
        logprobs, reason = self._logprobs(choice), _reason(choice.finish_reason)
        if self._is_chat:
            content = {"content": choice.text} if choice.text else {}
            return self._event(self._delta(choice.index, content, logprobs, reason))
        return self._event({"index": choice.index, "text": choice.text, "logprobs": logprobs, "finish_reason": reason})

    def closing(self, closing: Json) -> str:
        return event(self._piece | {"choices": []} | closing) + "data: [DONE]\n\n"

    def _complete(self, choice: Choice) -> Json:
        content: Json = {"text": choice.text}
        if self._is_chat:
            content = {"message": {"role": "assistant", "content": choice.text}}
        ending = {"logprobs": self._logprobs(choice), "finish_reason": _reason(choice.finish_reason)}
        return {"index": choice.index} | content | ending

    def _delta(self, index: int, delta: dict[str, str], logprobs: Json | None, reason: str | None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _event(self, choice: Json) -> str:
        return event(self._piece | {"choices": [choice]})

    def _logprobs(self, choice: Choice) -> Json | None:
        if not choice.logprobs:
            return None
        if self._is_chat:
            return {"content": [self._chat_logprob(logprob) for logprob in choice.logprobs], "refusal": None}
        tokens, offsets = [], []
        for logprob in choice.logprobs:
            tokens.append(self._text.token(logprob.token_id)[0])
            offsets.append(self._offsets[choice.index])
            self._offsets[choice.index] += len(tokens[-1])
        top = [{self._text.token(token)[0]: value for token, value in logprob.top} for logprob in choice.logprobs]
        values = [logprob.logprob for logprob in choice.logprobs]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}

    def _chat_logprob(self, logprob: Logprob) -> Json:
        top = [self._token(token, value) for token, value in logprob.top]
        return self._token(logprob.token_id, logprob.logprob) | {"top_logprobs": top}

    def _token(self, token_id: int, value: float) -> Json:
        text, raw = self._text.token(token_id)
        return {"token": text, "logprob": value, "bytes": list(raw)}


def merged(pieces: Sequence[Choice]) -> list[Choice]:
    """All pieces of each answer as one, in order of index."""
    found = []
    for index in sorted({piece.index for piece in pieces}):
        mine = [piece for piece in pieces if piece.index == index]
        logprobs = tuple(logprob for piece in mine for logprob in piece.logprobs)
        found.append(Choice(index, "".join(piece.text for piece in mine), logprobs, mine[-1].finish_reason))
    return found


def event(value: Json) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'), ensure_ascii=False)}\n\n"


def _reason(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value
