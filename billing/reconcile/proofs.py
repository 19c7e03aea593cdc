"""What must be equal in one tenant's books: its entries against its account, buckets and open holds.

Pure: from entries and numbers to rows of expected and found. Repairs nothing.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from billing.account import Bucket
from billing.export.events import CHARGE, USAGE
from billing.store.books import AccountState, OpenHold, ShardState
from billing.store.stream import Entry, UnreadableEntry, order
from billing.usage import OVERAGE, BucketId, TenantId, Unit

MAX_NAMED = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One proof for one tenant, or for a shard where ``tenant`` is empty."""

    proof: str
    tenant: str
    expected: int
    found: int
    named: str = ""
    """The record, bucket or event at fault; empty where all is well."""
    unit: str = "nanos"

    @property
    def difference(self) -> int:
        return self.found - self.expected

    @property
    def is_exact(self) -> bool:
        return self.difference == 0 and not self.named


@dataclass
class Fold:
    """What one tenant's entries add up to, in the order they took effect."""

    entries: int = 0
    numbered: list[tuple[int, str]] = field(default_factory=list)
    granted: Counter[BucketId] = field(default_factory=Counter)
    clawed: Counter[BucketId] = field(default_factory=Counter)
    drawn: Counter[BucketId] = field(default_factory=Counter)
    repaid: int = 0
    charged: int = 0
    drawn_nanos: int = 0
    faults: list[str] = field(default_factory=list)
    sealed: Counter[str] = field(default_factory=Counter)
    """Nanos by event name, up to the export cursor."""
    unsealed: Counter[str] = field(default_factory=Counter)

    def filled(self, bucket: Bucket) -> int:
        """What should have been put into a bucket; an allowance is put there without an entry."""
        return bucket.granted if bucket.is_allowance else self.granted[bucket.id] - self.clawed[bucket.id]

    def add(self, entry: Entry, is_sealed: bool) -> None:
        self.entries += 1
        try:
            if entry.is_usage:
                self._add_record(entry, is_sealed)
            else:
                self._add_movement(entry)
        except (UnreadableEntry, ValueError, KeyError, TypeError) as error:
            self.faults.append(f"entry {entry.id} cannot be read: {error}")

    def _add_record(self, entry: Entry, is_sealed: bool) -> None:
        record = entry.record()
        self.numbered.append((record.seq, record.record_id))
        drawn = sum(draw.amount for draw in record.draws if draw.unit is Unit.NANOS)
        self.charged += record.charged_nanos
        self.drawn_nanos += drawn
        if record.charged_nanos != drawn or record.charged_nanos > record.list_nanos or record.tenant != entry.tenant:
            self.faults.append(
                f"{record.record_id} charges {record.charged_nanos}, draws {drawn}, lists {record.list_nanos}"
            )
        for draw in record.draws:
            self.drawn[draw.bucket] += draw.amount
        told = self.sealed if is_sealed else self.unsealed
        told[CHARGE] += record.overage_nanos
        told[USAGE] += record.charged_nanos - record.overage_nanos

    def _add_movement(self, entry: Entry) -> None:
        moved = entry.movement()
        bucket, amount = BucketId(str(moved["bucket"])), int(str(moved["amount"]))
        self.numbered.append((int(str(moved["seq"])), f"{entry.kind} {moved['source']}"))
        if entry.kind == "grant":
            self.granted[bucket] += amount
        elif entry.kind == "clawback":
            self.clawed[bucket] += amount
        elif entry.kind == "restore":
            self.clawed[bucket] -= amount
        elif entry.kind == "repay":
            self.repaid += amount
        else:
            raise ValueError(f"kind {entry.kind!r} is none that we write")


def fold(state: ShardState) -> dict[TenantId, Fold]:
    """By tenant, what its entries add up to."""
    folds = {tenant: Fold() for tenant in state.accounts}
    end = order(state.cursor)
    for entry in state.entries:
        folds[entry.tenant].add(entry, order(entry.id) <= end)
    return folds


