"""Load Dodo's side of the books in as few calls as possible: events since the watermark, meters of subscriptions."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from billing.dodo.call_budget import Budget
from billing.dodo.client import PAGE, Dodo
from billing.dodo.errors import DodoUnavailable
from billing.dodo.wire import DodoEvent, UsagePeriod
from billing.export.events import CHARGE, USAGE
from billing.reconcile.dodo_proofs import by_customer

SETTLED_MS = 65 * 60_000
"""Dodo takes no event dated more than an hour back: what is older than this does not change any more."""
MAX_PAGES = 100_000
BUDGET_WAIT_S = 0.25


@dataclass
class DodoLedger:
    """Events of all customers. Pages are counted here, each one call of the budget: the SDK's iteration skips one."""

    dodo: Dodo
    budget: Budget
    _events: dict[str, DodoEvent] = field(default_factory=dict)

    async def load(self, since_ms: int) -> None:
        """Add everything dated since then. A page that moves meanwhile shows an event twice, never not at all.

        Raises:
            DodoUnavailable, DodoRefused: Dodo could not say.
        """
        for name in (CHARGE, USAGE):
            for page in range(MAX_PAGES):
                await self._spend()
                events = await self.dodo.events_since(name, since_ms, page)
                self._events |= {event.id: event for event in events}
                if len(events) < PAGE:
                    break
            else:
                raise DodoUnavailable(f"Dodo has more than {MAX_PAGES * PAGE} events: reconcile more often")

    def by_customer(self) -> dict[str, list[DodoEvent]]:
        return by_customer(self._events.values())

    async def periods(self, subscription_id: str) -> Sequence[UsagePeriod]:
        """Billing periods of a subscription, the newest first, with what each meter counted.

        Raises:
            DodoUnavailable, DodoRefused: Dodo could not say.
        """
        await self._spend()
        return await self.dodo.usage_history(subscription_id)

    async def _spend(self) -> None:
        while True:
            if await self.budget.take():
                return
            await asyncio.sleep(BUDGET_WAIT_S)
