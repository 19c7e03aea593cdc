"""Sends the movements of the last seconds again when the store may have lost them.

That is when the store was started again or another has taken its place. Each movement counts once by its own id, so
that sending it again is harmless where nothing was lost.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import assert_never

from billing.ledger.account import Adjustment, Clawback, Grant, Movement, Repayment, Restoration, Settlement
from billing.ledger.errors import (
    UNREADABLE,
    DuplicateRequest,
    GrantRefused,
    SourceReused,
    UnknownHold,
    UnresolvedSettlement,
)
from billing.ledger.ledger import Ledger
from billing.store.errors import StoreRefused, StoreUnavailable

PROBE_S = 0.5
WINDOW_S = 10.0
"""How much a store may lose: more than an unsynced log (2 s) or a lagging replica does."""
MOST = 50_000
"""Movements of one process, about 50 MB; if more come within a window, the oldest are not sent again."""

Verify = Callable[[], Awaitable[None]]
Identify = Callable[[], Awaitable[frozenset[str]]]
_REFUSALS = (UnresolvedSettlement, UnknownHold, DuplicateRequest, GrantRefused, SourceReused)

logger = logging.getLogger(__name__)


class Recent:
    """Movements that were acknowledged lately, oldest first."""

    def __init__(self, most: int = MOST) -> None:
        self._noted: deque[tuple[float, Movement]] = deque(maxlen=most)

    def __len__(self) -> int:
        return len(self._noted)

    def note(self, movement: Movement) -> None:
        self._noted.append((asyncio.get_running_loop().time(), movement))

    def forget_before(self, time_s: float) -> None:
        while self._noted and self._noted[0][0] < time_s:
            self._noted.popleft()

    def take(self) -> list[Movement]:
        """All of them, grants first, because settles draw on what those gave; repayments in turn with settles."""
        taken = [movement for _, movement in self._noted]
        self._noted.clear()
        return sorted(taken, key=lambda movement: isinstance(movement, Settlement | Repayment))


class Replay:
    """Watches, for one process, whether the store is still the same."""

    def __init__(
        self, ledger: Ledger, recent: Recent, identify: Identify, verify: Verify, window_s: float = WINDOW_S
    ) -> None:
        """``recent``: where the ledger notes what was acknowledged."""
        self._ledger, self._recent, self._window_s = ledger, recent, window_s
        self._identify, self._verify = identify, verify
        self._identity: frozenset[str] | None = None
        self._refusal: StoreRefused | None = None
        self.failures = 0
        """Looks at the store that an unexpected error ended."""

    async def run(self) -> None:
        """Watch until cancelled. Neither an absent store nor an unexpected error ends it."""
        while True:
            await asyncio.sleep(PROBE_S)
            try:
                if resent := await self.watch_once():
                    logger.warning("the store was started again or replaced: %d movements were sent again", resent)
            except StoreUnavailable as error:
                logger.warning("%d movements may have to be sent again: %s", len(self._recent), error)
            except Exception:
                self.failures += 1
                logger.exception("%d movements may have to be sent again", len(self._recent))

    def check(self) -> None:
        """Raises StoreUnavailable while the store was replaced by one that is not fit to keep money."""
        if self._refusal is not None:
            raise StoreUnavailable(f"the metering store was replaced, and {self._refusal}")

    async def watch_once(self) -> int:
        """Compare the store's identity. What was acknowledged long before it was last the same is safe and forgotten.

        Returns:
            How many movements were sent again.

        Raises:
            StoreUnavailable: nothing is forgotten until it is back.
        """
        started = asyncio.get_running_loop().time()
        identity = await self._identify()
        is_another = self._identity not in (None, identity)
        resent = await self._send_again() if is_another else 0
        if is_another or self._refusal is not None:
            await self._judge()
        self._identity = identity
        self._recent.forget_before(started - self._window_s)
        return resent

    async def _judge(self) -> None:
        """What is required of a store at the start is required of every one that takes its place."""
        try:
            await self._verify()
            self._refusal = None
        except StoreRefused as refusal:
            logger.critical("new requests are refused: %s", refusal)
            self._refusal = refusal

    async def _send_again(self) -> int:
        waiting = deque(self._recent.take())
        resent = 0
        try:
            while waiting:
                await self._send(waiting[0])
                waiting.popleft()
                resent += 1
        finally:
            for movement in waiting:
                self._recent.note(movement)
        return resent

    async def _send(self, movement: Movement) -> None:
        """The ledger notes it again: this store, too, may be lost."""
        try:
            match movement:
                case Settlement():
                    await self._ledger.settle(movement)
                case Grant():
                    await self._ledger.grant(movement)
                case Clawback():
                    await self._ledger.claw_back(movement)
                case Adjustment():
                    await self._ledger.adjust(movement)
                case Restoration():
                    await self._ledger.restore(movement.clawback)
                case Repayment():
                    await self._ledger.repay_overage(movement.source, movement.tenant, movement.nanos)
                case _:
                    assert_never(movement)
        except _REFUSALS as refusal:
            logger.warning("a movement that was acknowledged before is refused now: %s", refusal)
        except UNREADABLE as error:  # it keeps no other movement from being sent again
            message = "a movement of %s cannot be sent again, since what the store has cannot be read: %s: %s: %s"
            logger.critical(message, movement.tenant, type(error).__name__, error, movement)
