"""Renews the leases of one gateway's holds and writes checkpoints of how far each request has come.

The running requests' progress is in memory only: if this process dies, the last checkpoint is billed.
"""

import asyncio
import logging
from collections.abc import Callable

from billing.ledger.account import Progress
from billing.ledger.ledger import Ledger
from billing.store.errors import StoreUnavailable
from billing.usage import RequestId

CHECKPOINT_S = 2.0
EXPIRE_S = 5.0
EXPIRE_BATCH = 100

logger = logging.getLogger(__name__)


class Leases:
    """The open requests of one gateway."""

    def __init__(
        self,
        ledger: Ledger,
        on_lost: Callable[[frozenset[RequestId]], None],
        checkpoint_s: float = CHECKPOINT_S,
        expire_s: float = EXPIRE_S,
    ) -> None:
        """``on_lost`` gets ids whose hold ended elsewhere: what they generate from then on is not paid for."""
        self._ledger, self._on_lost = ledger, on_lost
        self._checkpoint_s, self._expire_s = checkpoint_s, expire_s
        self._open: dict[RequestId, Progress] = {}
        self.failures = 0
        """Rounds of renewal or expiry that an unexpected error ended."""

    def __len__(self) -> int:
        return len(self._open)

    def update(self, progress: Progress) -> None:
        """Note how far a request has come; the first note begins the renewal of its lease."""
        self._open[progress.request_id] = progress

    def drop(self, request_id: RequestId) -> None:
        """Renew no more: the request was settled, or will be from the spool."""
        self._open.pop(request_id, None)

    async def run(self) -> None:
        """Renew, and bill what other gateways left behind, until cancelled. Outlives an absent store and our bugs."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._renew_for_ever())
            tasks.create_task(self._expire_for_ever())

    async def renew_once(self) -> frozenset[RequestId]:
        """Send one checkpoint of everything open.

        Returns:
            The ids that were lost, after ``on_lost`` was called with them.

        Raises:
            StoreUnavailable: leases run on from their last renewal.
        """
        if not self._open:
            return frozenset()
        gone = await self._ledger.checkpoint(list(self._open.values()))
        lost = gone & self._open.keys()  # what was settled while the checkpoint travelled is not lost
        for request_id in lost:
            self.drop(request_id)
        if lost:
            self._on_lost(lost)
        return lost

    async def _renew_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._checkpoint_s)
            try:
                await self.renew_once()
            except StoreUnavailable as error:
                logger.warning("%d leases were not renewed: %s", len(self._open), error)
            except Exception:
                self.failures += 1
                logger.exception("%d leases were not renewed", len(self._open))

    async def _expire_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._expire_s)
            try:
                if expired := await self._ledger.expire(EXPIRE_BATCH):
                    logger.warning("%d requests were billed by their last checkpoint: their gateway is gone", expired)
            except StoreUnavailable as error:
                logger.warning("expired holds wait: %s", error)
            except Exception:
                self.failures += 1
                logger.exception("expired holds wait")
