"""Signed webhooks from Dodo: verified, kept, applied once, parked when they cannot be.

Knows how a delivery is trusted, remembered and tried again; what it does to credit and plans stands
in ``payments`` and ``subscriptions``. A type that moves nothing is kept.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace

from redis.asyncio import Redis
from standardwebhooks import Webhook
from standardwebhooks.webhooks import EmptyWebhookSecretError, WebhookVerificationError

from billing.clock import Clock, now_ms
from billing.commerce.alerts import Alerts
from billing.commerce.inbox import Delivery, Inbox, Outcome
from billing.commerce.licences import Licences
from billing.commerce.payments import Payments
from billing.commerce.signups import Signups
from billing.commerce.subscriptions import DAY_MS, Subscriptions
from billing.commerce.waiting import CatalogSource, NotYet
from billing.dodo.client import Dodo
from billing.dodo.errors import DodoRefused, DodoUnavailable, WebhookRejected
from billing.dodo.fields import Wire, WireError, inner, moment_ms, read_json, text
from billing.dodo.wire import Payment, Refund
from billing.errors import BillingError
from billing.ledger.ledger import Ledger
from billing.notices.log import Notices
from billing.store.errors import StoreUnavailable
from billing.tenants.directory import Tenants
from billing.tenants.tenant import Tenant

FIRST_RETRY_MS, MAX_RETRY_MS = 30_000, 60 * 60_000
KEEP_MS = 30 * DAY_MS
"""Dodo replays deliveries for two weeks; after that their payments and refunds still count once."""
ASK_RESTING_MS, MOST_RESTING = 60 * 60_000, 20
"""How seldom Dodo is asked about one subscription that rests, and about how many at once."""

log = logging.getLogger("farebox.billing.dodo.webhooks")


class Webhooks:
    """Applies deliveries, in any order and any number of times."""

    def __init__(
        self,
        redis: Redis,
        dodo: Dodo,
        ledger: Ledger,
        tenants: Tenants,
        catalog_source: CatalogSource,
        secret: str,
        clock: Clock = now_ms,
    ) -> None:
        self.inbox = Inbox(redis)
        self._subscriptions = Subscriptions(dodo, tenants, self.inbox, catalog_source, clock)
        self.payments = Payments(dodo, ledger, tenants, self.inbox, self._subscriptions, catalog_source, clock)
        signups = Signups(dodo, tenants, catalog_source, clock)
        self._licences = Licences(dodo, tenants, self.inbox, signups, clock)
        self._alerts = Alerts(tenants, Notices(redis), clock)
        self._secret, self._clock = secret, clock
        self._asked_ms: dict[str, int] = {}

    async def receive(self, body: bytes, headers: Mapping[str, str]) -> Delivery:
        """Verify, keep and apply one delivery; returns once that is written. Same id again: nothing more.

        Raises:
            WebhookRejected: the signature or the body does not verify.
            StoreUnavailable: nothing may have been kept: Dodo must send it again.
        """
        wire = verify(body, headers, self._secret)
        webhook_id = {name.lower(): value for name, value in headers.items()}["webhook-id"]
        now = self._clock()
        delivery = Delivery(webhook_id, text(wire, "type", ""), body.decode(), now)
        kept = await self.inbox.receive(delivery, now + FIRST_RETRY_MS)
        return kept if kept.outcome is not Outcome.WAITING else await self._apply(kept)

    async def replay(self, limit: int = 20) -> int:
        """Try parked deliveries again that are due. How many were applied."""
        applied = 0
        for delivery in await self.inbox.parked(self._clock(), limit):
            tried = await self._apply(delivery)
            applied += tried.outcome is not Outcome.WAITING
            if tried.reason.startswith(DodoUnavailable.__name__):
                break
        return applied

    async def prune(self) -> int:
        return await self.inbox.prune(self._clock() - KEEP_MS)

    async def refresh_overdue(self, tenants: list[Tenant]) -> int:
        """Ask Dodo about subscriptions whose period ended without news, and now and then about those that rest.

        What would open a resting one again comes by webhook, which can be lost as well. One whose tenant was moved
        to another plan rests for good, unless a webhook says otherwise. How many were asked about.
        """
        now, asked = self._clock(), self._asked_ms
        carried = [t.subscription for t in tenants if t.subscription and t.plan == t.subscription.plan]
        overdue = [t.subscription for t in tenants if t.subscription and t.subscription.is_overdue(now)]
        resting = sorted((s for s in carried if s.is_resting(now)), key=lambda s: asked.get(s.id, 0))
        due = [s for s in resting if not 0 <= now - asked.get(s.id, 0) < ASK_RESTING_MS][:MOST_RESTING]
        self._asked_ms = {s.id: asked[s.id] for s in resting if s.id in asked}
        for subscription in due + overdue:
            self._asked_ms[subscription.id] = now
            try:
                await self._subscriptions.refresh(subscription.id)
            except (NotYet, DodoRefused) as reason:
                log.warning("subscription %s: %s", subscription.id, reason)
        return len(due) + len(overdue)

    async def _apply(self, delivery: Delivery) -> Delivery:
        try:
            outcome = await self._dispatch(delivery.type, read_json(delivery.body))
        except StoreUnavailable:
            raise
        except (NotYet, WireError, BillingError) as reason:
            return await self._park(delivery, reason)
        done = replace(delivery, outcome=outcome, reason="", attempts=delivery.attempts + 1)
        await self.inbox.finish(done)
        return done

    async def _park(self, delivery: Delivery, reason: Exception) -> Delivery:
        attempts = delivery.attempts + 1
        parked = replace(delivery, reason=f"{type(reason).__name__}: {reason}", attempts=attempts)
        delay = min(MAX_RETRY_MS, FIRST_RETRY_MS * 2 ** min(attempts - 1, 10))
        await self.inbox.park(parked, self._clock() + delay)
        log.warning("parked webhook %s (%s): %s", delivery.id, delivery.type, parked.reason)
        return parked

    async def _dispatch(self, kind: str, wire: Wire) -> Outcome:
        data = inner(wire, "data")
        if kind == "payment.succeeded":
            await self.payments.succeeded(Payment.read(data))
        elif kind == "refund.succeeded":
            await self.payments.refunded(Refund.read(data))
        elif kind.startswith("dispute."):
            await self.payments.disputed(text(data, "dispute_id"))
        elif kind.startswith("entitlement_grant."):
            if not await self._licences.refresh(text(data, "entitlement_id"), text(data, "customer_id")):
                return Outcome.KEPT
        elif kind.startswith("subscription."):
            await self._subscriptions.refresh(text(data, "subscription_id"), moment_ms(data, "past_due_ends_at"))
        else:
            return Outcome.APPLIED if await self._alerts.tell(kind, data) else Outcome.KEPT
        await self._alerts.tell(kind, data)
        return Outcome.APPLIED


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
