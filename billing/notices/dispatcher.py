"""Send notices to the owner's receiver as signed webhooks (standardwebhooks.com), in order, until it acknowledges them.

A receiver that does not answer, or answers that it cannot, keeps all notices waiting. One that refuses a notice (4xx)
gets those behind it meanwhile. A notice keeps its id over all attempts: the receiver tells repeats apart by it.
"""

import json
import logging
from datetime import UTC, datetime
from enum import Enum

import httpx
from standardwebhooks import Webhook

from billing.clock import Clock, now_ms
from billing.dodo.fields import to_iso
from billing.notices.log import Notices, Sent
from billing.notices.notice import Notice
from billing.notices.receiver import NoticeReceiver
from billing.sweep import EndOfRun, Sweep

TIMEOUT_S = 10.0
FIRST_RETRY_MS, MAX_RETRY_MS = 5_000, 3_600_000
ATTEMPTS = 24
"""Over about a day; then the notice is passed over. It stays in the log."""
WINDOW = 1_000
"""Notices that are looked at behind the first one that is not acknowledged."""
TRY_LATER = (408, 425, 429)
"""Statuses of 4xx that are about the receiver, not about the notice."""

log = logging.getLogger("farebox.billing.notices.dispatcher")


class NoticeRefused(Exception):
    """The receiver answered that it does not take this notice."""


class _Answer(Enum):
    ACKNOWLEDGED = "acknowledged"
    REFUSED = "refused"
    AWAY = "away"
    """No answer, or one that is not about the notice."""


class NoticeDispatcher:
    """One per process."""

    def __init__(
        self, receiver: NoticeReceiver, clock: Clock = now_ms, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self._receiver, self._clock, self._transport = receiver, clock, transport
        self._position = Sent()
        self._waiting: list[Notice] = []
        """Notices behind the position, oldest first."""
        self._done: set[str] = set()
        """Ids of those that were acknowledged or passed over while one before them was refused."""

    async def run_once(self, notices: Notices, sweep: Sweep) -> int:
        """Send what is due. How many notices were acknowledged."""
        self._position = await notices.sent()
        if self._clock() < self._position.next_try_ms:
            return 0
        self._waiting = await notices.after(self._position.at, WINDOW)
        to_send = [one for one in self._waiting if one.id not in self._done]
        async with httpx.AsyncClient(transport=self._transport) as client:

            async def send(notice: Notice) -> bool:
                return await self._send(notice, notices, client, sweep.failures_of(notice.id))

            return sum(await sweep.run(to_send, send, id_of=lambda notice: notice.id))

    async def _send(self, notice: Notice, notices: Notices, client: httpx.AsyncClient, refusals: int) -> bool:
        """Was it acknowledged? False where it is passed over after too many attempts.

        Raises:
            NoticeRefused: it is tried again later, and those behind it now.
            EndOfRun: the receiver is away.
        """
        answer = await self._post(notice, client)
        if answer is not _Answer.ACKNOWLEDGED:
            attempts = 1 + (self._position.attempts if answer is _Answer.AWAY else refusals)
            if attempts < ATTEMPTS and answer is _Answer.AWAY:
                delay_ms = min(MAX_RETRY_MS, FIRST_RETRY_MS * 2 ** (attempts - 1))
                await self._move(notices, Sent(self._position.at, attempts, self._clock() + delay_ms))
                raise EndOfRun
            if attempts < ATTEMPTS:
                raise NoticeRefused(f"{self._receiver.url} refuses notice {notice.id} ({notice.kind})")
            log.error("notice %s (%s) is passed over: %s does not take it", notice.id, notice.kind, self._receiver.url)
        self._done.add(notice.id)
        await self._move(notices, self._behind_done())
        return answer is _Answer.ACKNOWLEDGED

    def _behind_done(self) -> Sent:
        """The position behind all notices, from the first on, that are done with."""
        at = self._position.at
        while self._waiting and self._waiting[0].id in self._done:
            at = self._waiting.pop(0).id
            self._done.discard(at)
        return Sent(at)

    async def _move(self, notices: Notices, position: Sent) -> None:
        await notices.note_sent(position)
        self._position = position

    async def _post(self, notice: Notice, client: httpx.AsyncClient) -> _Answer:
        data = {"tenant": notice.tenant, **notice.facts}
        body = json.dumps({"type": notice.kind, "timestamp": to_iso(notice.at_ms), "data": data})
        now = datetime.now(UTC)
        headers = {
            "content-type": "application/json",
            "webhook-id": f"ntc_{notice.id}",
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Webhook(self._receiver.secret).sign(f"ntc_{notice.id}", now, body),
        }
        try:
            answer = await client.post(self._receiver.url, content=body, headers=headers, timeout=TIMEOUT_S)
        except httpx.HTTPError as error:
            log.warning("notice %s: %s", notice.id, type(error).__name__)
            return _Answer.AWAY
        if answer.is_success:
            return _Answer.ACKNOWLEDGED
        is_refused = answer.is_client_error and answer.status_code not in TRY_LATER
        return _Answer.REFUSED if is_refused else _Answer.AWAY
