"""Answers kept under a client's idempotency key, so that the same request again is the same answer.

A claim is made, its answer is staged before it is charged, and the claim is concluded after. Whichever process dies in
between, the next claim finds out from the ledger what was charged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from redis.asyncio import Redis

from billing.ledger.errors import AnswerIncomplete, AnswerTooLarge, IdempotencyKeyInUse, IdempotencyKeyReused
from billing.ledger.ledger import MARKER_WINDOW_MS
from billing.store.connection import guarded
from billing.store.keys import shard_for
from billing.store.scripts import Reply, Script
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
        self._claim = Script(redis, "ledger/claim")
        self._stage = Script(redis, "ledger/stage")
        self._conclude = Script(redis, "ledger/conclude")

    async def claim(self, asked: Asked) -> Kept | None:
        """Take the key for this request, in one step; or the answer that it stands for already.

        Raises:
            IdempotencyKeyReused: it stands for another body.
            IdempotencyKeyInUse: its request is still running.
            AnswerTooLarge, AnswerIncomplete: its request was charged, and there is no whole answer to repeat.
            StoreUnavailable: nothing may run.
        """
        async with guarded():
            reply = await self._claim.reply(
                keys=_keys(asked),
                args={
                    "request": asked.request_id,
                    "body": asked.body,
                    "may_deliver_early": int(asked.is_streamed),
                    "lease": self._lease_ms,
                    "ttl": self._kept_ms,
                    "window": self._window_ms,
                },
            )
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
            is_ours = await self._stage.number(
                keys={"answer": _answer_key(asked)},
                args={"request": asked.request_id, "kind": kind, "body": answer},
            )
        if not is_ours:
            raise IdempotencyKeyInUse(RETRY_RUNNING_S)

    async def conclude(self, asked: Asked) -> None:
        """After the request ended, however it did: keep what was charged, free the key where nothing was."""
        async with guarded():
            await self._conclude.number(
                keys=_keys(asked),
                args={"request": asked.request_id, "ttl": self._kept_ms, "window": self._window_ms},
            )


def _answer_key(asked: Asked) -> str:
    return shard_for(asked.tenant).answer(asked.tenant, sha256(asked.key.encode()).hexdigest())


def _keys(asked: Asked) -> dict[str, str | Sequence[str]]:
    shard = shard_for(asked.tenant)
    return {"answer": _answer_key(asked), "holds": shard.holds, "stream": shard.stream, "settled": shard.settled}


def _read(reply: Reply) -> Kept | None:
    if reply.state == "claimed":
        return None
    if reply.state == "reused":
        raise IdempotencyKeyReused
    if reply.state == "running":
        raise IdempotencyKeyInUse(RETRY_RUNNING_S)
    if reply["kind"] == _LARGE:
        raise AnswerTooLarge(f"rec_{reply['holder']}")
    if not (reply["record"] and reply["answer"]):
        raise AnswerIncomplete(f"rec_{reply['holder']}")
    return Kept(reply["answer"], UsageRecord.from_json(reply["record"]))
