"""The log of notices: each recorded once, the newest kept, and how far the receiver has acknowledged it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from redis.asyncio import Redis

from billing.notices.notice import Notice
from billing.store.connection import guarded
from billing.store.guard import BULK_DEADLINE_S
from billing.store.keys import NOTICES, NOTICES_RECORDED, NOTICES_SENT
from billing.store.scripts import Script
from billing.store.write import write

KEPT = 10_000
REMEMBERED_MS = 400 * 24 * 3_600_000
"""How long a notice that was recorded is not recorded again: longer than any period."""

logger = logging.getLogger("farebox.billing.notices.log")


@dataclass(frozen=True, slots=True)
class Sent:
    """How far the receiver has acknowledged the log, and how often sending what follows was tried."""

    at: str = "0-0"
    attempts: int = 0
    next_try_ms: int = 0


class Notices:
    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._record = Script(redis, "notices/record")

    async def record(self, notice: Notice) -> bool:
        """Add a notice to the log; False where the same was recorded before."""
        async with guarded(BULK_DEADLINE_S):
            is_new = await self._record.number(
                keys={"log": NOTICES, "recorded": NOTICES_RECORDED},
                args={
                    "once": notice.once,
                    "notice": notice.to_json(),
                    "at": notice.at_ms,
                    "remembered_from": notice.at_ms - REMEMBERED_MS,
                    "kept": KEPT,
                },
            )
        return bool(is_new)

    async def newest(self, count: int = 100) -> list[Notice]:
        """The newest first."""
        async with guarded(BULK_DEADLINE_S):
            return _read(await self._redis.xrevrange(NOTICES, count=count))

    async def after(self, at: str, count: int = 100) -> list[Notice]:
        """Notices behind a position in the log, oldest first."""
        async with guarded(BULK_DEADLINE_S):
            return _read(await self._redis.xrange(NOTICES, min=f"({at}" if at != "0-0" else "-", count=count))

    async def sent(self) -> Sent:
        async with guarded(BULK_DEADLINE_S):
            raw = cast(dict[str, str], await self._redis.hgetall(NOTICES_SENT))
        return Sent(raw["at"], int(raw["attempts"]), int(raw["next_try_ms"])) if raw else Sent()

    async def note_sent(self, sent: Sent) -> None:
        async with guarded(BULK_DEADLINE_S):
            await write(
                self._redis,
                ("HSET", NOTICES_SENT, "at", sent.at, "attempts", sent.attempts, "next_try_ms", sent.next_try_ms),
            )


def _read(raw: object) -> list[Notice]:
    """Notices as the store has them, without those that this version cannot read."""
    found = []
    for id_, fields in cast(Sequence[tuple[str, dict[str, str]]], raw or ()):
        try:
            found.append(Notice.from_json(fields["n"], id_))
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("notice %s cannot be read: %s", id_, error)
    return found
