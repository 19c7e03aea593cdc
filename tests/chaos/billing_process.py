"""A billing actor in a process that kills itself: the class that Ray runs, without Ray.

Failpoints in its outbox and in its Dodo client end the process at a named point of the export.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from redis.asyncio import Redis

from billing import periodic
from billing.dodo.client import Dodo, Event
from billing.dodo.settings import DodoSettings
from billing.export import exporter
from billing.export.checking import CheckedEntries
from billing.export.events import SealedEvent
from billing.export.outbox import Outbox
from billing.store.keys import Shard, shard_for
from deployments.billing_actor import BillingActor
from deployments.config import BillingArgs
from tests.chaos.failpoint import Failpoint

BEFORE_SEAL, AFTER_SEAL, AFTER_SEND, BETWEEN_ACKS = "before seal", "after seal", "after send", "between acks"


@dataclass(frozen=True)
class BillingSpec:
    """What a billing process is started with."""

    environ: Mapping[str, str]
    failpoint: Failpoint


class FailpointOutbox(Outbox):
    def __init__(self, redis: Redis, failpoint: Failpoint) -> None:
        super().__init__(redis)
        self._failpoint = failpoint

    async def seal(
        self, shard: Shard, start: str, end: str, checked: CheckedEntries, events: Sequence[SealedEvent]
    ) -> bool:
        self._failpoint.reach(BEFORE_SEAL)
        is_ours = await super().seal(shard, start, end, checked, events)
        self._failpoint.reach(AFTER_SEAL)
        return is_ours

    async def ack(self, events: Iterable[SealedEvent]) -> int:
        """Acknowledge one shard after another, as the outbox does, with a failpoint after each."""
        acked, waiting = 0, list(events)
        for shard in dict.fromkeys(shard_for(event.tenant) for event in waiting):
            acked += await super().ack([event for event in waiting if shard_for(event.tenant) == shard])
            self._failpoint.reach(BETWEEN_ACKS)
        return acked


class FailpointDodo(Dodo):
    def __init__(
        self, failpoint: Failpoint, settings: DodoSettings, on_call: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        super().__init__(settings, on_call=on_call)
        self._failpoint = failpoint

    async def ingest(self, events: Sequence[Event]) -> int:
        counted = await super().ingest(events)
        self._failpoint.reach(AFTER_SEND)
        return counted


def bill(spec: BillingSpec) -> None:
    """Run the actor until the failpoint kills the process."""
    os.environ.update(spec.environ)
    exporter.Outbox = lambda redis: FailpointOutbox(redis, spec.failpoint)  # type: ignore[misc, assignment]
    periodic.Dodo = partial(FailpointDodo, spec.failpoint)  # type: ignore[misc, assignment]
    asyncio.run(_bill())


async def _bill() -> None:
    actor = BillingActor(BillingArgs(flush_interval_s=0.2, expire_interval_s=0.5, requests_per_minute=100_000))
    await asyncio.Event().wait()
    await actor.close()
