"""The inbox: messages from callers and the loader to the engine's thread, and which requests are not finished yet."""

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from deployments.inference.native.loader import Loaded
from deployments.inference.native.output import RequestOutput
from deployments.inference.request import AdapterRef, EngineFailed, GenerateRequest, Overloaded, RequestRejected


@dataclass(frozen=True, slots=True)
class Submit:
    request: RequestOutput


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class Extend:
    deadlines: Mapping[str, float]
    """Request id to seconds on the clock of ``time.monotonic``."""


@dataclass(frozen=True, slots=True)
class Pin:
    refs: tuple[AdapterRef, ...]


Message = Submit | Abort | Extend | Pin | Loaded


class Inbox:
    """A queue of messages behind one lock. It is bounded by requests: each counts from ``submit`` to ``finish``."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._changed = threading.Condition()
        self._messages: list[Message] = []
        self._unfinished: dict[str, GenerateRequest] = {}
        self._is_stopping = False
        self._failure = ""

    def submit(self, output: RequestOutput) -> None:
        """Take a request.

        Raises:
            EngineFailed: the engine is stopping or has failed.
            RequestRejected: a request with this id is not finished yet.
            Overloaded: there are as many requests as there may be.
        """
        request = output.request
        with self._changed:
            if self._is_stopping:
                raise EngineFailed(self._failure or "the engine is stopping")
            if request.request_id in self._unfinished:
                raise RequestRejected(f"request {request.request_id} is already running: choose another id")
            if len(self._unfinished) >= self._max_requests:
                raise Overloaded(f"{len(self._unfinished)} requests are running or waiting: try again shortly")
            self._unfinished[request.request_id] = request
            self._messages.append(Submit(output))
            self._changed.notify()

    def post(self, message: Message) -> None:
        """Add a message. After ``stop`` it is not read any more."""
        with self._changed:
            self._messages.append(message)
            self._changed.notify()

    def take(self, timeout_s: float | None) -> list[Message]:
        """All messages, in order. Waits for the first one up to this long; None: until one comes or ``stop``."""
        with self._changed:
            if not self._messages and not self._is_stopping and timeout_s != 0:
                self._changed.wait(timeout_s)
            messages, self._messages = self._messages, []
        return messages

    def finish(self, request_id: str) -> None:
        """Stop counting a request."""
        with self._changed:
            del self._unfinished[request_id]

    def stop(self, failure: str = "") -> None:
        """Take no more requests; ``failure`` says why, if the engine has failed."""
        with self._changed:
            self._is_stopping = True
            self._failure = failure or self._failure
            self._changed.notify()

    @property
    def is_stopping(self) -> bool:
        return self._is_stopping

    @property
    def failure(self) -> str:
        """Why the engine has failed; empty if it has not."""
        return self._failure

    def unfinished(self) -> tuple[int, int]:
        """The number of unfinished requests, and the most tokens that they may compute."""
        with self._changed:
            tokens = sum(
                len(request.prompt_token_ids) + request.sampling.n * request.sampling.max_tokens
                for request in self._unfinished.values()
            )
            return len(self._unfinished), tokens

    def adapters(self) -> Counter[AdapterRef]:
        """The number of unfinished requests of each adapter."""
        with self._changed:
            return Counter(request.adapter for request in self._unfinished.values() if request.adapter)
