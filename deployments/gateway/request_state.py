"""One admitted request, from its hold to its receipt.

::

    held ──▶ waiting ──first delta──▶ generating ──last delta──▶ generated
                │                         │                          │
                │ cancel(), stop() or     │                          │ settle()
                │ an error                │                          │
                └────────────┬────────────┴──────────────────────────┘
                             ▼
                          settling ──▶ settled, or spooled on disk

The first ending counts, and there is one place that settles: ``RequestState._settle``. It runs in a task of its own,
which the end of the connection cannot cancel.

=========  ============================================  ================  ================================
ending     cause                                         record's status   billed
=========  ============================================  ================  ================================
COMPLETED  ``settle()``: all output was generated        ``complete``      what was generated
CANCELLED  the client disconnected                       ``cancelled``     what was generated until then
STOPPED    shutdown, timeout, slow reader, lost hold     ``failed``        what was delivered
FAILED     the engine, the replica, the store or a bug   ``failed``        what was delivered
=========  ============================================  ================  ================================

A stream delivers each delta as it comes. An answer that is sent whole is delivered by the reply after ``settle()``, so
one that is stopped or fails is free.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from enum import Enum

from billing.catalog.catalog import Model
from billing.errors import BillingError
from billing.ledger.account import Hold, Progress, Receipt, Settlement
from billing.ledger.codec import snapshot_of
from billing.ledger.extension import GrowingHold
from billing.ledger.leases import Leases
from billing.money import Nanos
from billing.usage import NOTHING, RequestId, Status, Usage
from deployments.gateway.errors import AnswerTimeout, HoldLost
from deployments.gateway.metered_output import MeteredOutput
from deployments.gateway.parts import GatewayParts
from deployments.inference.request import Choice, EngineError, FinishReason, GenerateRequest, OutputDelta
from deployments.token_stream.errors import ReplicaLost

STOPPED = "this gateway stopped the request: send it again"


class Ending(Enum):
    """Why a request ended; see the module's table."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def status(self) -> Status:
        """Of the usage record."""
        return {Ending.COMPLETED: Status.COMPLETE, Ending.CANCELLED: Status.CANCELLED}.get(self, Status.FAILED)

    @property
    def bills_generated(self) -> bool:
        """Whether all that was generated is billed, or only what was delivered."""
        return self in (Ending.COMPLETED, Ending.CANCELLED)


