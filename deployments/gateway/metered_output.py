"""The output of one request as far as its hold pays for it."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

from billing.errors import BillingError
from billing.ledger.account import Hold
from billing.ledger.codec import max_cost
from billing.ledger.errors import InsufficientCredits, UnknownHold
from billing.ledger.extension import GrowingHold
from billing.money import Nanos
from billing.store.errors import StoreUnavailable
from billing.usage import Usage
from deployments.gateway.errors import HoldLost, MeteringUnavailable
from deployments.inference.request import (
    AdapterRejected,
    Choice,
    EngineError,
    EngineFailed,
    FinishReason,
    GenerateRequest,
    OutputDelta,
)


class MeteredOutput:
    """Reads the deltas of one request, counts its usage, and extends its hold before the usage exceeds it."""

    def __init__(
        self, request: GenerateRequest, hold: Hold, credit: GrowingHold, deltas: AsyncGenerator[OutputDelta]
    ) -> None:
        self.usage = Usage(prompt_tokens=len(request.prompt_token_ids))
        """What was generated and is paid for."""
        self.finish_reason: FinishReason | None = None
        self.truncation_reason: BillingError | None = None
        """Why the output is shorter than asked for, where credit is the reason."""
        self._hold, self._credit, self._deltas = hold, credit, deltas
        self._open_choices = set(range(request.sampling.n))
        self._reader: asyncio.Task[object] | None = None
        self._stopped_by: EngineError | None = None

    @property
    def held_nanos(self) -> Nanos:
        """What the hold has grown to."""
        return self._credit.held_nanos

    async def next(self) -> OutputDelta:
        """The next delta, with its choices. Where the credit ends, an empty delta with a finish reason ends the output.

        Raises:
            EngineError: the request failed, its hold was lost, or ``stop`` was called.
            MeteringUnavailable: the store is away and what is held does not pay for the delta.
        """
        delta = await self._read()
        _raise_failure(delta)
        usage = replace(
            self.usage,
            prompt_tokens=delta.prompt_tokens,
            cached_tokens=delta.cached_tokens,
            completion_tokens=delta.completion_tokens,
            compute_ms=delta.compute_ms,
        )
        cost = self._hold.request.price.charge(usage)
        if self._credit.pays(cost) or await self._credit.grow(cost):
            self.usage = usage
        else:
            delta = self._without_credit(delta)
        if self._stopped_by is not None:
            raise self._stopped_by
        self.finish_reason = delta.finish_reason
        if self.truncation_reason is None and any(one.finish_reason is FinishReason.LENGTH for one in delta.as_choices):
            self.truncation_reason = self._clamped_by()
        return replace(delta, choices=self._choices_of(delta))

    def stop(self, reason: EngineError) -> None:
        """Deliver no more: whoever reads now or later gets ``reason``. The first reason counts."""
        if self._stopped_by is None:
            self._stopped_by = reason
            if self._reader is not None:
                self._reader.cancel()

    async def close(self) -> None:
        """Abort the request in the engine unless it has finished. Call ``stop`` first."""
        if self._reader is None:  # else its cancelled read closes the generator
            await self._deltas.aclose()

    async def _read(self) -> OutputDelta:
        if self._stopped_by is not None:
            raise self._stopped_by
        self._reader = asyncio.current_task()
        try:
            return await anext(self._deltas)
        except StopAsyncIteration:
            raise EngineFailed("the replica ended without saying why") from None
        except asyncio.CancelledError:
            if self._stopped_by is not None and self._reader is not None and self._reader.uncancel() == 0:
                raise self._stopped_by from None
            raise
        finally:
            self._reader = None

    def _choices_of(self, delta: OutputDelta) -> tuple[Choice, ...]:
        """What is new of each answer that is open; the request's last delta ends all of them."""
        choices = [choice for choice in delta.as_choices if choice.index in self._open_choices]
        self._open_choices -= {choice.index for choice in choices if choice.finish_reason is not None}
        if delta.finish_reason is not None:
            choices += [Choice(index, "", finish_reason=delta.finish_reason) for index in sorted(self._open_choices)]
            self._open_choices.clear()
        return tuple(choices)

    def _without_credit(self, delta: OutputDelta) -> OutputDelta:
        """The end of the output in place of a delta that the hold does not pay for."""
        refusal = self._credit.refusal
        if isinstance(refusal, StoreUnavailable):
            raise MeteringUnavailable("the metering store is away: this answer ends with the credit it held")
        if isinstance(refusal, UnknownHold):
            raise HoldLost("the hold of this request ended while it ran: retry")
        self.truncation_reason = refusal
        return replace(delta, token_ids=(), text="", choices=(), finish_reason=FinishReason.LENGTH)

    def _clamped_by(self) -> BillingError | None:
        """What made the hold lower ``max_tokens``: the key's spend cap or the credit; ``None`` where nothing did."""
        hold = self._hold
        if hold.max_tokens == hold.request.max_tokens:
            return None
        if hold.clamped_by is not None:
            return hold.clamped_by
        return InsufficientCredits(hold.balance_nanos, max_cost(hold.request), hold.max_tokens)


def _raise_failure(delta: OutputDelta) -> None:
    """Raise the engine's error where a delta carries one in place of output."""
    if delta.is_adapter_rejected:
        raise AdapterRejected(delta.error)
    if delta.finish_reason is FinishReason.ERROR:
        raise EngineFailed(delta.error or "the engine failed on this request")
    if delta.finish_reason is FinishReason.ABORT:
        raise EngineFailed("the engine stopped this request: its deadline passed")
