"""OpenAI's request bodies, parsed into a ``ClientRequest``."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from deployments.gateway.errors import BadRequest
from deployments.gateway.gateway import ClientRequest, Prompt
from deployments.inference.request import MAX_BIASES, MAX_CHOICES, MAX_LOGPROBS, RequestRejected, SamplingParams

MAX_STOPS = 4
LONGEST_MODEL_ID = 256
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for text completions."""
UNSUPPORTED = (
    "tools",
    "functions",
    "echo",
    "suffix",
    "audio",
    "prediction",
)
"""Fields that would change the answer and that the engine does not support: refused rather than ignored."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")

    include_usage: bool = False
    """The last chunk has the usage either way, beside the receipt."""


class Part(BaseModel):
    """One part of a message's content; only text is supported."""

    model_config = ConfigDict(extra="allow")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None

    def plain(self) -> dict[str, str]:
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content or ())
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Sent(BaseModel):
    """A request body whose strings can all be encoded: JSON can spell half of a surrogate pair, which cannot."""

    @model_validator(mode="before")
    @classmethod
    def _can_be_encoded(cls, body: object) -> object:
        unchecked = [body]
        while unchecked:
            value = unchecked.pop()
            if isinstance(value, Mapping):
                unchecked += (*value.keys(), *value.values())
            elif isinstance(value, list):
                unchecked += value
            elif isinstance(value, str) and not value.isascii():
                _encode(value)
        return body


def _encode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text holds half of a surrogate pair, \\u{ord(text[error.start]):x}") from error


class Sampled(Sent, ABC):
    """The fields of both endpoints. Unknown fields are accepted, as OpenAI's clients expect."""

    model_config = ConfigDict(extra="allow")

    model: Annotated[str, Field(min_length=1, max_length=LONGEST_MODEL_ID, examples=["pirate"])]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(le=2**31 - 1)] | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    logit_bias: Annotated[dict[int, float], Field(max_length=MAX_BIASES)] | None = None
    best_of: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @abstractmethod
    def prompt(self) -> Prompt:
        """The chat, text or token ids to continue. Raises BadRequest."""

    @abstractmethod
    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens to report with each token's log-probability. Raises BadRequest."""

    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    def to_client_request(self) -> ClientRequest:
        """Raises BadRequest, RequestRejected."""
        self._refuse_unsupported()
        return ClientRequest(self.model, self.prompt(), self._sampling(), self.wanted_tokens())

    def _refuse_unsupported(self) -> None:
        if self.best_of not in (None, self.n or 1):
            raise BadRequest("best_of above n is not supported: every answer is returned", "best_of")
        for name in UNSUPPORTED:
            if (self.model_extra or {}).get(name):
                raise BadRequest(f"{name} is not supported here: remove it", name)
        form = (self.model_extra or {}).get("response_format")
        if isinstance(form, Mapping) and form.get("type", "text") != "text":
            raise BadRequest("response_format other than text is not supported here: remove it", "response_format")

    def _sampling(self) -> SamplingParams:
        given = {
            name: value
            for name in ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty")
            if (value := getattr(self, name)) is not None
        }
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > MAX_STOPS:
            raise BadRequest(f"stop takes at most {MAX_STOPS} strings, not {len(stop)}", "stop")
        try:
            return SamplingParams(
                max_tokens=1,
                seed=self.seed,
                stop=stop,
                ignore_eos=self.ignore_eos,
                n=self.n or 1,
                min_tokens=self.min_tokens or 0,
                logit_bias=tuple((self.logit_bias or {}).items()),
                logprobs=self.wanted_logprobs(),
                **given,
            )
        except RequestRejected as error:
            raise BadRequest(str(error), str(error).split(" ", 1)[0]) from error

    @property
    def is_streamed(self) -> bool:
        return bool(self.stream)


CHAT: JsonDict = {"model": "pirate", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}
TEXT: JsonDict = {"model": "pirate", "prompt": "Once upon a time", "max_tokens": 20}


class ChatRequest(Sampled):
    model_config = ConfigDict(json_schema_extra={"examples": [CHAT, CHAT | {"stream": True}]})

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def wanted_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
        return self.top_logprobs or 0 if self.logprobs else None

    def prompt(self) -> Prompt:
        return [message.plain() for message in self.messages]

    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Sampled):
    model_config = ConfigDict(json_schema_extra={"examples": [TEXT]})

    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    text: Annotated[str | list[str] | list[int] | list[list[int]], Field(alias="prompt", min_length=1)]

    def prompt(self) -> Prompt:
        prompt = self.text
        if isinstance(prompt, list) and isinstance(prompt[0], str | list):
            if len(prompt) > 1:
                raise BadRequest("one prompt a request: send a request for each", "prompt")
            prompt = prompt[0]
        return prompt if isinstance(prompt, str) else tuple(int(token) for token in prompt)

    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    def wanted_tokens(self) -> int | None:
        return self.max_tokens or DEFAULT_COMPLETION_TOKENS


class QuoteRequest(ChatRequest):
    """A chat or a text completion that is only priced: one of ``messages`` and ``prompt`` is given."""

    model_config = ConfigDict(json_schema_extra={"examples": [CHAT, TEXT]})

    messages: list[Message] = Field(default_factory=list)
    text: str | list[int] = Field(default="", alias="prompt")

    def prompt(self) -> Prompt:
        if bool(self.messages) == bool(self.text):
            raise BadRequest("give either messages or prompt", "messages")
        if self.messages:
            return super().prompt()
        return self.text if isinstance(self.text, str) else tuple(self.text)
