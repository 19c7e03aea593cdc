"""One admitted request, from its hold to its receipt: every way in which it can end, and that it ends once.

Knows what is billed for each ending; how it is stored is the gateway's business.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace

from billing.catalog.catalog import Model
from billing.errors import BillingError
from billing.ledger.account import Hold, Progress, Receipt, Settlement
from billing.ledger.codec import max_cost, snapshot_of
from billing.ledger.errors import InsufficientCredits, UnknownHold
from billing.ledger.extension import GrowingHold
from billing.ledger.leases import Leases
from billing.ledger.ledger import Ledger
from billing.money import Nanos
from billing.store.errors import StoreUnavailable
from billing.usage import NOTHING, RequestId, Status, Usage
from deployments.gateway.metrics import GatewayMetrics
from deployments.gateway.settlement import MeteringUnavailable, Settler
from deployments.inference.request import (
    AdapterRejected,
    Choice,
    EngineError,
    EngineFailed,
    FinishReason,
    GenerateRequest,
    Tokens,
)
from deployments.token_stream.link import ReplicaLink, ReplicaLost

STOPPED = "this gateway ended the request: send it again"
OUR_FAILURES = (EngineError, StoreUnavailable)


class AnswerTimeout(EngineError):
    """The answer took longer than this gateway allows: an answer is free, a stream pays for what it delivered."""


class LeaseLost(EngineFailed):
    """The store ended this request's hold while it ran: what was reported until then is billed."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the runs of one gateway share."""

    link: ReplicaLink
    ledger: Ledger
    leases: Leases
    settler: Settler
    metrics: GatewayMetrics
    on_end: Callable[["Run"], None]


