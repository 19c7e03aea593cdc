"""Sends the webhooks that ``outbox`` says are due: signed by Standard Webhooks, with the latest payload.

Any answer but 2xx within 15 s is a failure; redirects are not followed (developer-resources/webhooks).
"""

import asyncio
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime

import httpx
from pydantic import BaseModel
from standardwebhooks.webhooks import Webhook

from cluster.dodo_sandbox.disputes import DisputeRecord, DisputeSummary
from cluster.dodo_sandbox.endpoints import EndpointRecord
from cluster.dodo_sandbox.entitlements import Grant, GrantRecord
from cluster.dodo_sandbox.outbox import Delivery, Message, PayloadKind
from cluster.dodo_sandbox.payments import Payment, PaymentRecord
from cluster.dodo_sandbox.recovery import Dunning, DunningRecord
from cluster.dodo_sandbox.refunds import Refund, RefundRecord
from cluster.dodo_sandbox.state import Sandbox
from cluster.dodo_sandbox.subscriptions import Subscription, SubscriptionRecord
from cluster.dodo_sandbox.wire import BUSINESS_ID, Resource, moment

TIMEOUT_S = 15.0
POLL_S = 1.0
PARALLEL = 8

_SHAPES: Mapping[PayloadKind, tuple[type[Resource], type[BaseModel], str]] = {
    "payment": (PaymentRecord, Payment, "Payment"),
    "refund": (RefundRecord, Refund, "Refund"),
    "grant": (GrantRecord, Grant, "EntitlementGrant"),
    "dispute": (DisputeRecord, DisputeSummary, "Dispute"),
    "subscription": (SubscriptionRecord, Subscription, "Subscription"),
    "dunning": (DunningRecord, Dunning, ""),
}


class Envelope(BaseModel):
    """The body of a webhook."""

    business_id: str = BUSINESS_ID
    type: str
    timestamp: datetime
    data: dict[str, object]


def payload(sandbox: Sandbox, message: Message) -> bytes:
    """The body of a message, with its resource as it is now."""
    record, shape, name = _SHAPES[message.kind]
    resource = sandbox.store.get(record, message.resource_id)
    assert resource is not None, f"{message.kind} {message.resource_id} of {message.id} is gone"
    data: dict[str, object] = {"payload_type": name} if name else {}
    data |= resource.model_dump(mode="json", include=set(shape.model_fields))
    if isinstance(resource, SubscriptionRecord):
        ends = resource.past_due_ends_at
        data |= {"payment_id": message.payment_id, "past_due_ends_at": ends and ends.isoformat()}
    envelope = Envelope(type=message.type, timestamp=moment(message.emitted_ms), data=data)
    return envelope.model_dump_json().encode()


def signed_headers(message_id: str, secret: str, body: bytes, at: datetime) -> dict[str, str]:
    """``webhook-id``, ``webhook-timestamp`` and ``webhook-signature`` of the raw body; ``at`` is real time."""
    return {
        "content-type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(secret).sign(message_id, at, body.decode()),
    }


class WebhookSender:
    """Sends due deliveries, a few at the same time."""

    def __init__(self, sandbox: Sandbox, client: httpx.AsyncClient) -> None:
        self._sandbox = sandbox
        self._client = client

    async def run_once(self) -> None:
        """Send what is due, or wait until something may be. After a crash, what was being sent is sent again."""
        outbox, settings = self._sandbox.outbox, self._sandbox.settings
        outbox.woken.clear()
        due = [] if settings.webhooks_paused else outbox.due(PARALLEL)
        if settings.webhooks_shuffled:
            random.shuffle(due)
        if due:
            await asyncio.gather(*(self.deliver(delivery) for delivery in due))
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(outbox.woken.wait(), POLL_S)

    async def deliver(self, delivery: Delivery) -> None:
        """Make one attempt, in as many copies as the settings say; the last answer counts."""
        accepted, status = False, ""
        for _ in range(self._sandbox.settings.webhook_copies):
            accepted, status = await self.send(delivery.message, delivery.endpoint_id)
        self._sandbox.outbox.sent(delivery, accepted, status, self._sandbox.settings.webhook_speed)

    async def send(self, message: Message, endpoint_id: str) -> tuple[bool, str]:
        """Whether the endpoint accepted it, and its status or the name of the error."""
        endpoint = self._sandbox.store.get(EndpointRecord, endpoint_id)
        if endpoint is None or endpoint.disabled:
            return False, "endpoint is gone"
        body = payload(self._sandbox, message)
        headers = endpoint.headers | signed_headers(message.id, endpoint.secret, body, datetime.now(UTC))
        try:
            answer = await self._client.post(endpoint.url, content=body, headers=headers, timeout=TIMEOUT_S)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return False, type(error).__name__
        return answer.is_success, str(answer.status_code)

    async def redeliver(self, messages: Sequence[Message], times: int, concurrent: bool) -> list[str]:
        """Send messages again, delivered or not, to every endpoint they are for; returns the answers."""
        sends = [
            (message, delivery.endpoint_id)
            for message in messages
            for delivery in self._sandbox.outbox.of_message(message.id)
            for _ in range(times)
        ]
        if concurrent:
            results = await asyncio.gather(*(self.send(*one) for one in sends))
        else:
            results = [await self.send(*one) for one in sends]
        return [status for _, status in results]
