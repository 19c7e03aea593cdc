"""Settling what has ended: at once, else on this machine's disk until the store is back.

Knows ledger, spool and the tasks that no connection's death may cancel; decides no amount.
"""

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from billing.errors import BillingError
from billing.ledger.account import Receipt, Settlement
from billing.ledger.errors import UnresolvedSettlement
from billing.ledger.ledger import Ledger
from billing.ledger.spool import Spool, SpoolFull
from billing.money import Nanos
from billing.store.errors import StoreUnavailable
from billing.usage import NOTHING, Status
from deployments.gateway.metrics import GatewayMetrics

SETTLE_PAUSES_S = (0.05, 0.25, 1.0)
"""Waits between attempts to settle before the settlement goes to the spool."""
SPOOL_INTERVAL_S = 1.0

logger = logging.getLogger(__name__)
T = TypeVar("T")


class MeteringUnavailable(StoreUnavailable):
    """The store is away: a record waits on this gateway's disk, or a hold could not grow."""


class Settler:
    """Ends holds, each in a task of its own."""

    def __init__(self, ledger: Ledger, spool: Spool, metrics: GatewayMetrics) -> None:
        self._ledger, self._spool, self._metrics = ledger, spool, metrics
        self.tasks: set[asyncio.Task[object]] = set()

    def keep(self, work: Coroutine[None, None, T]) -> asyncio.Task[T]:
        """Run something that the death of a connection must not cancel, and that a shutdown awaits."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._drop)
        return task

    async def settle(self, model: str, settlement: Settlement, free_if_away: bool, is_kept: bool) -> Receipt:
        """The receipt, once the record is on disk.

        Raises:
            MeteringUnavailable: the store is away. The settlement is spooled, as free where ``free_if_away``; what
                an attempt without a reply charged is then given back, unless the answer ``is_kept`` for a repeat.
        """
        try:
            receipt = await self._settle(settlement)
        except UnresolvedSettlement as error:
            if free_if_away:
                with suppress(BillingError):  # then a person may still drop it
                    await self._ledger.recovery.drop(settlement.request_id)
            raise MeteringUnavailable(str(error)) from error
        except StoreUnavailable as error:
            if free_if_away:
                nothing = replace(settlement, usage=NOTHING, list_nanos=Nanos(0), status=Status.FAILED)
                settlement = replace(nothing, is_undelivered=not is_kept)
            await self._spool_away(settlement)
            raise MeteringUnavailable("the record of this request waits for the metering store") from error
        self._metrics.settled(model, receipt.record)
        return receipt

    async def wait(self, timeout_s: float) -> None:
        """Wait for everything that was kept."""
        if self.tasks:
            await asyncio.wait(set(self.tasks), timeout=timeout_s)

    async def replay_for_ever(self) -> None:
        """Also with nothing of our own: a gateway that ended may have left its settles here."""
        while True:
            await asyncio.sleep(SPOOL_INTERVAL_S)
            try:
                self._metrics.spool(self.spooled, await self.refused())
                await self._spool.replay(self._ledger)
            except StoreUnavailable:
                logger.warning("the store is away: %d settles wait on disk", self._spool.pending)
            except Exception:
                logger.exception("%d settles wait on disk", self._spool.pending)

    async def refused(self) -> int:
        """Settles of this machine's spool that the ledger refused."""
        return await asyncio.to_thread(lambda: self._spool.refused)

    @property
    def spooled(self) -> int:
        """Settles on this gateway's disk that wait for the store."""
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

    async def _spool_away(self, settlement: Settlement) -> None:
        """Where even the disk refuses, the lease's last checkpoint will be billed."""
        try:
            await asyncio.to_thread(self._spool.append, settlement)
            self._metrics.spooled()
        except (SpoolFull, OSError) as error:
            logger.critical("request %s is settled by its last checkpoint: %s", settlement.request_id, error)

    def _drop(self, task: asyncio.Task[object]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.debug("kept task ended: %s", error)
