"""Settles holds in the ledger, and keeps settlements on this machine's disk while the store is away."""

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from billing.errors import BillingError
from billing.ledger.account import Receipt, Settlement
from billing.ledger.errors import UNREADABLE, UnresolvedSettlement
from billing.ledger.ledger import Ledger
from billing.ledger.spool import Spool, SpoolFull
from billing.money import Nanos
from billing.store.errors import StoreUnavailable
from billing.usage import NOTHING, Status
from deployments.gateway.errors import MeteringUnavailable
from deployments.gateway.metrics import GatewayMetrics

SETTLE_PAUSES_S = (0.05, 0.25, 1.0)
"""Waits between attempts to settle, before the settlement is spooled."""
SPOOL_INTERVAL_S = 1.0

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Settler:
    """Settles holds, each in a task of its own, and replays the spool."""

    def __init__(self, ledger: Ledger, spool: Spool, metrics: GatewayMetrics) -> None:
        self._ledger, self._spool, self._metrics = ledger, spool, metrics
        self.tasks: set[asyncio.Task[object]] = set()

    def keep(self, work: Coroutine[None, None, T]) -> asyncio.Task[T]:
        """Run something that the end of a connection must not cancel, and that a shutdown waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._drop)
        return task

    async def settle(self, model: str, settlement: Settlement, free_if_away: bool, is_repeatable: bool) -> Receipt:
        """The receipt, once the record is on disk.

        Raises:
            MeteringUnavailable: the store is away, and the settlement is spooled. With ``free_if_away`` it is spooled
                as free, and what an attempt without a reply may have charged is given back, unless the answer
                ``is_repeatable``: then a repeat with its idempotency key gets what was charged.
        """
        try:
            receipt = await self._settle(settlement)
        except UnresolvedSettlement as error:
            if free_if_away:
                with suppress(BillingError):  # it stays unresolved, and a person can still drop it
                    await self._ledger.recovery.drop(settlement.request_id)
            raise MeteringUnavailable(str(error)) from error
        except (StoreUnavailable, *UNREADABLE) as error:  # of neither is known whether it was charged
            if not isinstance(error, StoreUnavailable):
                logger.exception("request %s is settled later", settlement.request_id)
            if free_if_away:
                free = replace(settlement, usage=NOTHING, list_nanos=Nanos(0), status=Status.FAILED)
                settlement = replace(free, is_undelivered=not is_repeatable)
            await self._put_into_spool(settlement)
            raise MeteringUnavailable("the record of this request waits for the metering store") from error
        self._metrics.settled(model, receipt.record)
        return receipt

    async def wait(self, timeout_s: float) -> None:
        """Wait for everything that was started with ``keep``."""
        if self.tasks:
            await asyncio.wait(set(self.tasks), timeout=timeout_s)

    async def replay_forever(self) -> None:
        """Replay the spool: also what a gateway that ended on this machine left in it."""
        while True:
            await asyncio.sleep(SPOOL_INTERVAL_S)
            try:
                self._metrics.spool(self.spooled, await self.refused(), await self.unreadable())
                await self._spool.replay(self._ledger)
            except StoreUnavailable:
                logger.warning("the store is away: %d settlements wait on disk", self._spool.pending)
            except Exception:
                logger.exception("%d settlements wait on disk", self._spool.pending)

    async def refused(self) -> int:
        """Settlements of this machine's spool that the ledger refused."""
        return await asyncio.to_thread(lambda: self._spool.refused)

    async def unreadable(self) -> int:
        """Lines of this machine's spool that cannot be read."""
        return await asyncio.to_thread(lambda: self._spool.unreadable)

    @property
    def spooled(self) -> int:
        """Settlements on this gateway's disk that wait for the store."""
        return self._spool.pending

    def close(self) -> None:
        self._spool.close()

    async def _settle(self, settlement: Settlement) -> Receipt:
        for pause in SETTLE_PAUSES_S:
            try:
                return await self._ledger.settle(settlement)
            except StoreUnavailable:
                await asyncio.sleep(pause)
        return await self._ledger.settle(settlement)

    async def _put_into_spool(self, settlement: Settlement) -> None:
        """Where the disk refuses it too, the hold expires and its last checkpoint is billed."""
        try:
            await asyncio.to_thread(self._spool.append, settlement)
            self._metrics.spooled()
        except (SpoolFull, OSError) as error:
            logger.critical("request %s is settled by its last checkpoint: %s", settlement.request_id, error)

    def _drop(self, task: asyncio.Task[object]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.debug("a kept task failed: %s", error)
