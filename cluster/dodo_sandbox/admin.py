"""The sandbox's control routes under ``/_sandbox``, which Dodo does not have: faults, clock, payments and webhooks.

They need no API key: the sandbox listens on this machine only.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.dodo_sandbox import checkout, cycle, disputes, events
from cluster.dodo_sandbox.customers import customer_of
from cluster.dodo_sandbox.delivery import WebhookSender
from cluster.dodo_sandbox.errors import bad_request, not_found, unprocessable
from cluster.dodo_sandbox.faults import Faults, Rule
from cluster.dodo_sandbox.outbox import Delivery, Message, State
from cluster.dodo_sandbox.payments import Payment
from cluster.dodo_sandbox.refunds import CreateRefund, Refund, refund
from cluster.dodo_sandbox.state import SandboxDep, Settings
from cluster.dodo_sandbox.subscriptions import Subscription, change, running
from cluster.dodo_sandbox.wire import UtcTime

router = APIRouter(prefix="/_sandbox")


class Command(BaseModel):
    """The body of a request or an answer; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class MoveClock(Command):
    """Exactly one of the two. A negative ``advance_s`` moves the clock back."""

    advance_s: float | None = None
    now: UtcTime | None = None


class ClockState(Command):
    now: UtcTime
    offset_s: float
    renewals: int = 0


class Pay(Command):
    decline: bool = False


class CardBehaviour(Command):
    declines: bool


class Redelivery(Command):
    times: Annotated[int, Field(ge=1, le=1000)] = 1
    concurrent: bool = False


class ManyRedeliveries(Redelivery):
    """Which messages, and in which order. Without ids, the latest ``limit``."""

    ids: list[str] | None = None
    limit: Annotated[int, Field(ge=1, le=1000)] = 20
    order: Literal["given", "reverse", "shuffle"] = "given"


class Redelivered(Command):
    statuses: list[str]


class Count(Command):
    count: int


class DeliveryState(Command):
    """The delivery of one message to one endpoint. ``webhook_id`` is the header ``webhook-id``."""

    webhook_id: str
    type: str
    resource_id: str
    endpoint_id: str
    state: State
    attempts: int
    last_status: str
    due_ms: int
    emitted_ms: int


class Deliveries(Command):
    data: list[DeliveryState]


@dataclass(frozen=True)
class FaultState:
    rule: Rule
    hits: int


def _faults(request: Request) -> Faults:
    faults: Faults = request.app.state.faults
    return faults


def _sender(request: Request) -> WebhookSender:
    sender: WebhookSender = request.app.state.sender
    return sender


@router.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@router.post("/faults")
async def arm(rule: Rule, request: Request) -> list[FaultState]:
    _faults(request).arm(rule)
    return await list_faults(request)


@router.get("/faults")
async def list_faults(request: Request) -> list[FaultState]:
    return [FaultState(armed.rule, armed.hits) for armed in _faults(request).armed]


@router.delete("/faults")
async def clear_faults(request: Request) -> Count:
    count = len(_faults(request).armed)
    _faults(request).clear()
    return Count(count=count)


@router.get("/clock")
async def read_clock(sandbox: SandboxDep) -> ClockState:
    offset_ms = sandbox.clock.now_ms() - sandbox.clock.real_ms()
    return ClockState(now=sandbox.clock.now(), offset_s=offset_ms / 1000)


@router.post("/clock")
async def move_clock(body: MoveClock, sandbox: SandboxDep) -> ClockState:
    """Move the sandbox's clock, and renew every subscription whose period has ended by then."""
    if (body.advance_s is None) == (body.now is None):
        raise unprocessable("give either advance_s or now")
    if body.now is not None:
        sandbox.clock.move_to(body.now)
    elif body.advance_s is not None:
        sandbox.clock.advance(round(body.advance_s * 1000))
    renewals = cycle.run_due(sandbox)
    return (await read_clock(sandbox)).model_copy(update={"renewals": renewals})


@router.get("/settings")
async def read_settings(sandbox: SandboxDep) -> Settings:
    return sandbox.settings


