"""The webhook messages of the sandbox, and when each is to be sent to each endpoint.

A message has the id of its resource and not its content: like Dodo, a delivery has the payload of when it is sent.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from billing.clock import Clock
from cluster.dodo_sandbox.store import Store
from cluster.dodo_sandbox.wire import Resource, new_id

RETRY_DELAYS_S = (0, 5, 300, 1_800, 7_200, 18_000, 36_000, 36_000)
"""Dodo's eight attempts, each after the failure before it (developer-resources/webhooks)."""

PayloadKind = Literal["payment", "subscription", "refund", "dispute", "grant", "dunning"]
State = Literal["pending", "delivered", "failed"]


@dataclass(frozen=True)
class Message:
    """One event. ``payment_id`` is the payment in ``subscription.renewed``."""

    id: str
    type: str
    kind: PayloadKind
    resource_id: str
    payment_id: str | None
    emitted_ms: int


@dataclass(frozen=True)
class Delivery:
    """The delivery of one message to one endpoint; ``due_ms`` is real time."""

    message: Message
    endpoint_id: str
    attempts: int
    due_ms: int
    state: State
    last_status: str


class Outbox:
    """Messages and deliveries in the store. ``woken`` is set when a delivery may be due."""

    def __init__(self, store: Store, real: Clock) -> None:
        self._db = store.db
        self._store = store
        self._real = real
        self.woken = asyncio.Event()

    def emit(
        self,
        type_: str,
        kind: PayloadKind,
        resource: Resource,
        endpoints: Iterable[str],
        at_ms: int,
        payment_id: str | None = None,
    ) -> Message:
        """Store an event for ``endpoints``, due at once."""
        message = Message(new_id("msg"), type_, kind, resource.key, payment_id, at_ms)
        with self._store.transaction():
            self._db.execute(
                "INSERT INTO messages (id, type, kind, resource_id, payment_id, emitted_ms) VALUES (?, ?, ?, ?, ?, ?)",
                (message.id, type_, kind, resource.key, payment_id, at_ms),
            )
            self._db.executemany(
                "INSERT INTO deliveries (message_id, endpoint_id, due_ms) VALUES (?, ?, ?)",
                [(message.id, endpoint, self._real()) for endpoint in endpoints],
            )
        self.woken.set()
        return message

    def due(self, limit: int = 64) -> list[Delivery]:
        return self._select("state = 'pending' AND due_ms <= ? ORDER BY due_ms, d.seq LIMIT ?", (self._real(), limit))

    def of_message(self, message_id: str) -> list[Delivery]:
        return self._select("m.id = ? ORDER BY d.seq", (message_id,))

    def recent(self, limit: int = 50) -> list[Delivery]:
        return self._select("1 ORDER BY d.seq DESC LIMIT ?", (limit,))

    def sent(self, delivery: Delivery, accepted: bool, status: str, speed: float) -> None:
        """Record an attempt. A refused one is due again after Dodo's delay, until eight attempts were made."""
        attempts = delivery.attempts + 1
        state: State = "delivered" if accepted else "pending"
        due_ms = delivery.due_ms
        if not accepted:
            if attempts < len(RETRY_DELAYS_S):
                due_ms = self._real() + round(RETRY_DELAYS_S[attempts] * 1000 / speed)
            else:
                state = "failed"
        self._db.execute(
            "UPDATE deliveries SET attempts = ?, state = ?, due_ms = ?, last_status = ?"
            " WHERE message_id = ? AND endpoint_id = ?",
            (attempts, state, due_ms, status, delivery.message.id, delivery.endpoint_id),
        )

    def retry_now(self) -> int:
        """Make every pending delivery due now; returns their number."""
        changed = self._db.execute("UPDATE deliveries SET due_ms = ? WHERE state = 'pending'", (self._real(),)).rowcount
        self.woken.set()
        return changed

    def cancel_deliveries(self, endpoint_id: str) -> None:
        self._db.execute(
            "UPDATE deliveries SET state = 'failed' WHERE endpoint_id = ? AND state = 'pending'", (endpoint_id,)
        )

    def _select(self, where: str, parameters: tuple[str | int, ...]) -> list[Delivery]:
        rows = self._db.execute(
            "SELECT m.id, m.type, m.kind, m.resource_id, m.payment_id, m.emitted_ms, d.endpoint_id, d.attempts,"
            f" d.due_ms, d.state, d.last_status FROM deliveries d JOIN messages m ON m.id = d.message_id WHERE {where}",
            parameters,
        )
        return [Delivery(Message(*row[:6]), *row[6:]) for row in rows]
