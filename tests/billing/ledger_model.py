"""What the ledger should do, written a second time and as plainly as possible."""

from dataclasses import dataclass, field

FOREVER = 2**62


@dataclass
class Pot:
    """A bucket: units left and held, and until when they may be drawn."""

    unit: str
    left: int
    held: int = 0
    ends: int = FOREVER
    scope: str = ""
    is_allowance: bool = False
    granted: int = 0


@dataclass
class Open:
    parts: list[tuple[str, int]]
    unit: str
    cap: int
    cost: int = 0
    calls: int = 0
    is_doomed: bool = False
    worst: int = 0
    billed: int = 0


@dataclass
class Model:
    now: int
    pots: dict[str, Pot] = field(default_factory=dict)
    open: dict[str, Open] = field(default_factory=dict)
    expired: dict[str, Open] = field(default_factory=dict)
    settled: dict[str, int] = field(default_factory=dict)
    owed: dict[str, list[int]] = field(default_factory=dict)
    overage: int = 0
    spent: int = 0

    def live(self, unit: str) -> list[tuple[str, Pot]]:
        found = [(i, p) for i, p in self.pots.items() if p.unit == unit and (p.ends > self.now or p.left < 0)]
        return sorted(found, key=lambda ip: (not ip[1].is_allowance, ip[1].ends, ip[0]))

    def balance(self) -> int:
        return sum(p.left for _, p in self.live("nanos"))

    def held(self) -> int:
        return sum(n for o in self.open.values() if o.unit == "nanos" for _, n in o.parts)

    def held_overage(self) -> int:
        return sum(n for o in self.open.values() for i, n in o.parts if i == "overage")

    def hold(self, rid: str, worst: int, least: int, model: str, cap: int, is_doomed: bool) -> str:
        calls = [(i, p) for i, p in self.live("requests") if p.scope in ("", model)]
        if worst and sum(p.left for _, p in calls) > 0:
            name = next(i for i, p in calls if p.left > 0)
            return self._open(rid, Open([(name, 1)], "requests", cap, is_doomed=is_doomed))
        room = max(0, cap - self.overage - self.held_overage())
        balance = self.balance()
        able = balance + room if balance >= 0 else balance
        if worst and able < least:
            later = balance + self.held() - self.held_overage()
            later += max(0, cap - self.overage) if later >= 0 else 0
            return "on_hold" if later >= least else "insufficient"
        rest, parts, amount = min(worst, balance), [], min(worst, able)
        for name, pot in self.live("nanos"):
            part = max(0, min(pot.left, rest - sum(n for _, n in parts)))
            parts += [(name, part)] if part else []
        parts += [("overage", amount - max(0, rest))] if amount > max(0, rest) else []
        return self._open(rid, Open(parts, "nanos", cap, is_doomed=is_doomed, worst=amount))

    def _open(self, rid: str, opened: Open) -> str:
        for name, part in opened.parts:
            if name != "overage":
                self.pots[name].left -= part
                self.pots[name].held += part
        self.open[rid] = opened
        return "held"

    def close(self, rid: str, cost: int, calls: int) -> int:
        opened = self.open.pop(rid)
        rest = min(cost, opened.worst) if opened.unit == "nanos" else min(1, calls)
        opened.billed, charged = rest, 0
        for name, part in opened.parts:
            used = min(part, rest)
            rest, charged = rest - used, charged + (used if opened.unit == "nanos" else 0)
            if name == "overage":
                self.overage += used
            else:
                self.pots[name].held -= part
                self.pots[name].left += part - used
        self.spent += charged
        self.expired[rid] = opened
        return charged

    def close_late(self, rid: str, cost: int, calls: int) -> int:
        opened = self.expired[rid]
        due = (min(cost, opened.worst) if opened.unit == "nanos" else min(1, calls)) - opened.billed
        if opened.unit == "requests":
            pot = self.pots[opened.parts[0][0]]
            pot.left -= 1 if due > 0 and pot.left > 0 and pot.ends > self.now else 0
            return 0
        balance, taken = self.balance(), 0
        for _, pot in self.live("nanos"):
            part = max(0, min(pot.left, min(due, balance) - taken))
            pot.left, taken = pot.left - part, taken + part
        room = max(0, opened.cap - self.overage - self.held_overage()) if balance >= 0 else 0
        postpaid = max(0, min(due - taken, room))
        self.overage, self.spent = self.overage + postpaid, self.spent + taken + postpaid
        return taken + postpaid

    def grant(self, source: str, pot: Pot) -> None:
        self.pots[source] = pot
        for amount in self.owed.pop(source, []):
            self._take(pot, amount)
        self._pay_debts()

    def claw_back(self, source: str, amount: int) -> int:
        taken = self._take(self.pots[source], amount)
        self._pay_debts()
        return taken

    def _take(self, pot: Pot, amount: int) -> int:
        taken = min(amount, pot.granted)
        pot.left, pot.granted = pot.left - taken, pot.granted - taken
        return taken

    def _pay_debts(self) -> None:
        for unit in ("nanos", "requests"):
            for _, debt in self.live(unit):
                for _, pot in self.live(unit):
                    if debt.left < 0 < pot.left and debt.scope == pot.scope:
                        paid = min(-debt.left, pot.left)
                        debt.left, pot.left = debt.left + paid, pot.left - paid
