"""Sum up one tenant's entries, read once and in order, and check that they are as they were written.

``proofs`` compares the sums with the store. A fold of closed days is stored as text.
"""

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Self

from billing.export.events import CHARGE, USAGE
from billing.ledger.account import Bucket
from billing.ledger.journal import Entry, Link, UnreadableEntry, order
from billing.usage import BucketId, Unit

Place = tuple[int, int]
_COUNTERS = ("granted", "clawed", "drawn", "sealed")
_NUMBERS = ("entries", "has_taken", "repaid", "charged", "drawn_nanos", "last_name")


@dataclass
class Fold:
    """One tenant's entries so far. A fault is a sentence that names an entry."""

    entries: int = 0
    link: Link = field(default_factory=Link)
    last_name: str = "the beginning"
    granted: Counter[BucketId] = field(default_factory=Counter)
    clawed: Counter[BucketId] = field(default_factory=Counter)
    drawn: Counter[BucketId] = field(default_factory=Counter)
    has_taken: bool = False
    """Something was clawed back, so that credit of one bucket may have paid another's debt."""
    repaid: int = 0
    charged: int = 0
    drawn_nanos: int = 0
    faults: list[str] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)
    sealed: Counter[str] = field(default_factory=Counter)
    """Nanos by event name, up to the export cursor."""
    waiting: list[tuple[Place, int, int]] = field(default_factory=list)
    """Entries that are not sealed: place, nanos to charge, nanos covered."""
    _missing: dict[int, str] = field(default_factory=dict)
    """By number, the digest behind which a missing entry belongs."""

    @property
    def unsealed(self) -> Counter[str]:
        return Counter(
            {CHARGE: sum(charge for _, charge, _ in self.waiting), USAGE: sum(rest for *_, rest in self.waiting)}
        )

    def filled(self, bucket: Bucket) -> int:
        """What should have been put into a bucket; an allowance is put there without an entry."""
        return bucket.granted if bucket.is_allowance else self.granted[bucket.id] - self.clawed[bucket.id]

    def add(self, entry: Entry) -> None:
        self.entries += 1
        charge = covered = 0
        try:
            if entry.is_usage:
                charge, covered = self._add_record(entry)
            else:
                self._add_movement(entry)
        except (UnreadableEntry, ValueError, KeyError, TypeError) as error:
            self.faults.append(f"entry {entry.id} cannot be read: {error}")
        self.waiting.append((order(entry.id), charge, covered))

    def seal(self, cursor: Place, withheld: Collection[Place] = ()) -> None:
        """Everything up to the export cursor is sealed, but for what is withheld."""
        waiting, self.waiting = self.waiting, []
        for place, charge, covered in waiting:
            if place > cursor or place in withheld:
                self.waiting.append((place, charge, covered))
            else:
                self.sealed += Counter({CHARGE: charge, USAGE: covered})

    def _add_record(self, entry: Entry) -> tuple[int, int]:
        record = entry.record()
        self._follow(entry, record.seq, record.record_id)
        drawn = sum(draw.amount for draw in record.draws if draw.unit is Unit.NANOS)
        self.charged += record.charged_nanos
        self.drawn_nanos += drawn
        if record.charged_nanos != drawn or record.charged_nanos > record.list_nanos or record.tenant != entry.tenant:
            self.faults.append(
                f"{record.record_id} charges {record.charged_nanos}, draws {drawn}, lists {record.list_nanos}"
            )
        for draw in record.draws:
            self.drawn[draw.bucket] += draw.amount
        return record.overage_nanos, record.charged_nanos - record.overage_nanos

    def _add_movement(self, entry: Entry) -> None:
        moved = entry.movement()
        bucket, amount = BucketId(str(moved["bucket"])), int(str(moved["amount"]))
        self._follow(entry, int(str(moved["seq"])), f"{entry.kind} {moved['source']}")
        if entry.kind == "grant":
            self.granted[bucket] += amount
        elif entry.kind == "adjust":
            self.granted[bucket] += amount
            self.has_taken |= amount < 0
        elif entry.kind == "clawback":
            self.clawed[bucket] += amount
            self.has_taken = True
        elif entry.kind == "restore":
            self.clawed[bucket] -= amount
        elif entry.kind == "repay":
            self.repaid += amount
        else:
            raise ValueError(f"kind {entry.kind!r} is none that we write")

    def _follow(self, entry: Entry, number: int, name: str) -> None:
        """Numbers run from 1 without a gap, and each entry's digest goes on from the one before it."""
        last = self.link.number
        before = self.link.chain
        if number <= last:
            self.gaps.append(f"{name} has the number {number} once more, behind {self.last_name}")
            if number in self._missing and not entry.follows(self._missing[number]):
                self.faults.append(f"{name} is not as it was written")
            return
        if number > last + 1:
            self.gaps.append(f"{_numbers(last + 1, number - 1)} missing between {self.last_name} and {name}")
            self._missing[last + 1] = before
        elif not entry.follows(before):
            self.faults.append(f"{name} is not as it was written")
        self.link, self.last_name = Link(number, entry.chain), name

    def gaps_until(self, seq: int, chain: str) -> list[str]:
        """What is missing or doubled, given the last number and digest that the account has."""
        number = self.link.number
        if number < seq:
            return [*self.gaps, f"{_numbers(number + 1, seq)} missing after {self.last_name}"]
        if number > seq:
            return [*self.gaps, f"{self.last_name} has the number {number}, the account counts {seq}"]
        if self.link.chain != chain:
            return [*self.gaps, f"{self.last_name} does not end in the digest that the account has"]
        return self.gaps

    def closed(self) -> Self:
        """A copy that counts every entry as sealed."""
        copied = replace(
            self,
            granted=Counter(self.granted), clawed=Counter(self.clawed), drawn=Counter(self.drawn),
            sealed=Counter(self.sealed), faults=list(self.faults), gaps=list(self.gaps), waiting=list(self.waiting),
            _missing=dict(self._missing),
        )  # fmt: skip
        copied.seal((2**63, 0))
        return copied

    def to_json(self) -> str:
        """The text to go on from. A fold with a fault or with unsealed entries has none."""
        faults = [*self.faults, *self.gaps, *self.waiting]
        assert not faults, "only what was proved is stored"
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        counters = {name: getattr(self, name) for name in _COUNTERS}
        return json.dumps(numbers | counters | {"link": [self.link.number, self.link.chain]})

    @classmethod
    def from_json(cls, text: str) -> Self:
        raw = json.loads(text)
        number, chain = raw["link"]
        found = cls(link=Link(int(number), str(chain)))
        for name in _NUMBERS:
            setattr(found, name, raw[name])
        for name in _COUNTERS:
            setattr(found, name, Counter(raw[name]))
        return found


def _numbers(first: int, last: int) -> str:
    return f"number {first}" if first == last else f"numbers {first} to {last}"
