"""Read one shard as the store has it at one moment: entries, accounts, open holds and what was exported.

Entries cannot change, so each call reads only those that are new.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from redis.asyncio import Redis

from billing.errors import BillingError
from billing.export.events import SealedEvent
from billing.export.outbox import START, Sums
from billing.ledger.account import Bucket
from billing.ledger.codec import unpack_bucket, unpack_draws
from billing.ledger.journal import FIRST, Entry, entries_in, order
from billing.store.connection import guarded
from billing.store.errors import StoreUnavailable
from billing.store.guard import BULK_DEADLINE_S
from billing.store.keys import Shard
from billing.usage import Draw, RequestId, TenantId

READ = 1_000
TRIES = 5


class UnreadableBooks(BillingError):
    """The store holds a value that this version cannot read; the message says where."""


@dataclass(frozen=True, slots=True)
class AccountState:
    """The numbers that the store has of one tenant."""

    seq: int
    chain: str
    open_holds: int
    overage: int
    overage_held: int
    buckets: tuple[tuple[Bucket, int], ...]
    """Every bucket there ever was, with what open holds drew from it."""


@dataclass(frozen=True, slots=True)
class OpenHold:
    request_id: RequestId
    tenant: TenantId
    draws: tuple[Draw, ...]
    has_lease: bool


@dataclass(frozen=True, slots=True)
class ShardState:
    """Everything at one moment."""

    number: int
    entries: tuple[Entry, ...]
    """Those since the last call, in the order they took effect, with those that were added."""
    accounts: Mapping[TenantId, AccountState]
    holds: tuple[OpenHold, ...]
    cursor: str
    """The stream id up to which everything is sealed."""
    sums: Sums
    outbox: tuple[SealedEvent, ...]
    dead: tuple[SealedEvent, ...]
    withheld: frozenset[str]
    """Stream ids of entries behind the cursor that are not sealed, because they are not as they were written."""


class ShardReader:
    """Reads one shard again and again, from behind the stream id ``at``."""

    def __init__(self, redis: Redis, shard: Shard, at: str = START) -> None:
        self._redis, self._shard = redis, shard
        self._new: dict[str, Entry] = {}
        self._begin = self._at = at

    async def read(self, registered: Sequence[TenantId]) -> ShardState:
        """The shard now. ``registered`` are its tenants; those that only entries or holds name are found.

        Raises:
            StoreUnavailable: it does not answer, or tenants appear faster than they can be read.
        """
        tenants = set(registered)
        for _ in range(TRIES):
            await self.catch_up()
            tenants |= {entry.tenant for entry in self._new.values()}
            state = await self._at_once(sorted(tenants))
            named = {entry.tenant for entry in state.entries} | {hold.tenant for hold in state.holds}
            if named <= tenants:
                self._new.clear()
                return state
            tenants |= named
        raise StoreUnavailable(f"shard {self._shard.number} changes faster than it can be read: try again")

    def add(self, archived: Iterable[Entry]) -> list[Entry]:
        """Add entries that the stream may not have any more. Returns those that differ from the stream's."""
        found = {entry.id: entry for entry in archived if order(entry.id) > order(self._begin)}
        differing = [entry for id_, entry in found.items() if self._new.get(id_, entry) != entry]
        self._new |= found
        return differing

    async def catch_up(self) -> None:
        """Read on to the end of the stream."""
        while True:
            start = FIRST if self._at == START else f"({self._at}"
            async with guarded(BULK_DEADLINE_S):
                entries = entries_in(await self._redis.xrange(self._shard.stream, min=start, count=READ))
            self._keep(entries)
            if len(entries) < READ:
                return

    async def _at_once(self, tenants: Sequence[TenantId]) -> ShardState:
        shard = self._shard
        pipe = self._redis.pipeline(transaction=True)
        pipe.xrange(shard.stream, min=FIRST if self._at == START else f"({self._at}")
        pipe.hgetall(shard.holds)
        pipe.zrange(shard.leases, 0, -1)
        pipe.hgetall(shard.cursor)
        pipe.hvals(shard.outbox)
        pipe.hvals(shard.dead)
        pipe.hkeys(shard.withheld)
        for tenant in tenants:
            pipe.hgetall(shard.account(tenant))
            pipe.hgetall(shard.buckets(tenant))
            pipe.hgetall(shard.retired(tenant))
        async with guarded(BULK_DEADLINE_S):
            found = await pipe.execute()
        try:
            return self._state(tenants, *found)
        except (ValueError, KeyError, TypeError) as error:
            raise UnreadableBooks(
                f"shard {shard.number} holds what farebox does not write: {type(error).__name__} {error}"
            ) from error

    def _state(
        self,
        tenants: Sequence[TenantId],
        new_entries: object,
        holds: Mapping[str, str],
        leases: Sequence[str],
        cursor: Mapping[str, str],
        outbox: Sequence[str],
        dead: Sequence[str],
        withheld: Sequence[str],
        *accounts: Mapping[str, str],
    ) -> ShardState:
        self._keep(entries_in(new_entries))
        leased, of_each = set(leases), iter(accounts)
        return ShardState(
            number=self._shard.number,
            entries=tuple(sorted(self._new.values(), key=lambda entry: order(entry.id))),
            accounts={
                tenant: _account(*three)
                for tenant, three in zip(tenants, zip(of_each, of_each, of_each, strict=True), strict=True)
            },
            holds=tuple(_hold(request_id, text, request_id in leased) for request_id, text in sorted(holds.items())),
            cursor=cursor.get("at", START),
            sums=Sums(**{f.name: int(cursor.get(f.name, 0)) for f in fields(Sums)}),
            outbox=tuple(SealedEvent.from_json(text) for text in outbox),
            dead=tuple(SealedEvent.from_json(text) for text in dead),
            withheld=frozenset(withheld),
        )

    def _keep(self, entries: Sequence[Entry]) -> None:
        self._new |= {entry.id: entry for entry in entries}
        if entries:
            self._at = entries[-1].id


def _account(numbers: Mapping[str, str], live: Mapping[str, str], retired: Mapping[str, str]) -> AccountState:
    buckets = [unpack_bucket(name, text) for name, text in sorted({**retired, **live}.items())]
    return AccountState(
        seq=int(numbers.get("seq", 0)),
        chain=str(numbers.get("chain", "")),
        open_holds=int(numbers.get("open", 0)),
        overage=int(numbers.get("overage", 0)),
        overage_held=int(numbers.get("overage_held", 0)),
        buckets=tuple(buckets),
    )


def _hold(request_id: str, text: str, has_lease: bool) -> OpenHold:
    raw = json.loads(text)
    return OpenHold(RequestId(request_id), TenantId(raw["tenant"]), unpack_draws(raw["draws"]), has_lease)
