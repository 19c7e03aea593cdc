"""What callers' threads and the engine's thread share, behind one lock: messages, and who has no answer yet."""

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from deployments.inference.native.loader import Loaded
from deployments.inference.native.output import Output
from deployments.inference.request import AdapterRef, EngineFailed, GenerateRequest, Overloaded, RequestRejected


@dataclass(frozen=True, slots=True)
class Submitted:
    output: Output


@dataclass(frozen=True, slots=True)
class Aborted:
    request_id: str


@dataclass(frozen=True, slots=True)
class Extended:
    deadlines: Mapping[str, float]
    """Request id to a moment on the engine's clock."""


@dataclass(frozen=True, slots=True)
class Pinned:
    refs: tuple[AdapterRef, ...]


Message = Submitted | Aborted | Extended | Pinned | Loaded


class Inbox:
    """A queue of messages that is bounded by its requests: each counts from ``submit`` to ``answered``."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._changed = threading.Condition()
        self._messages: list[Message] = []
        self._unanswered: dict[str, GenerateRequest] = {}
        self._stopping = False
        self._failure = ""

    def submit(self, output: Output) -> None:
        """Take a request in.

        Raises:
            EngineFailed: nothing is taken any more.
            RequestRejected: its id is in use.
            Overloaded: there are as many as there may be.
        """
        with self._changed:
            self._reserve(output.request)
            self._messages.append(Submitted(output))
            self._changed.notify()

    def post(self, message: Message) -> None:
        """Leave a message; after the end it stays unread."""
        with self._changed:
            self._messages.append(message)
            self._changed.notify()

    def take(self, wait_s: float | None) -> list[Message]:
        """All messages in order, waiting for the first as long as told (None: until one comes or the end)."""
        with self._changed:
            if not self._messages and not self._stopping and wait_s != 0:
                self._changed.wait(wait_s)
            messages, self._messages = self._messages, []
        return messages

    def answered(self, request_id: str) -> None:
        with self._changed:
            del self._unanswered[request_id]

    def stop(self, failure: str = "") -> None:
        """Take nothing more; ``failure`` says why, if it is one."""
        with self._changed:
            self._stopping = True
            self._failure = failure or self._failure
            self._changed.notify()

    @property
    def stopping(self) -> bool:
        return self._stopping

    @property
    def failure(self) -> str:
        return self._failure

    def load(self) -> tuple[int, int]:
        """Requests without an answer, and the most tokens they may compute."""
        with self._changed:
            return len(self._unanswered), sum(map(_most_tokens, self._unanswered.values()))

    def adapters(self) -> Counter[AdapterRef]:
        """How many requests without an answer each adapter has."""
        with self._changed:
            return Counter(request.adapter for request in self._unanswered.values() if request.adapter)

    def _reserve(self, request: GenerateRequest) -> None:
        if self._stopping:
            raise EngineFailed(self._failure or "the engine is stopping")
        if request.request_id in self._unanswered:
            raise RequestRejected(f"request {request.request_id} is already running")
        if len(self._unanswered) >= self._capacity:
            raise Overloaded(f"{len(self._unanswered)} requests are running or waiting")
        self._unanswered[request.request_id] = request


def _most_tokens(request: GenerateRequest) -> int:
    return len(request.prompt_token_ids) + request.sampling.n * request.sampling.max_tokens
