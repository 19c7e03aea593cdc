"""What the ledger should do, written a second time and as plainly as possible."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product

FOREVER = 2**62


@dataclass
class Pot:
    """A bucket: what is left of it, and until when that may be drawn."""

    unit: str
    left: int
    ends: int = FOREVER
    scope: str = ""
    is_allowance: bool = False
    given: int = 0
    back: int = 0


@dataclass(eq=False)
class Open:
    """A hold: on what it may draw, what it took from each pot, what it had used by its last checkpoint."""

    unit: str
    cap: int
    allowance: str
    parts: Counter[str] = field(default_factory=Counter)
    used: Mapping[str, int] = field(default_factory=Counter)
    billed: int = 0


@dataclass
class Model:
    now: int
    pots: dict[str, Pot] = field(default_factory=dict)
    open: dict[str, Open] = field(default_factory=dict)
    expired: dict[str, Open] = field(default_factory=dict)
    reversals: dict[str, list[int]] = field(default_factory=dict)
    """By grant, the amounts of its refunds and of its disputes that stand."""
    overage: int = 0

    def rank(self, name: str) -> tuple[int, int, str]:
        pot = self.pots.get(name)
        return (2, 0, name) if pot is None else (0 if pot.is_allowance else 1, pot.ends, name)

    def live(self, unit: str, allowance: str = "") -> list[tuple[str, Pot]]:
        found = [i for i, p in self.pots.items() if p.unit == unit and (p.ends > self.now or p.left < 0)]
        found = [i for i in found if not allowance or not self.pots[i].is_allowance or i == allowance]
        return [(i, self.pots[i]) for i in sorted(found, key=self.rank)]

    def held(self, holds: Iterable[Open]) -> Counter[str]:
        return sum((hold.parts for hold in holds), Counter())

    def room(self, cap: int, kept: Collection[Open]) -> int:
        return max(0, cap - self.overage - self.held(kept)["overage"])

    def reach(self, hold: Open, kept: Collection[Open]) -> int:
        """Nanos that a hold could have while these keep what they took and all others give it back."""
        back = self.held(self.open.values()) - self.held(kept)
        money = sum(p.left + back[i] for i, p in self.live("nanos", hold.allowance))
        return money + self.room(hold.cap, kept) if money >= 0 else money

    def take(self, pots: list[tuple[str, Pot]], amount: int, room: int = 0) -> Counter[str]:
        """From the pots in their order, never what pays a debt; then from the room for exposure."""
        money, parts = sum(p.left for _, p in pots), Counter[str]()
        for name, pot in pots:
            parts[name] = max(0, min(pot.left, min(amount, money) - parts.total()))
            pot.left -= parts[name]
        parts["overage"] = min(amount - money, room) if money >= 0 else 0
        return +parts

    def hold(self, rid: str, hold: Open, first: int, model: str) -> str:
        calls = [(i, p) for i, p in self.live("requests") if p.scope in ("", model)]
        if sum(p.left for _, p in calls) > 0:
            hold.unit, hold.parts = "requests", self.take([(i, p) for i, p in calls if p.left > 0][:1], 1)
        said = self.extend(hold, first, 1)
        there = sum(p.left + self.held(self.open.values())[i] for i, p in calls)
        self.open |= {rid: hold} if said == "held" else {}
        return "on_hold" if said == "insufficient" and there > 0 else said

    def extend(self, hold: Open, total: int, least: int) -> str:
        """Raise a hold to a total, or by all there is where that comes to the least."""
        have, there = hold.parts.total(), self.reach(hold, self.open.values())
        if hold.unit == "requests" or have >= total:
            return "held"
        if have + there < least:
            return "on_hold" if have + self.reach(hold, [hold]) >= least else "insufficient"
        pots = self.live("nanos", hold.allowance)
        hold.parts += self.take(pots, min(total - have, there), self.room(hold.cap, self.open.values()))
        return "held"

    def close(self, rid: str, used: Mapping[str, int]) -> int:
        """Bill at most the hold and give the rest back; returns nanos charged."""
        hold = self.expired[rid] = self.open.pop(rid)
        rest = hold.billed = min(used[hold.unit], hold.parts.total())
        for name in sorted(hold.parts, key=self.rank):
            part = min(hold.parts[name], rest)
            rest -= part
            if name == "overage":
                self.overage += part
            else:
                self.pots[name].left += hold.parts[name] - part
        return hold.billed if hold.unit == "nanos" else 0

    def close_late(self, rid: str, used: Mapping[str, int]) -> int:
        """Bill what the checkpoint missed, as far as it is there; returns nanos charged."""
        hold = self.expired[rid]
        due = min(used[hold.unit], hold.parts.total()) - hold.billed
        if hold.unit == "requests":
            self.take([(i, p) for i, p in self.live("requests") if i in hold.parts], due)
            return 0
        parts = self.take(self.live("nanos"), max(0, due), self.room(hold.cap, self.open.values()))
        self.overage += parts["overage"]
        return parts.total()

    def fill(self, name: str, pot: Pot) -> None:
        """A grant, an allowance or a correction."""
        pot.given, self.pots[name] = pot.left, pot
        self.reverse(name)

    def reverse(self, name: str) -> int:
        """Of what a grant gave, as much is taken back as stands against it; then what is left pays what is owed."""
        if name not in self.pots:
            return 0
        pot = self.pots[name]
        taken = max(0, min(pot.given, sum(self.reversals.get(name, [])))) - pot.back
        pot.left, pot.back = pot.left - taken, pot.back + taken
        pots = [p for unit in ("nanos", "requests") for _, p in self.live(unit)]
        for debt, other in product(pots, pots):
            if debt.left < 0 < other.left and (debt.unit, debt.scope) == (other.unit, other.scope):
                paid = min(-debt.left, other.left)
                debt.left, other.left = debt.left + paid, other.left - paid
        return taken