class RequestState:
    """One admitted request. However it ends, it is settled once."""

    def __init__(
        self,
        parts: GatewayParts,
        leases: Leases,
        model: Model,
        hold: Hold,
        request: GenerateRequest,
        on_settled: Callable[["RequestState"], None],
    ) -> None:
        self.model, self.hold, self.request = model, hold, request
        self.ending: Ending | None = None
        self.is_repeatable = False
        """A repeat with the same idempotency key gets this answer."""
        self._parts, self._leases, self._on_settled = parts, leases, on_settled
        credit = GrowingHold(parts.ledger, hold, parts.settler.keep)
        self._output = MeteredOutput(request, hold, credit, parts.link.generate(request))
        self._first: OutputDelta | None = None
        self._delivered = NOTHING
        self._stop_reason: EngineError = ReplicaLost(STOPPED)
        self._settling: asyncio.Task[Receipt] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def request_id(self) -> RequestId:
        return self.hold.request.request_id

    @property
    def finish_reason(self) -> FinishReason | None:
        return self._output.finish_reason

    @property
    def truncation_reason(self) -> BillingError | None:
        """Why the answer is shorter than asked for, where credit is the reason."""
        return self._output.truncation_reason

    @property
    def progress(self) -> Progress:
        """What is billed if this gateway dies now: what was delivered."""
        cost, held_nanos = self._price(self._delivered), self._output.held_nanos
        return Progress(self.request_id, self.hold.request.tenant, self._delivered, cost, held_nanos)

    # Reading the output. Where the next delta cannot be had, the request ends and the cause is raised.

    async def begin(self, timeout_s: float) -> None:
        """Wait for the first delta, so that a refusal can still be answered with its status, and is free.

        ``timeout_s`` bounds the whole answer. It is below the limit of a server in front, which would look like a
        client that disconnected, and be billed.
        """
        self._leases.update(self.progress)
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self._time_out, timeout_s)
        started = time.monotonic()
        self._first = await self._next()
        self._parts.metrics.first_token(time.monotonic() - started)

    async def deltas(self) -> AsyncGenerator[OutputDelta, None]:
        """The output as it comes; what was yielded counts as delivered."""
        if self.ending is not None:
            raise self._stop_reason
        delta = self._first
        while delta is not None:
            self._delivered = self._output.usage
            self._leases.update(self.progress)
            yield delta
            delta = await self._next() if self.finish_reason is None else None

    async def collect(self) -> list[Choice]:
        """The whole output, none of which counts as delivered before ``settle``."""
        choices = list(self._first.choices) if self._first else []
        while self.finish_reason is None:
            choices += (await self._next()).choices
        return choices

    async def _next(self) -> OutputDelta:
        try:
            return await self._output.next()
        except asyncio.CancelledError:
            self.cancel()
            raise
        except Exception as error:
            self.end_with(error)
            await self.settled()
            raise

    # Ending it. Every method but ``settle`` and ``settled`` returns at once.

    async def settle(self, is_delivered: bool = True) -> Receipt:
        """The receipt, once the record is on disk. ``is_delivered``: the client has the output already.

        Raises:
            MeteringUnavailable: the store is away; the settlement waits on disk, as free where it was not delivered.
            EngineError: the request had ended in another way, or its hold had: what was not delivered is free.
        """
        receipt = await asyncio.shield(self._end(Ending.COMPLETED, is_delivered))
        if not is_delivered and receipt.record.status is not Status.COMPLETE:
            raise self._stop_reason
        return receipt

    async def settled(self) -> None:
        """Wait until an ending that has begun has reached the store or the disk."""
        if self._settling is not None:
            await asyncio.wait([self._settling])

    def cancel(self) -> None:
        """The client disconnected."""
        self._end(Ending.CANCELLED)

    def stop(self, reason: EngineError | None = None) -> None:
        """This gateway ends the request; whoever reads its output gets ``reason``."""
        if self.ending is None:
            self._stop_reason = reason or self._stop_reason
            self._end(Ending.STOPPED)

    def end_with(self, error: BaseException) -> None:
        """End the request for an error: its client's cancellation, or a failure of ours."""
        self._end(Ending.CANCELLED if isinstance(error, asyncio.CancelledError) else Ending.FAILED)

    def lose_hold(self) -> None:
        """The store has ended the hold: no more output would be paid for."""
        if self.finish_reason is None:
            self.stop(HoldLost("the hold of this request ended while it ran: retry"))

    def _time_out(self, timeout_s: float) -> None:
        if self.finish_reason is None:
            self.stop(AnswerTimeout(f"the answer took longer than {timeout_s:g} s: ask for fewer tokens"))

    def _end(self, ending: Ending, is_delivered: bool = True) -> asyncio.Task[Receipt]:
        """Begin to settle, unless the request has ended before."""
        if self._settling is None:
            self.ending = ending
            self._output.stop(self._stop_reason)
            usage = self._output.usage if ending.bills_generated else self._delivered
            self._settling = self._parts.settler.keep(self._settle(ending, usage, is_delivered))
        return self._settling

    async def _settle(self, ending: Ending, usage: Usage, is_delivered: bool) -> Receipt:
        """Stop the engine, charge the usage, and let go of the hold."""
        settlement = Settlement(
            self.request_id,
            self.hold.request.tenant,
            usage,
            self._price(usage),
            ending.status,
            snapshot_of(self.hold, self._output.held_nanos),
        )
        if self._timer is not None:
            self._timer.cancel()
        try:
            try:
                await self._output.close()
            finally:
                receipt = await self._parts.settler.settle(
                    self.model.id, settlement, free_if_away=not is_delivered, is_repeatable=self.is_repeatable
                )
        finally:
            self._leases.drop(self.request_id)
            self._on_settled(self)
        return receipt

    def _price(self, usage: Usage) -> Nanos:
        return self.hold.request.price.charge(usage)