def prove_tenant(tenant: TenantId, account: AccountState, said: Fold, holds: Sequence[OpenHold]) -> list[Row]:
    """Records, credit, holds and exposure of one tenant."""
    held: Counter[BucketId] = Counter()
    for hold in holds:
        for draw in hold.draws:
            held[draw.bucket] += draw.amount
    exposure = said.drawn[OVERAGE] - said.repaid
    return [
        Row("records", tenant, said.drawn_nanos, said.charged, few(said.faults)),
        Row("sequence", tenant, account.seq, said.entries, few(_gaps(said.numbered, account.seq)), "entries"),
        *_prove_credit(tenant, account, said),
        *_prove_held(tenant, account, held, holds),
        Row("exposure", tenant, exposure, account.overage, "" if exposure == account.overage else "field overage"),
    ]


def _gaps(numbered: Iterable[tuple[int, str]], last: int) -> list[str]:
    """What is missing or doubled in numbers that should run from 1 to ``last``."""
    faults, previous, before = [], 0, "the beginning"
    for number, name in sorted(numbered):
        if number == previous:
            faults.append(f"{name} has the number {number} of {before}")
        elif number != previous + 1:
            faults.append(f"{_numbers(previous + 1, number - 1)} missing between {before} and {name}")
        previous, before = number, name
    if previous < last:
        faults.append(f"{_numbers(previous + 1, last)} missing after {before}")
    elif previous > last:
        faults.append(f"{before} has the number {previous}, the account knows {last}")
    return faults


def _numbers(first: int, last: int) -> str:
    return f"number {first}" if first == last else f"numbers {first} to {last}"


def _prove_credit(tenant: TenantId, account: AccountState, said: Fold) -> list[Row]:
    """Remaining = granted - taken back - drawn, for each unit.

    Credit that pays a debt moves between buckets without an entry, which can happen only after
    something was taken back. Until then every bucket must be right by itself.
    """
    filled = {bucket.id: said.filled(bucket) for bucket, _ in account.buckets}
    rows = []
    for unit in Unit:
        buckets = [(bucket, bucket.remaining + held) for bucket, held in account.buckets if bucket.unit is unit]
        right = {bucket.id: filled[bucket.id] - said.drawn[bucket.id] for bucket, _ in buckets}
        if unit is Unit.NANOS:  # what is gone has no unit of its own any more
            gone = (said.granted.keys() | said.drawn.keys()) - filled.keys() - {OVERAGE}
            right |= {name: said.granted[name] - said.clawed[name] - said.drawn[name] for name in gone}
        there = Counter({bucket.id: amount for bucket, amount in buckets})
        wrong = [
            f"bucket {b.id} says {b.granted} granted of {filled[b.id]}" for b, _ in buckets if b.granted != filled[b.id]
        ]
        if not +said.clawed or sum(right.values()) != there.total():
            wrong += [
                f"bucket {name} has {there[name]} of {right[name]}" for name in right if there[name] != right[name]
            ]
        if right:
            rows.append(Row("credit", tenant, sum(right.values()), there.total(), few(wrong), unit.value))
    return rows


def _prove_held(
    tenant: TenantId, account: AccountState, held: Mapping[BucketId, int], holds: Sequence[OpenHold]
) -> list[Row]:
    in_buckets = {bucket.id: drawn for bucket, drawn in account.buckets} | {OVERAGE: account.overage_held}
    faults = [
        f"bucket {name} counts {in_buckets.get(name, 0)} held of {held.get(name, 0)}"
        for name in sorted(held.keys() | in_buckets.keys())
        if in_buckets.get(name, 0) != held.get(name, 0)
    ]
    unleased = [f"hold {hold.request_id} has no lease and would never end" for hold in holds if not hold.has_lease]
    counted = [] if account.open_holds == len(holds) else ["field open"]
    return [
        Row("held", tenant, sum(held.values()), sum(in_buckets.values()), few(faults), "units"),
        Row("open holds", tenant, len(holds), account.open_holds, few(counted + unleased), "holds"),
    ]


def few(faults: Sequence[str]) -> str:
    """The first faults in one line."""
    rest = len(faults) - MAX_NAMED
    return "; ".join(faults[:MAX_NAMED]) + (f"; and {rest} more" if rest > 0 else "")