@router.post("/settings")
async def change_settings(changes: dict[str, object], sandbox: SandboxDep) -> Settings:
    try:
        settings = sandbox.change_settings(changes)
    except ValidationError as error:
        first = error.errors()[0]
        raise unprocessable(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    sandbox.outbox.woken.set()
    return settings


@router.get("/events")
async def list_events(
    sandbox: SandboxDep,
    customer_id: str | None = None,
    event_name: str | None = None,
    limit: Annotated[int, Query(ge=1)] = 100_000,
) -> list[events.Event]:
    """Every stored event, the oldest first."""
    return events.select(sandbox.store, customer_id, event_name, None, None)[:limit]


@router.get("/sums")
async def sums(sandbox: SandboxDep) -> dict[str, dict[str, dict[str, int | float]]]:
    """``{customer_id: {event_name: {"events": n, "<numeric metadata key>": sum}}}`` of unique events."""
    return {
        customer_id: {name: {**total.totals, "events": total.events} for name, total in by_name.items()}
        for customer_id, by_name in events.sums(sandbox.store).items()
    }


@router.post("/pay/{session_id}")
async def pay(session_id: str, sandbox: SandboxDep, body: Pay | None = None) -> Payment:
    return checkout.pay(sandbox, session_id, declined=body is not None and body.decline)


@router.post("/refund/{payment_id}")
async def refund_payment(payment_id: str, sandbox: SandboxDep) -> Refund:
    return refund(sandbox, CreateRefund(payment_id=payment_id))


@router.post("/disputes/{payment_id}")
async def open_dispute(
    payment_id: str, sandbox: SandboxDep, body: disputes.OpenDispute | None = None
) -> disputes.Dispute:
    """Dispute ``amount`` cents of a payment, or all of it, as the buyer's bank does."""
    return disputes.open_dispute(sandbox, payment_id, body or disputes.OpenDispute())


@router.post("/disputes/{dispute_id}/{ending}")
async def end_dispute(dispute_id: str, ending: disputes.Ending, sandbox: SandboxDep) -> disputes.Dispute:
    return disputes.end_dispute(sandbox, dispute_id, ending)


@router.post("/customers/{customer_id}/card")
async def set_card(customer_id: str, body: CardBehaviour, sandbox: SandboxDep) -> CardBehaviour:
    """Let later charges of this customer fail or succeed."""
    sandbox.store.put(customer_of(sandbox, customer_id).model_copy(update={"card_declines": body.declines}))
    return body


@router.post("/subscriptions/{subscription_id}/renew")
async def renew(subscription_id: str, sandbox: SandboxDep) -> Subscription:
    """End the current period now without moving the clock; after a failed charge, charge again."""
    one, now = running(sandbox, subscription_id), sandbox.clock.now()
    if one.status != "active" and one.failed_at is None:
        raise bad_request(f"Subscription {subscription_id} is {one.status}")
    if one.status == "active" and one.next_billing_date > now:
        one = change(sandbox, one, "subscription.updated", now, next_billing_date=now)
    with sandbox.store.transaction():
        if one.paused_at is not None:
            return cycle.bill_pause(sandbox, one, now)
        return cycle.renew(sandbox, one, None if one.status == "active" else now)


@router.get("/webhooks")
async def list_deliveries(sandbox: SandboxDep, limit: Annotated[int, Query(ge=1, le=10_000)] = 100) -> Deliveries:
    """The latest first."""
    return Deliveries(data=[_delivery_state(one) for one in sandbox.outbox.recent(limit)])


def _delivery_state(one: Delivery) -> DeliveryState:
    return DeliveryState(
        webhook_id=one.message.id,
        type=one.message.type,
        resource_id=one.message.resource_id,
        endpoint_id=one.endpoint_id,
        state=one.state,
        attempts=one.attempts,
        last_status=one.last_status,
        due_ms=one.due_ms,
        emitted_ms=one.message.emitted_ms,
    )


@router.post("/webhooks/flush")
async def flush_webhooks(sandbox: SandboxDep) -> Count:
    """Send every delivery that waits for its next attempt now."""
    return Count(count=sandbox.outbox.retry_now())


@router.post("/webhooks/redeliver")
async def redeliver_many(body: ManyRedeliveries, request: Request, sandbox: SandboxDep) -> Redelivered:
    known = {d.message.id: d.message for d in reversed(sandbox.outbox.recent(10_000))}
    ids = body.ids if body.ids is not None else list(known)[-body.limit :]
    if missing := [one for one in ids if one not in known]:
        raise not_found("message", missing[0])
    messages = _ordered([known[one] for one in ids], body.order)
    return Redelivered(statuses=await _sender(request).redeliver(messages, body.times, body.concurrent))


@router.post("/webhooks/{webhook_id}/redeliver")
async def redeliver(
    webhook_id: str, request: Request, sandbox: SandboxDep, body: Redelivery | None = None
) -> Redelivered:
    """Send one message ``times`` times with its id and new signatures; returns the answers."""
    found = sandbox.outbox.of_message(webhook_id)
    if not found:
        raise not_found("message", webhook_id)
    asked = body or Redelivery()
    return Redelivered(statuses=await _sender(request).redeliver([found[0].message], asked.times, asked.concurrent))


def _ordered(messages: Sequence[Message], order: str) -> list[Message]:
    match order:
        case "reverse":
            return list(reversed(messages))
        case "shuffle":
            return random.sample(messages, len(messages))
        case _:
            return list(messages)
