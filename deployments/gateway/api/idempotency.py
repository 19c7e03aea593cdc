"""Idempotency keys: a request that is sent again with its key gets the same answer, and is charged once."""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Annotated, Self

from fastapi import Depends, Header, Request
from pydantic import TypeAdapter

from billing.catalog.errors import ModelNotAllowed
from billing.errors import BillingError, Refusal
from billing.ledger.answers import MAX_ANSWER_BYTES, Answers, Asked, Kept
from billing.store.errors import StoreUnavailable
from billing.tenants.tenant import Principal
from billing.usage import RequestId
from deployments.gateway.api.bodies import Incomplete
from deployments.gateway.api.wire import Sampled
from deployments.gateway.errors import BadRequest
from deployments.gateway.request_state import RequestState
from deployments.gateway.settlement import Settler
from deployments.inference.request import Choice

HEADER = "Idempotency-Key"
LONGEST_KEY = 255
LOGPROB_BYTES = 48
"""About the size of a token's log-probability in a transcript."""
REPLAYED = {"idempotent-replayed": "true"}
"""The header of an answer that is a repeat."""


async def _key_of(
    request: Request,
    _: Annotated[
        str | None,
        Header(
            alias=HEADER,
            description="The same key and body again within 24 hours: the same answer and receipt, charged once.",
            json_schema_extra={"minLength": 1, "maxLength": LONGEST_KEY, "pattern": "^[!-~]+$"},
        ),
    ] = None,
) -> str | None:
    """The key. Raises BadRequest on one that a proxy or a log might alter."""
    given = request.headers.getlist(HEADER)
    if not given:
        return None
    key = given[0]
    is_printable = key.isascii() and key.isprintable() and " " not in key
    if len(given) > 1 or not is_printable or not 1 <= len(key) <= LONGEST_KEY:
        raise BadRequest(
            f"{HEADER} is sent once, with 1 to {LONGEST_KEY} printable ASCII characters and no space", HEADER
        )
    return key


IdempotencyKey = Annotated[str | None, Depends(_key_of)]


@dataclass(frozen=True, slots=True)
class Head:
    """What an answer's reply has besides its output, known before the first token."""

    name: str
    created: int
    model: str
    is_chat: bool
    max_tokens: int
    """Of each answer."""
    answers: int = 1


@dataclass(frozen=True, slots=True)
class Transcript:
    """A whole answer, in the parts in which it was sent."""

    head: Head
    pieces: tuple[Choice, ...]
    """Stored under this name."""
    incomplete: Incomplete

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return TypeAdapter(cls).validate_json(text)


class Claim:
    """A request's claim on its idempotency key, and its answer so far. Without a key the methods do nothing."""

    def __init__(self, answers: Answers, settler: Settler, asked: Asked | None) -> None:
        self._answers, self._settler, self._asked = answers, settler, asked
        self._choices: list[Choice] = []
        self._length = 0

    @property
    def is_made(self) -> bool:
        return self._asked is not None

    async def make(self) -> Kept | None:
        """The answer that the key has already, or ``None``: the key is claimed. Raises as ``Answers.claim``."""
        return None if self._asked is None else await self._answers.claim(self._asked)

    async def check(self) -> None:
        """Call before anything is delivered. Raises IdempotencyKeyInUse, StoreUnavailable."""
        if self._asked is not None:
            await self._answers.check(self._asked)

    def add(self, choice: Choice) -> None:
        self._length += len(choice.text) + sum(LOGPROB_BYTES * (1 + len(each.top)) for each in choice.logprobs)
        if self._asked is not None and self._length <= MAX_ANSWER_BYTES:
            self._choices.append(choice)

    async def stage(self, head: Head, incomplete: Incomplete) -> None:
        """Store the answer, before it is charged. Raises IdempotencyKeyInUse, StoreUnavailable."""
        if self._asked is not None:
            is_too_long = self._length > MAX_ANSWER_BYTES
            transcript = None if is_too_long else Transcript(head, tuple(self._choices), incomplete).to_json()
            await self._answers.stage(self._asked, transcript)

    async def stage_delivered(self, head: Head, incomplete: Incomplete) -> None:
        """The same for a stream, never raising: what its client has is charged, whether or not it can be repeated."""
        with suppress(Refusal, StoreUnavailable):
            await self.stage(head, incomplete)

    def conclude(self, state: RequestState | None) -> None:
        """End the claim, however the request ended. Returns at once; where it fails the next claim finds out."""
        if self._asked is not None:
            self._settler.keep(self._conclude(self._asked, state))

    async def _conclude(self, asked: Asked, state: RequestState | None) -> None:
        if state is not None:
            await state.settled()
        with suppress(BillingError):
            await self._answers.conclude(asked)


def asked_under(key: str | None, caller: Principal, request_id: RequestId, body: Sampled) -> Asked | None:
    """The request as the store compares it. Raises ModelNotAllowed: a repeat is no way around an API key's scope."""
    if key is None:
        return None
    if caller.key.models is not None and body.model not in caller.key.models:
        raise ModelNotAllowed(body.model)
    sent = json.dumps([type(body).__name__, body.model_dump(exclude_unset=True, by_alias=True)], sort_keys=True)
    return Asked(caller.tenant.id, key, request_id, sha256(sent.encode()).hexdigest(), body.is_streamed)
