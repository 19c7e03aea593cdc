"""One shard's books: the sums of its entries so far, proved against the store at one moment.

Each entry is read once, from the watermark on; a later call goes on from there.
"""

import asyncio
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from redis.asyncio import Redis

from billing.archive.files import Archive
from billing.ledger.journal import Entry, order
from billing.reconcile.books import OpenHold, ShardReader, ShardState
from billing.reconcile.dodo_proofs import ShardExport, export_of
from billing.reconcile.export_proofs import prove_export
from billing.reconcile.fold import Fold
from billing.reconcile.proofs import Row, prove_tenant
from billing.reconcile.watermark import Mark
from billing.store.keys import Shard
from billing.usage import TenantId


@dataclass
class ShardBooks:
    """``day_ms``: entries from then on are not closed; those before make the next watermark."""

    redis: Redis
    shard: Shard
    mark: Mark
    day_ms: int
    folds: dict[TenantId, Fold] = field(default_factory=dict)
    _differing: frozenset[str] = frozenset()
    is_open: bool = False
    _last: str = ""
    _closed: tuple[str, Mapping[TenantId, Fold]] | None = None

    def __post_init__(self) -> None:
        self._reader = ShardReader(self.redis, self.shard, self.mark.at)
        self.folds |= {tenant: Fold.from_json(text) for tenant, text in self.mark.folds.items()}
        self._last = self.mark.at

    async def open(self, archive: Archive | None) -> None:
        """Entries may be archived and trimmed at any time: those that the stream lacked are in the archive after."""
        await self._reader.catch_up()
        if archive is not None:
            since_ms, _ = order(self.mark.at)
            archived = await asyncio.to_thread(archive.read, self.shard, since_ms)
            self._differing = frozenset(entry.id for entry in self._reader.add(archived))
        self.is_open = True

    async def look(self, registered: Collection[TenantId]) -> ShardState:
        """The shard now. Raises what ``ShardReader.read`` does; nothing was added then."""
        state = await self._reader.read((*registered, *self.folds))
        for entry in state.entries:
            self._add(entry)
        self._close()
        for tenant in state.accounts:
            self.folds.setdefault(tenant, Fold())
        withheld = {order(id_) for id_ in state.withheld}
        for fold in self.folds.values():
            fold.seal(order(state.cursor), withheld)
        return state

    def prove(self, state: ShardState) -> list[Row]:
        """Everything that can be proved of the shard without Dodo."""
        holds: defaultdict[TenantId, list[OpenHold]] = defaultdict(list)
        for hold in state.holds:
            holds[hold.tenant].append(hold)
        rows: list[Row] = []
        for tenant, account in state.accounts.items():
            rows += prove_tenant(tenant, account, self.folds[tenant], holds[tenant])
        return rows + prove_export(state, self.folds.values())

    def export(self, state: ShardState) -> ShardExport:
        return export_of(state, self.folds)

    def closed(self, state: ShardState) -> tuple[str, dict[TenantId, str]]:
        """The next watermark's stream id and folds, once this is proved; the old ones where export is behind."""
        assert self._closed is not None, "books are looked at before they are closed"
        at, folds = self._closed
        if order(at) > order(state.cursor):
            return self.mark.at, dict(self.mark.folds)
        return at, {tenant: fold.to_json() for tenant, fold in folds.items()}

    def _add(self, entry: Entry) -> None:
        if order(entry.id)[0] >= self.day_ms:
            self._close()
        fold = self.folds.setdefault(entry.tenant, Fold())
        fold.add(entry)
        if entry.id in self._differing:
            fold.faults.append(f"{fold.last_name} differs between stream and archive")
        self._last = entry.id

    def _close(self) -> None:
        """Remember, once, how the closed days ended."""
        if self._closed is None:
            self._closed = self._last, {tenant: fold.closed() for tenant, fold in self.folds.items()}
