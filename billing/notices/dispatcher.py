"""Sends notices to the owner's own address as signed webhooks (standardwebhooks.com), in order, until they are heard.

Knows one receiver. A notice keeps its id over all attempts; the receiver tells repeats apart by it.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Self

import httpx
from standardwebhooks import Webhook
from standardwebhooks.webhooks import EmptyWebhookSecretError

from billing.clock import Clock, now_ms
from billing.dodo.fields import to_iso
from billing.errors import BillingError
from billing.notices.log import Notices, Sent
from billing.notices.notice import Notice

TIMEOUT_S = 10.0
FIRST_RETRY_MS, MAX_RETRY_MS = 5_000, 3_600_000
ATTEMPTS = 24
"""Over about a day; then the notice is passed over. It stays in the log."""

log = logging.getLogger("farebox.billing.herald")


class NoticeReceiverMisconfigured(BillingError):
    """The environment names a receiver and no usable secret, or the other way round."""


@dataclass(frozen=True, slots=True)
class Receiver:
    """Where notices go, and the secret they are signed with."""

    url: str
    secret: str = field(repr=False)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Self | None:
        """The receiver that ``FAREBOX_NOTICES_URL`` and ``FAREBOX_NOTICES_SECRET`` name; ``None`` without them.

        Raises:
            HeraldMisconfigured: one of the two is missing or cannot be used.
        """
        url, secret = environ.get("FAREBOX_NOTICES_URL", ""), environ.get("FAREBOX_NOTICES_SECRET", "")
        if not url and not secret:
            return None
        if not url.startswith(("http://", "https://")):
            raise NoticeReceiverMisconfigured("FAREBOX_NOTICES_URL must be an http or https address")
        try:
            Webhook(secret)
        except (ValueError, EmptyWebhookSecretError):
            raise NoticeReceiverMisconfigured("FAREBOX_NOTICES_SECRET must be whsec_ followed by base64") from None
        return cls(url, secret)


class NoticeDispatcher:
    def __init__(self, notices: Notices, receiver: Receiver, client: httpx.AsyncClient, clock: Clock = now_ms) -> None:
        self._notices, self._receiver, self._client, self._clock = notices, receiver, client, clock

    async def run_once(self) -> int:
        """Send what is due; a notice that is not heard keeps those behind it waiting. How many were heard."""
        sent, heard = await self._notices.sent(), 0
        if self._clock() < sent.next_try_ms:
            return 0
        for notice in await self._notices.after(sent.at):
            if await self._is_heard(notice):
                sent, heard = Sent(notice.id), heard + 1
            elif sent.attempts + 1 >= ATTEMPTS:
                log.error("notice %s (%s) is passed over: %s never took it", notice.id, notice.kind, self._receiver.url)
                sent = Sent(notice.id)
            else:
                delay = min(MAX_RETRY_MS, FIRST_RETRY_MS * 2**sent.attempts)
                await self._notices.note_sent(Sent(sent.at, sent.attempts + 1, self._clock() + delay))
                return heard
            await self._notices.note_sent(sent)
        return heard

    async def _is_heard(self, notice: Notice) -> bool:
        body = json.dumps({"type": notice.kind, "timestamp": to_iso(notice.at_ms), "data": _data(notice)})
        now = datetime.now(UTC)
        headers = {
            "content-type": "application/json",
            "webhook-id": f"ntc_{notice.id}",
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Webhook(self._receiver.secret).sign(f"ntc_{notice.id}", now, body),
        }
        try:
            answer = await self._client.post(self._receiver.url, content=body, headers=headers, timeout=TIMEOUT_S)
        except httpx.HTTPError as error:
            log.warning("notice %s: %s", notice.id, type(error).__name__)
            return False
        return answer.is_success


def _data(notice: Notice) -> dict[str, str]:
    return {"tenant": notice.tenant, **notice.facts}
