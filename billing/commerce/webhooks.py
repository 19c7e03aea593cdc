"""Signed webhooks from Dodo: verify, store, apply once; park what cannot be applied, and try it again.

What is about a product that is not ours is set aside.
What a delivery does to credit, plans and keys stands in ``payments``, ``subscriptions`` and ``licences``.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace

from standardwebhooks import Webhook
from standardwebhooks.webhooks import EmptyWebhookSecretError, WebhookVerificationError

from billing.commerce.alerts import Alerts, is_about_money, payment_of
from billing.commerce.context import Commerce
from billing.commerce.inbox import OPEN, Delivery, Inbox, Outcome
from billing.commerce.licences import Licences
from billing.commerce.payments import Payments
from billing.commerce.subscriptions import DAY_MS, Subscriptions
from billing.commerce.waiting import NotOurs, NotYet
from billing.dodo.errors import DodoUnavailable, DodoUnreadable, WebhookRejected
from billing.dodo.fields import Wire, WireError, inner, moment_ms, read_json, text
from billing.dodo.wire import Payment, Refund
from billing.errors import BillingError
from billing.store.errors import StoreUnavailable
from billing.sweep import Sweep
from billing.tenants.tenant import Tenant

PAYMENT = "payment.succeeded"
FIRST_RETRY_MS, MAX_RETRY_MS = 30_000, 60 * 60_000
KEEP_MS = 30 * DAY_MS
"""Dodo replays deliveries for two weeks; after that their payments and refunds still count once."""
REPLAYED_AT_ONCE = 20
ASK_RESTING_MS, MOST_RESTING = 60 * 60_000, 20
"""How seldom Dodo is asked about one subscription that rests, and about how many at once."""

log = logging.getLogger("farebox.billing.commerce.webhooks")


class Webhooks:
    """Applies deliveries, in any order and any number of times."""

    def __init__(self, commerce: Commerce, secret: str) -> None:
        self.inbox = Inbox(commerce.redis)
        self.payments = Payments(commerce)
        self._subscriptions, self._licences, self._alerts = (
            Subscriptions(commerce),
            Licences(commerce),
            Alerts(commerce),
        )
        self._secret, self._clock = secret, commerce.clock
        self._asked_ms: dict[str, int] = {}
        """When Dodo was last asked about each subscription that rests."""

    async def receive(self, body: bytes, headers: Mapping[str, str]) -> Delivery:
        """Verify, store and apply one delivery; returns once that is written. Same id again: nothing more.

        Raises:
            WebhookRejected: the signature or the body does not verify.
            StoreUnavailable: nothing may have been stored: Dodo must send it again.
        """
        wire = verify(body, headers, self._secret)
        webhook_id = {name.lower(): value for name, value in headers.items()}["webhook-id"]
        now = self._clock()
        delivery = Delivery(webhook_id, text(wire, "type", ""), body.decode(), now)
        stored = await self.inbox.receive(delivery, now + FIRST_RETRY_MS)
        if stored.outcome is not Outcome.WAITING:
            return stored
        applied, _ = await self._apply(stored)
        return applied

    async def replay(self, sweep: Sweep) -> int:
        """Try parked deliveries that are due again. How many were applied."""
        now = self._clock()
        left_out = {one.id for one in sweep.failing if now < one.retry_at_ms}
        due = await self.inbox.due(now, REPLAYED_AT_ONCE + len(left_out))
        return sum(await sweep.run([id_ for id_ in due if id_ not in left_out][:REPLAYED_AT_ONCE], self._replay_one))

    async def _replay_one(self, webhook_id: str) -> bool:
        # It goes behind the others first: whatever becomes of this try, it is not the first in line again.
        await self.inbox.reschedule([webhook_id], self._clock() + FIRST_RETRY_MS)
        delivery = await self.inbox.get(webhook_id)
        if delivery is None or delivery.outcome not in OPEN:
            await self.inbox.forget(webhook_id)
            return False
        applied, reason = await self._apply(delivery)
        if isinstance(reason, DodoUnavailable) and not isinstance(reason, DodoUnreadable):
            raise reason
        return applied.outcome is not Outcome.WAITING

    async def prune(self) -> int:
        """Delete old deliveries that are finished or set aside. How many those were."""
        return await self.inbox.prune(self._clock() - KEEP_MS)

    async def refresh_overdue(self, tenants: list[Tenant], sweep: Sweep) -> int:
        """Ask Dodo about subscriptions whose period ended without an event, and now and then about those that rest.

        A resting one goes on by webhook, which can be lost as well. One whose tenant was moved to another plan rests
        for good, unless a webhook says otherwise. How many were refreshed.
        """
        now, asked = self._clock(), self._asked_ms
        carried = [t.subscription for t in tenants if t.subscription and t.plan == t.subscription.plan]
        overdue = [t.subscription for t in tenants if t.subscription and t.subscription.is_overdue(now)]
        resting = sorted((s for s in carried if s.is_resting(now)), key=lambda s: asked.get(s.id, 0))
        due = [s for s in resting if not 0 <= now - asked.get(s.id, 0) < ASK_RESTING_MS][:MOST_RESTING]
        self._asked_ms = {s.id: asked[s.id] for s in resting if s.id in asked}

        async def refresh(subscription_id: str) -> None:
            self._asked_ms[subscription_id] = now
            await self._subscriptions.refresh(subscription_id)

        return len(await sweep.run([s.id for s in due + overdue], refresh, own=(DodoUnreadable, NotYet, NotOurs)))

    async def _apply(self, delivery: Delivery) -> tuple[Delivery, Exception | None]:
        """Apply a delivery, or park it whatever goes wrong. Returns it as stored, and why it was parked."""
        try:
            outcome, reason_kept = await self._dispatch(delivery)
        except StoreUnavailable:
            raise
        except NotOurs as reason:
            outcome, reason_kept = await self._set_aside(delivery, reason)
        except (NotYet, WireError, BillingError) as reason:
            return await self._park(delivery, reason), reason
        except Exception as error:
            log.exception("webhook %s (%s) met an error of ours", delivery.id, delivery.type)
            return await self._park(delivery, error), error
        done = replace(delivery, outcome=outcome, reason=reason_kept, attempts=delivery.attempts + 1)
        await self.inbox.finish(done)
        if outcome is Outcome.SET_ASIDE:
            bought = await self.inbox.purchase(payment_of(done).get("payment_id", ""))
            if bought and bought[0].tenant:  # its payment was booked meanwhile
                await self.inbox.reschedule([done.id], self._clock())
        return done, None

    async def _set_aside(self, delivery: Delivery, reason: NotOurs) -> tuple[Outcome, str]:
        """How a delivery about a product that is not ours ends: one about money is kept for a person to look at."""
        if not is_about_money(delivery.type):
            return Outcome.KEPT, str(reason)
        if delivery.type == PAYMENT:
            await self._alerts.record_set_aside(replace(delivery, reason=str(reason)), reason.products)
        return Outcome.SET_ASIDE, str(reason)

    async def _park(self, delivery: Delivery, reason: Exception) -> Delivery:
        attempts = delivery.attempts + 1
        parked = replace(delivery, reason=f"{type(reason).__name__}: {reason}", attempts=attempts)
        delay = min(MAX_RETRY_MS, FIRST_RETRY_MS * 2 ** min(attempts - 1, 10))
        await self._alerts.record_waiting(parked)
        await self.inbox.park(parked, self._clock() + delay)
        log.warning("parked webhook %s (%s): %s", delivery.id, delivery.type, parked.reason)
        return parked

    async def _dispatch(self, delivery: Delivery) -> tuple[Outcome, str]:
        """How a delivery ended, and what of it is not ours."""
        wire, kind, rest = read_json(delivery.body), delivery.type, ""
        data = inner(wire, "data")
        if not kind:
            raise WireError("type is missing")
        if kind == PAYMENT:
            payment = Payment.read(data)
            if foreign := await self.payments.succeeded(payment):
                rest = f"the rest of it: {NotOurs(f'payment {payment.id}', foreign)}"
                await self._alerts.record_set_aside(replace(delivery, reason=rest), foreign)
        elif kind == "refund.succeeded":
            await self.payments.refunded(Refund.read(data))
        elif kind.startswith("dispute."):
            await self.payments.disputed(text(data, "dispute_id"))
        elif kind.startswith("entitlement_grant."):
            if not await self._licences.refresh(text(data, "entitlement_id"), text(data, "customer_id")):
                return Outcome.KEPT, ""
        elif kind.startswith("subscription."):
            await self._subscriptions.refresh(text(data, "subscription_id"), moment_ms(data, "past_due_ends_at"))
        else:
            return (Outcome.APPLIED if await self._alerts.record(kind, data) else Outcome.KEPT), ""
        await self._alerts.record(kind, data)
        return Outcome.APPLIED, rest


def verify(body: bytes, headers: Mapping[str, str], secret: str) -> Wire:
    """The envelope of a delivery that Dodo signed within the last five minutes (standardwebhooks.com).

    Raises:
        WebhookRejected: anything about the headers, the signature or the body is not as it must be.
    """
    try:
        Webhook(secret).verify(body, dict(headers), json_parse=False)
        return read_json(body)
    except (WebhookVerificationError, EmptyWebhookSecretError, ValueError, TypeError) as error:
        raise WebhookRejected(f"{type(error).__name__}: {error}") from error
