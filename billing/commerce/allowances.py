"""The allowances that a plan's fees buy, one in each period of a subscription, and what takes them back.

A change of plan may end a period early. Which product's fee paid each period is therefore kept, and a payment that is
heard of later still buys what its own period was sold with.
"""

from typing import cast

from redis.asyncio import Redis

from billing.catalog.terms import Terms
from billing.commerce.inbox import PurchasedCredit
from billing.dodo.wire import DodoSubscription
from billing.ledger.account import Bucket, Clawback
from billing.ledger.admission import allowance_period
from billing.money import divide_up
from billing.store.connection import guarded
from billing.store.guard import BULK_DEADLINE_S
from billing.store.keys import subscription_periods
from billing.store.write import write
from billing.usage import BucketId, TenantId

SAME_PERIOD_MS = 60_000
"""How far Dodo may date the beginning of a period apart in its payment and in its subscription."""


class Periods:
    """The periods of subscriptions that were in force here."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def keep(self, subscription_id: str, starts_ms: int, product_id: str) -> None:
        """This product's fee pays the period that starts then."""
        async with guarded(BULK_DEADLINE_S):
            await write(self._redis, ("HSET", subscription_periods(subscription_id), starts_ms, product_id))

    async def paid(
        self, subscription_id: str, starts_ms: int, of_now: DodoSubscription | None = None
    ) -> tuple[int, str]:
        """The period that a payment pays for, which Dodo may date a little apart: its beginning and its product.

        Args:
            of_now: the subscription, whose period may not be kept yet.

        Returns:
            ``starts_ms`` and an empty text for a period that was never in force here.
        """
        async with guarded(BULK_DEADLINE_S):
            kept = cast(dict[str, str], await self._redis.hgetall(subscription_periods(subscription_id)))
        known = {} if of_now is None else {of_now.period_start_ms: of_now.product_id}
        known |= {int(begins): product_id for begins, product_id in kept.items()}
        near = [begins for begins in known if abs(begins - starts_ms) <= SAME_PERIOD_MS]
        begins = min(near, key=lambda one: abs(one - starts_ms), default=starts_ms)
        return begins, known.get(begins, "")


def allowance_of(sold: Terms, subscription_id: str, starts_ms: int, ends_ms: int) -> PurchasedCredit | None:
    """The allowance that these terms bring in one period of a subscription; ``None`` where they bring none."""
    if sold.grants is None:
        return None
    source = f"{allowance_period(subscription_id, starts_ms)}:{sold.plain_name}"
    quota = (sold.grants.unit, sold.grants.amount, ends_ms, sold.grants.adapters)
    return PurchasedCredit(source, *quota, price=sold.price, is_allowance=True)


def worth_of(amount: int, old: PurchasedCredit, new: PurchasedCredit) -> int:
    """As many units of ``new`` as are worth so many of ``old``: the same number where the units are the same."""
    if old.unit is new.unit and old.adapters == new.adapters:
        return amount
    if not old.price or not new.price:
        return divide_up(amount * new.amount, old.amount)
    return divide_up(amount * old.price * new.amount, old.amount * new.price)


def clawback_of(source: str, tenant: TenantId, credit: PurchasedCredit, amount: int) -> Clawback:
    """Take so many units of a pack or an allowance back."""
    if not credit.is_allowance:
        return Clawback(source, tenant, credit.source, amount)
    whole = (credit.unit, credit.amount, credit.amount, credit.expires_at_ms, credit.adapters)
    allowance = Bucket(BucketId(credit.source), *whole, is_allowance=True, price=credit.price)
    former = BucketId(credit.source.rpartition(":")[0])  # without the plan's name
    return Clawback(source, tenant, credit.source, amount, allowance, former)
