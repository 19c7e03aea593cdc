"""Proofs of one tenant's books: its entries against its account, buckets and open holds.

Pure: from entries and numbers to rows of expected and found. Repairs nothing.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from billing.reconcile.books import AccountState, OpenHold
from billing.reconcile.fold import Fold
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
    """The record, bucket or event at fault; empty where the proof holds."""
    unit: str = "nanos"
    tolerance: int = 0
    """The largest difference that rounding may cause."""

    @property
    def difference(self) -> int:
        return self.found - self.expected

    @property
    def is_exact(self) -> bool:
        return abs(self.difference) <= self.tolerance and not self.named


def prove_tenant(tenant: TenantId, account: AccountState, fold: Fold, holds: Sequence[OpenHold]) -> list[Row]:
    """Records, credit, holds and exposure of one tenant."""
    held: Counter[BucketId] = Counter()
    for hold in holds:
        for draw in hold.draws:
            held[draw.bucket] += draw.amount
    exposure = fold.drawn[OVERAGE] - fold.repaid
    return [
        Row("records", tenant, fold.drawn_nanos, fold.charged, few(fold.faults)),
        Row("sequence", tenant, account.seq, fold.entries, few(fold.gaps_until(account.seq, account.chain)), "entries"),
        *_prove_credit(tenant, account, fold),
        *_prove_held(tenant, account, held, holds),
        Row("exposure", tenant, exposure, account.overage, "" if exposure == account.overage else "field overage"),
    ]


def _prove_credit(tenant: TenantId, account: AccountState, fold: Fold) -> list[Row]:
    """Remaining = granted - clawed back - drawn, for each unit.

    Credit that pays a debt moves between buckets without an entry, which can happen only after something was
    clawed back or drawn beyond what was there. Until then every bucket must be right by itself.
    """
    filled = {bucket.id: fold.filled(bucket) for bucket, _ in account.buckets}
    rows = []
    for unit in Unit:
        buckets = [(bucket, bucket.remaining + held) for bucket, held in account.buckets if bucket.unit is unit]
        right = {bucket.id: filled[bucket.id] - fold.drawn[bucket.id] for bucket, _ in buckets}
        if unit is Unit.NANOS:  # a bucket that is gone has no unit any more
            gone = (fold.granted.keys() | fold.drawn.keys()) - filled.keys() - {OVERAGE}
            right |= {name: fold.granted[name] - fold.clawed[name] - fold.drawn[name] for name in gone}
        there = Counter({bucket.id: amount for bucket, amount in buckets})
        wrong = [
            f"bucket {b.id} says {b.granted} granted of {filled[b.id]}" for b, _ in buckets if b.granted != filled[b.id]
        ]
        had_debt = fold.has_taken or any(amount < 0 for amount in right.values())
        if not had_debt or sum(right.values()) != there.total():
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
