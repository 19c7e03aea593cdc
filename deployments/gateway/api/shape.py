"""Writes answers in OpenAI's shape: whole, or as the events of a stream."""

import json
from collections.abc import Mapping, Sequence

from deployments.gateway.api.bodies import ChatLogprob, ChatLogprobs, ClosingBody, TextLogprobs, TokenLogprob
from deployments.gateway.api.idempotency import Head
from deployments.inference.request import Choice, FinishReason, Logprob
from deployments.inference.text import Text

Json = dict[str, object]
Logprobs = ChatLogprobs | TextLogprobs | None


class Shape:
    """Writes the answers of one request for one endpoint."""

    def __init__(self, head: Head, text: Text) -> None:
        self._is_chat, self._answers, self._text = head.is_chat, head.answers, text
        kind = "chat.completion" if head.is_chat else "text_completion"
        base: Json = {"id": head.name, "created": head.created, "model": head.model}
        self._whole = base | {"object": kind}
        self._chunk = base | {"object": "chat.completion.chunk" if head.is_chat else kind}
        self._offsets = [0] * head.answers
        """Characters of each answer that were written so far."""

    def whole(self, choices: Sequence[Choice], closing: ClosingBody) -> Json:
        """A ``ChatCompletion`` or ``TextCompletion``; ``choices`` are in order of index, each complete."""
        return {**self._whole, "choices": [self._complete(choice) for choice in choices], **closing}

    def opening(self) -> str:
        """The first events: a chat begins with the role."""
        if not self._is_chat:
            return ""
        role = {"role": "assistant", "content": ""}
        return "".join(self._event(self._chat_delta(index, role, None, None)) for index in range(self._answers))

    def delta(self, choice: Choice) -> str:
        """The event for what is new of one answer."""
        logprobs, reason = self._logprobs(choice), _reason(choice.finish_reason)
        if self._is_chat:
            content = {"content": choice.text} if choice.text else {}
            return self._event(self._chat_delta(choice.index, content, logprobs, reason))
        return self._event({"index": choice.index, "text": choice.text, "logprobs": logprobs, "finish_reason": reason})

    def closing(self, closing: ClosingBody) -> str:
        """The last events: usage and receipt, and ``[DONE]``."""
        return event({**self._chunk, "choices": [], **closing}) + "data: [DONE]\n\n"

    def _complete(self, choice: Choice) -> Json:
        content: Json = {"text": choice.text}
        if self._is_chat:
            content = {"message": {"role": "assistant", "content": choice.text}}
        ending = {"logprobs": self._logprobs(choice), "finish_reason": _reason(choice.finish_reason)}
        return {"index": choice.index} | content | ending

    def _chat_delta(self, index: int, delta: dict[str, str], logprobs: Logprobs, reason: str | None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _event(self, choice: Json) -> str:
        return event(self._chunk | {"choices": [choice]})

    def _logprobs(self, choice: Choice) -> Logprobs:
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

    def _chat_logprob(self, logprob: Logprob) -> ChatLogprob:
        top = [self._token(token, value) for token, value in logprob.top]
        return {**self._token(logprob.token_id, logprob.logprob), "top_logprobs": top}

    def _token(self, token_id: int, value: float) -> TokenLogprob:
        text, raw = self._text.token(token_id)
        return {"token": text, "logprob": value, "bytes": list(raw)}


def merged(parts: Sequence[Choice]) -> list[Choice]:
    """All parts of each answer as one, in order of index."""
    found = []
    for index in sorted({part.index for part in parts}):
        own = [part for part in parts if part.index == index]
        logprobs = tuple(logprob for part in own for logprob in part.logprobs)
        found.append(Choice(index, "".join(part.text for part in own), logprobs, own[-1].finish_reason))
    return found


def event(value: Mapping[str, object]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, separators=(',', ':'), ensure_ascii=False)}\n\n"


def _reason(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value
