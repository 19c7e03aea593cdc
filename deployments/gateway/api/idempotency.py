"""One request under a client's ``Idempotency-Key``: which keys are taken, and what is kept of an answer.

Knows the header and the pieces of an answer; what was charged for it is the store's business.
"""

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
from deployments.gateway.api.errors import BadRequest
from deployments.gateway.api.wire import Sampled
from deployments.gateway.request_state import Run
from deployments.gateway.settlement import Settler
from deployments.inference.request import Choice

HEADER = "Idempotency-Key"
LONGEST_KEY = 255
LOGPROB_BYTES = 48
"""What a token's log-probability takes in a transcript, about."""
REPLAYED = {"idempotent-replayed": "true"}
"""Tells an answer that was kept from one that ran."""


async def _key_given(
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
    """Raises BadRequest on a key that could not be told from another."""
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


GivenKey = Annotated[str | None, Depends(_key_given)]


Incomplete = dict[str, dict[str, str]]


@dataclass(frozen=True, slots=True)
class Head:
    """What is known of an answer before its first token."""

    name: str
    created: int
    model: str
    is_chat: bool
    max_tokens: int
    """Of each answer."""
    answers: int = 1


@dataclass(frozen=True, slots=True)
class Transcript:
    """A whole answer, in the pieces in which it came."""

    head: Head
    pieces: tuple[Choice, ...]
    incomplete: Incomplete
    """What its last chunk says of an answer that credit cut short."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return TypeAdapter(cls).validate_json(text)


class Claim:
    """A request's hold on its idempotency key, and what its answer is so far; without a key nothing is done."""

    def __init__(self, answers: Answers, settler: Settler, asked: Asked | None) -> None:
        self._answers, self._settler, self._asked = answers, settler, asked
        self._pieces: list[Choice] = []
        self._length = 0

    @property
    def is_made(self) -> bool:
        return self._asked is not None

    async def make(self) -> Kept | None:
        """The answer that is kept under the key, or ``None`` with the key taken. Raises as ``Answers.claim``."""
        return None if self._asked is None else await self._answers.claim(self._asked)

    async def check(self) -> None:
        """Before anything is delivered. Raises IdempotencyKeyInUse, StoreUnavailable."""
        if self._asked is not None:
            await self._answers.check(self._asked)

    def add(self, choice: Choice) -> None:
        self._length += len(choice.text) + sum(LOGPROB_BYTES * (1 + len(each.top)) for each in choice.logprobs)
        if self._asked is not None and self._length <= MAX_ANSWER_BYTES:
            self._pieces.append(choice)

    async def stage(self, head: Head, incomplete: Incomplete) -> None:
        """Before the answer is charged. Raises IdempotencyKeyInUse, StoreUnavailable."""
        if self._asked is not None:
            is_too_long = self._length > MAX_ANSWER_BYTES
            transcript = None if is_too_long else Transcript(head, tuple(self._pieces), incomplete).to_json()
            await self._answers.stage(self._asked, transcript)

    async def stage_delivered(self, head: Head, incomplete: Incomplete) -> None:
        """The same for a stream: what its client has is charged, whether or not it can be repeated."""
        with suppress(Refusal, StoreUnavailable):
            await self.stage(head, incomplete)

    def conclude(self, run: Run | None) -> None:
        """However the request ended. Returns at once; where this is lost the next claim finds out by itself."""
        if self._asked is not None:
            self._settler.keep(self._conclude(self._asked, run))

    async def _conclude(self, asked: Asked, run: Run | None) -> None:
        if run is not None:
            await run.over()
        with suppress(BillingError):
            await self._answers.conclude(asked)


def asked_under(key: str | None, caller: Principal, request_id: RequestId, body: Sampled) -> Asked | None:
    """The request as the store knows it. Raises ModelNotAllowed: a kept answer is no way around a key's scope."""
    if key is None:
        return None
    if caller.key.models is not None and body.model not in caller.key.models:
        raise ModelNotAllowed(body.model)
    sent = json.dumps([type(body).__name__, body.model_dump(exclude_unset=True, by_alias=True)], sort_keys=True)
    return Asked(caller.tenant.id, key, request_id, sha256(sent.encode()).hexdigest(), body.is_streamed)