class Run:
    """One admitted request, from its hold to its receipt. It is settled once, however it ends."""

    def __init__(self, around: Surroundings, model: Model, hold: Hold, job: GenerateRequest) -> None:
        self.model, self.hold, self.job = model, hold, job
        self.usage = Usage(prompt_tokens=len(job.prompt_token_ids))
        self.finish_reason: FinishReason | None = None
        self.shortage: BillingError | None = None
        """Why the output is shorter than what was asked for, where credit is the reason."""
        self.is_kept = False
        """A repeat under its idempotency key gets the answer where it was charged."""
        self._around = around
        self._credit = GrowingHold(around.ledger, hold, around.settler.keep)
        self._pieces = around.link.generate(job)
        self._first: Tokens | None = None
        self._ending: asyncio.Task[Receipt] | None = None
        self._open = set(range(job.sampling.n))
        """Answers that have not ended."""
        self._is_lost = False
        self._delivered = NOTHING
        self._reader: asyncio.Task[object] | None = None
        self._is_reader_cut = False
        self._cut_by: EngineError = ReplicaLost(STOPPED)
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def request_id(self) -> RequestId:
        return self.hold.request.request_id

    def end_within(self, seconds: float) -> None:
        """Cut a longer answer before a server in front does: that would look like a client that left, and be billed."""
        too_long = AnswerTimeout(f"the answer took longer than {seconds:g} s: ask for fewer tokens")
        self._deadline = asyncio.get_running_loop().call_later(seconds, self.cut, too_long)

    async def begin(self) -> None:
        """Wait for the first piece, so that a refusal is still an honest status; then nothing is charged."""
        started = time.monotonic()
        try:
            self._first = await self._next()
        except OUR_FAILURES:
            await self._end(Status.FAILED, NOTHING)
            raise
        except asyncio.CancelledError:
            self.leave()
            raise
        finally:
            if self._first is None:
                self._fail()
        self._around.metrics.first_token(time.monotonic() - started)

    async def pieces(self) -> AsyncGenerator[Tokens, None]:
        """The output as it comes. On an error what was yielded until then is billed, then it is raised."""
        piece = self._first
        try:
            while piece is not None:
                self._delivered = self.usage
                self._around.leases.update(self.progress)
                yield piece
                if self.finish_reason is not None:
                    return
                try:
                    piece = await self._next()
                except OUR_FAILURES:
                    await self._end(Status.FAILED, self._delivered)
                    raise
        finally:
            if self.finish_reason is None:
                self.leave()

    async def collect(self) -> list[Choice]:
        """Everything, which ``settle`` then charges; free when we fail on the way."""
        news = list(self._first.choices) if self._first else []
        try:
            while self.finish_reason is None:
                news += (await self._next()).choices
        except OUR_FAILURES:
            await self._end(Status.FAILED, NOTHING)
            raise
        except asyncio.CancelledError:
            self.leave()
            raise
        finally:
            if self.finish_reason is None:
                self._fail()
        return news

    async def settle(self, is_delivered: bool = True) -> Receipt:
        """The receipt, once the record is on disk. ``is_delivered``: the client has the tokens already.

        Raises:
            MeteringUnavailable: the store is away; the settlement is spooled on disk. What was not
                delivered is spooled as free.
            EngineError: it was cut, or its hold had ended, before this: what was not delivered was not charged.
        """
        receipt = await self._end(Status.COMPLETE, self.usage, free_if_away=not is_delivered)
        if not is_delivered and receipt.record.status is not Status.COMPLETE:
            raise self._cut_by
        return receipt

    async def over(self) -> None:
        """Wait until an ending that has begun has reached the store or the spool."""
        if self._ending is not None:
            await asyncio.wait([self._ending])

    def leave(self) -> None:
        """The client is gone: stop the engine and bill what it made until now. Returns at once."""
        self._start_ending(Status.CANCELLED, self.usage)

    def cut(self, reason: EngineError | None = None) -> None:
        """We stop it ourselves: an answer is free, a stream is billed for what was yielded. Returns at once."""
        self._cut_by = reason or self._cut_by
        self._start_ending(Status.FAILED, self._delivered)

    def _fail(self) -> None:
        """Whatever else went wrong is a bug of ours: free. Does nothing where an ending has begun."""
        self._start_ending(Status.FAILED, NOTHING)

    def lose(self) -> None:
        """The hold is no longer ours: the next piece is the last."""
        self._is_lost = True

    @property
    def progress(self) -> Progress:
        """What is billed if this gateway dies now: what was yielded to a stream, nothing of an answer on its way."""
        cost, held_nanos = self._price(self._delivered), self._credit.held_nanos
        return Progress(self.request_id, self.hold.request.tenant, self._delivered, cost, held_nanos)

    def _price(self, usage: Usage) -> Nanos:
        return self.hold.request.price.charge(usage)

    async def _next(self) -> Tokens:
        """The next piece that is paid for, with its choices; the last of a request that cannot pay more is empty."""
        piece = await self._read()
        if self._is_lost:
            raise LeaseLost("the hold of this request ended while it ran: retry")
        _refuse_broken(piece)
        usage = replace(
            self.usage,
            prompt_tokens=piece.prompt_tokens,
            cached_tokens=piece.cached_tokens,
            completion_tokens=piece.completion_tokens,
            compute_ms=piece.compute_ms,
        )
        cost = self._price(usage)
        if self._credit.pays(cost) or await self._credit.grow(cost):
            self.usage = usage
        else:
            piece = self._unpaid(piece)
        if self._ending is not None:
            raise self._cut_by
        self.finish_reason = piece.finish_reason
        if self.shortage is None and any(choice.finish_reason is FinishReason.LENGTH for choice in piece.news):
            self.shortage = self._clamped()
        if self.finish_reason is not None and self._deadline is not None:
            self._deadline.cancel()
        return replace(piece, choices=self._news(piece))

    def _news(self, piece: Tokens) -> tuple[Choice, ...]:
        """What is new of each answer; where the request ends, those that are still open do."""
        news = [choice for choice in piece.news if choice.index in self._open]
        self._open -= {choice.index for choice in news if choice.finish_reason is not None}
        if piece.finish_reason is not None:
            news += [Choice(index, "", finish_reason=piece.finish_reason) for index in sorted(self._open)]
            self._open.clear()
        return tuple(news)

    def _unpaid(self, piece: Tokens) -> Tokens:
        """The end in place of a piece beyond the hold."""
        refusal = self._credit.refusal
        if isinstance(refusal, StoreUnavailable):
            raise MeteringUnavailable("the metering store is away: this answer ends with the credit it held")
        if isinstance(refusal, UnknownHold):
            raise LeaseLost("the hold of this request ended while it ran: retry")
        self.shortage = refusal
        return replace(piece, token_ids=(), text="", choices=(), finish_reason=FinishReason.LENGTH)

    def _clamped(self) -> BillingError | None:
        """The shortage of a request with an answer that came to the end of what its key or tenant's credit affords."""
        hold = self.hold
        if hold.max_tokens == hold.request.max_tokens:
            return None
        if hold.clamped_by is not None:
            return hold.clamped_by
        return InsufficientCredits(hold.balance_nanos, max_cost(hold.request), hold.max_tokens)

    async def _read(self) -> Tokens:
        if self._ending is not None:
            raise self._cut_by
        self._reader = asyncio.current_task()
        try:
            return await anext(self._pieces)
        except StopAsyncIteration:
            raise EngineFailed("the replica ended without saying why") from None
        except asyncio.CancelledError:
            if self._is_reader_cut and self._reader is not None and self._reader.uncancel() == 0:
                raise self._cut_by from None
            raise
        finally:
            self._reader = None

    def _start_ending(self, status: Status, usage: Usage, free_if_away: bool = False) -> asyncio.Task[Receipt]:
        if self._ending is None:
            self._ending = self._around.settler.keep(self._close(status, usage, free_if_away))
        return self._ending

    async def _end(self, status: Status, usage: Usage, free_if_away: bool = False) -> Receipt:
        return await asyncio.shield(self._start_ending(status, usage, free_if_away))

    async def _close(self, status: Status, usage: Usage, free_if_away: bool) -> Receipt:
        if self._deadline is not None:
            self._deadline.cancel()
        snapshot = snapshot_of(self.hold, self._credit.held_nanos)
        settlement = Settlement(self.request_id, self.hold.request.tenant, usage, self._price(usage), status, snapshot)
        try:
            await self._stop_engine()
        finally:
            receipt = await self._settle(settlement, free_if_away)
        return receipt

    async def _settle(self, settlement: Settlement, free_if_away: bool) -> Receipt:
        try:
            return await self._around.settler.settle(self.model.id, settlement, free_if_away, self.is_kept)
        finally:
            self._around.on_end(self)

    async def _stop_engine(self) -> None:
        """A generator that another task waits in cannot be closed: cancelling its wait ends it."""
        if self._reader is None:
            await self._pieces.aclose()
        else:
            self._is_reader_cut = True
            self._reader.cancel()


def _refuse_broken(piece: Tokens) -> None:
    """Raise what the engine says of a piece that is no output."""
    if piece.is_adapter_refused:
        raise AdapterRejected(piece.error)
    if piece.finish_reason is FinishReason.ERROR:
        raise EngineFailed(piece.error or "the engine failed on this request")
    if piece.finish_reason is FinishReason.ABORT:
        raise EngineFailed("the engine stopped this request: its deadline passed")
