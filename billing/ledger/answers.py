"""Answers kept under a client's idempotency key, so that the same request again is the same answer.

Knows who claimed a key and what became of that request's hold; reads no answer. A claim is made, its
answer staged before it is charged, and concluded after: whoever dies in between, the next claim finds out
from the ledger what was charged.
"""

from dataclasses import dataclass
from hashlib import sha256
from typing import cast

from redis.asyncio import Redis

from billing.ledger.errors import AnswerIncomplete, AnswerTooLarge, IdempotencyKeyInUse, IdempotencyKeyReused
from billing.ledger.ledger import MARKER_WINDOW_MS
from billing.store.connection import guarded
from billing.store.keys import shard_for
from billing.store.scripts import source
from billing.usage import RequestId, TenantId, UsageRecord

KEPT_MS = 24 * 3_600_000
MAX_ANSWER_BYTES = 64 * 1024
RETRY_RUNNING_S = 1.0
_WHOLE, _LARGE = "whole", "large"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request under an idempotency key. Keys are bound to the tenant, not to one of its API keys."""

    tenant: TenantId
    key: str
    request_id: RequestId
    body: str
    """Digest of what was asked: the same key with another body is a mistake."""
    is_streamed: bool
    """A stream may be billed for a part of its answer."""


@dataclass(frozen=True, slots=True)
class Kept:
    """An earlier answer, as it was staged, and the record it was charged by."""

    answer: str
    record: UsageRecord


class Answers:
    """The idempotency keys of all tenants. Every method may be called again after a lost reply."""

    def __init__(
        self, redis: Redis, lease_ms: int, kept_ms: int = KEPT_MS, marker_window_ms: int = MARKER_WINDOW_MS
    ) -> None:
        """``lease_ms``: how long a claim stands before its hold is made; then it stands as long as the hold."""
        self._lease_ms, self._kept_ms, self._window_ms = lease_ms, kept_ms, marker_window_ms
        self._claim = redis.register_script(source("ledger/claim"))
        self._stage = redis.register_script(source("ledger/stage"))
        self._conclude = redis.register_script(source("ledger/conclude"))

    async def claim(self, asked: Asked) -> Kept | None:
        """Take the key for this request, in one step; or the answer that it stands for already.

        Raises:
            IdempotencyKeyReused: it stands for another body.
            IdempotencyKeyInUse: its request is still running.
            AnswerTooLarge, AnswerIncomplete: its request was charged, and there is no whole answer to repeat.
            StoreUnavailable: nothing may run.
        """
        arguments = [asked.request_id, asked.body, "1" if asked.is_streamed else "0"]
        arguments += [str(self._lease_ms), str(self._kept_ms), str(self._window_ms)]
        async with guarded():
            reply = cast(list[str], await self._claim(keys=_keys(asked), args=arguments))
        return _read(reply)

    async def check(self, asked: Asked) -> None:
        """Raises IdempotencyKeyInUse where another request has taken the key: this one was held up for too long."""
        await self._put(asked, "", "")

    async def stage(self, asked: Asked, answer: str | None) -> None:
        """Keep a whole answer before it is charged. Of ``None`` or one that is too large only that is kept.

        Raises:
            IdempotencyKeyInUse: another request has taken the key: this one must not be charged.
            StoreUnavailable: whether it was staged is unknown.
        """
        if answer is None or len(answer.encode()) > MAX_ANSWER_BYTES:
            await self._put(asked, _LARGE, "")
        else:
            await self._put(asked, _WHOLE, answer)

    async def _put(self, asked: Asked, kind: str, answer: str) -> None:
        async with guarded():
            is_ours = await self._stage(keys=_keys(asked)[:1], args=[asked.request_id, kind, answer])
        if not is_ours:
            raise IdempotencyKeyInUse(RETRY_RUNNING_S)

    async def conclude(self, asked: Asked) -> None:
        """After the request ended, however it did: keep what was charged, free the key where nothing was."""
        arguments = [asked.request_id, str(self._kept_ms), str(self._window_ms)]
        async with guarded():
            await self._conclude(keys=_keys(asked), args=arguments)


def _keys(asked: Asked) -> list[str]:
    shard = shard_for(asked.tenant)
    answer = shard.answer(asked.tenant, sha256(asked.key.encode()).hexdigest())
    return [answer, shard.holds, shard.stream, *shard.settled]


def _read(reply: list[str]) -> Kept | None:
    state = reply[0]
    if state == "claimed":
        return None
    if state == "reused":
        raise IdempotencyKeyReused
    _, record, kind, answer, holder = reply
    if state == "running":
        raise IdempotencyKeyInUse(RETRY_RUNNING_S)
    if kind == _LARGE:
        raise AnswerTooLarge(f"rec_{holder}")
    if not (record and answer):
        raise AnswerIncomplete(f"rec_{holder}")
    return Kept(answer, UsageRecord.from_json(record))
