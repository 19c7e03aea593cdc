"""Signed webhooks from Dodo: verified, kept, applied once, parked when they cannot be.

Only a succeeded payment grants, by product and quantity from our own configuration. Everything
else is a reason to look at Dodo again, or is kept and moves nothing.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace

from redis.asyncio import Redis
from standardwebhooks import Webhook
from standardwebhooks.webhooks import EmptyWebhookSecretError, WebhookVerificationError

from billing.account import Clawback, Grant
from billing.clock import Clock, now_ms
from billing.dodo.client import Dodo
from billing.dodo.subscriptions import DAY_MS, CatalogueSource, NotYet, Subscriptions
from billing.dodo.wire import Payment, Refund, UsagePeriod, Wire, WireError, inner, moment_ms, read_json, text
from billing.errors import BillingError, DodoRefused, DodoUnavailable, StoreUnavailable, WebhookRejected
from billing.money import divide_up
from billing.store.holds import Ledger
from billing.store.inbox import CHARGE_METER, Delivery, Inbox, Outcome, Term
from billing.store.tenants import Tenants
from billing.tenants import Tenant

FIRST_RETRY_MS, MAX_RETRY_MS = 30_000, 60 * 60_000
HOUR_MS = 60 * 60_000
KEEP_MS = 30 * DAY_MS
"""Dodo replays deliveries for two weeks; after that their payments and refunds still count once."""

log = logging.getLogger("farebox.billing.dodo.webhooks")


class Webhooks:
    """Applies deliveries, in any order and any number of times."""

    def __init__(
        self,
        redis: Redis,
        dodo: Dodo,
        ledger: Ledger,
        tenants: Tenants,
        catalogue_source: CatalogueSource,
        secret: str,
        clock: Clock = now_ms,
    ) -> None:
        self.inbox = Inbox(redis)
        self._subscriptions = Subscriptions(dodo, tenants, self.inbox, catalogue_source, clock)
        self._dodo, self._ledger, self._tenants = dodo, ledger, tenants
        self._catalogue, self._secret, self._clock = catalogue_source, secret, clock

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
        """Ask Dodo about subscriptions whose period ended without news. How many there were."""
        overdue = [t.subscription for t in tenants if t.subscription and self._clock() > t.subscription.period_end_ms]
        live = [s for s in overdue if s.is_live(self._clock())]
        for subscription in live:
            try:
                await self._subscriptions.refresh(subscription.id)
            except (NotYet, DodoRefused) as reason:
                log.warning("subscription %s: %s", subscription.id, reason)
        return len(live)

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
            await self._payment(Payment.read(data))
        elif kind == "refund.succeeded":
            await self._refund(Refund.read(data))
        elif kind.startswith("subscription."):
            await self._subscriptions.refresh(text(data, "subscription_id"), moment_ms(data, "past_due_ends_at"))
        else:
            return Outcome.KEPT
        return Outcome.APPLIED

    async def _payment(self, payment: Payment) -> None:
        """Grant what the cart buys, and take invoiced usage off the exposure."""
        if payment.status not in ("succeeded", ""):
            raise NotYet(f"payment {payment.id} is {payment.status}")
        tenant = await self._tenant(payment.customer_id)
        await self._grant(tenant, payment)
        for subscription_id in payment.subscription_ids:
            if payment.includes_usage:
                await self._repay(tenant, payment, subscription_id)
            await self._subscriptions.refresh(subscription_id)

    async def _grant(self, tenant: Tenant, payment: Payment) -> None:
        for term in await self._fixed_terms(payment):
            grant = Grant(term.source, tenant.id, term.unit, term.amount, term.expires_at_ms, term.adapters)
            await self._ledger.grant(grant)

    async def _fixed_terms(self, payment: Payment) -> tuple[Term, ...]:
        """What this payment buys, as it was when the payment was first seen."""
        known = await self.inbox.terms(payment.id)
        return await self.inbox.fix_terms(payment.id, await self._terms(payment)) if known is None else known

    async def _terms(self, payment: Payment) -> list[Term]:
        """What our configuration says the cart's packs are worth. Other products of a subscription buy nothing."""
        lines = payment.lines
        if not lines and not payment.subscription_ids:
            lines = (await self._dodo.retrieve_payment(payment.id)).lines
            if not lines:
                raise NotYet(f"payment {payment.id} names no product")
        quantities: dict[str, int] = {}
        for line in lines:
            quantities[line.product_id] = quantities.get(line.product_id, 0) + line.quantity
        names, catalogue = await self.inbox.names(), await self._catalogue()
        terms: list[Term] = []
        for product_id, quantity in sorted(quantities.items()):
            kind, _, name = names.get(product_id, "").partition(":")
            if kind == "plan":
                continue
            if kind != "pack" or catalogue is None or name not in catalogue.packs:
                raise NotYet(f"product {product_id} of payment {payment.id} is no pack of ours")
            if quantity < 1:
                raise NotYet(f"payment {payment.id} has {quantity} of {product_id}")
            pack = catalogue.packs[name]
            paid_at = payment.created_at_ms if payment.created_at_ms is not None else self._clock()
            expires = None if pack.expires_days is None else paid_at + pack.expires_days * DAY_MS
            source = f"payment:{payment.id}:{product_id}"
            terms.append(Term(source, pack.grants.unit, pack.grants.amount * quantity, expires, pack.grants.adapters))
        return terms

    async def _refund(self, refund: Refund) -> None:
        """Take back the refunded share of what the payment grants, rounded up, never more than that.

        A refund grants nothing: where its payment has not succeeded yet, the share waits to be taken from it.
        """
        payment = await self._dodo.retrieve_payment(refund.payment_id)
        tenant = await self._tenant(payment.customer_id)
        paid = payment.total_amount
        refunded = paid if refund.amount is None else min(max(refund.amount, 0), paid)
        for term in await self._fixed_terms(payment):
            share = term.amount if refunded == paid else divide_up(term.amount * refunded, paid)
            source = f"refund:{refund.id}:{term.source.rpartition(':')[2]}"
            if share:
                await self._ledger.claw_back(Clawback(source, tenant.id, term.source, share))

    async def _repay(self, tenant: Tenant, payment: Payment, subscription_id: str) -> None:
        """Lower the exposure by what this payment invoiced: the usage of the period that it closes."""
        meter_id = next((id_ for id_, name in (await self.inbox.names()).items() if name == CHARGE_METER), None)
        if meter_id is None:
            raise NotYet("no meter was made at Dodo yet")
        period = _closed_period(payment, subscription_id, await self._dodo.usage_history(subscription_id))
        if period is None:
            raise NotYet(f"the period of {subscription_id} that payment {payment.id} bills has no usage yet")
        if nanos := period.units.get(meter_id, 0):
            await self._ledger.repay_overage(f"payment:{payment.id}:{subscription_id}", tenant.id, nanos)

    async def _tenant(self, customer_id: str) -> Tenant:
        tenant = await self._tenants.by_customer(customer_id)
        if tenant is None:
            raise NotYet(f"no tenant has Dodo customer {customer_id}")
        return tenant


def _closed_period(payment: Payment, subscription_id: str, periods: Iterable[UsagePeriod]) -> UsagePeriod | None:
    """The period whose usage a payment bills: it ends where the paid one starts, or else last before the payment."""
    starts_ms = payment.service_starts_ms.get(subscription_id)
    if starts_ms is not None:
        return next((p for p in periods if abs(p.end_ms - starts_ms) <= HOUR_MS), None)
    paid_at_ms = payment.created_at_ms or 0
    return max((p for p in periods if p.end_ms <= paid_at_ms + HOUR_MS), key=lambda p: p.end_ms, default=None)


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
