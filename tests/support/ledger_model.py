"""The rules of the ledger, written a second time and as plainly as possible: what the scripts are compared with.

Amounts are integers of one unit. A movement answers with what it did, or with a ``Refusal``.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import NamedTuple

FOREVER = 2**62
LINE = "overage"
"""The name under which draws on the credit line are listed."""
MONEY, CALLS = "nanos", "requests"


class Refusal(NamedTuple):
    reason: str
    left: int = 0
    """Of the balance, or of a spend cap; of what was spent where the cap is reached."""
    detail: int | str = 0
    """What other holds have, or which limit decides."""


@dataclass
class Bucket:
    unit: str
    remaining: int
    ends: int = FOREVER
    scope: tuple[str, ...] = ()
    """Models that calls cover; empty covers all."""
    is_allowance: bool = False
    granted: int = 0
    price: int = 0
    """What ``sold`` units cost; neither ever changes."""
    sold: int = 0
    payers: Counter[str] = field(default_factory=Counter)
    """What other buckets have paid of this one's debts."""


class Cap(NamedTuple):
    """What may be spent in the window that begins at ``start``."""

    start: int
    nanos: int


@dataclass(frozen=True)
class Request:
    asked: int
    """Max cost."""
    first: int
    """Initial hold, where money pays."""
    model: str
    allowance: str = ""
    """The bucket that the plan gives for this period, if any."""
    given: Bucket | None = None
    credit_limit: int = 0
    cap: Cap | None = None


@dataclass
class Hold:
    request: Request
    draws: dict[str, int] = field(default_factory=dict)
    """In drawing order, the credit line last."""
    unit: str = MONEY
    affords: int = 0
    used: Counter[str] = field(default_factory=Counter)
    """By the last checkpoint."""
    reported: int = 0
    """What its gateway said it held, at the last checkpoint."""
    charged: int = 0
    """Units charged when it expired."""

    @property
    def held(self) -> int:
        return sum(self.draws.values())


@dataclass
class Clawback:
    granted_by: str
    waiting: int
    taken: int = 0
    reply: int = 0
    restored: int | None = None


@dataclass
class Charge:
    """What a record says."""

    charged: int
    draws: dict[str, int]
    is_repeat: bool = False
    sales: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By bucket that was sold: its price, and the units that it bought."""


@dataclass
class Model:
    now: int
    buckets: dict[str, Bucket] = field(default_factory=dict)
    holds: dict[str, Hold] = field(default_factory=dict)
    expired: dict[str, Hold] = field(default_factory=dict)
    settled: dict[str, Charge] = field(default_factory=dict)
    clawbacks: dict[str, Clawback] = field(default_factory=dict)
    repaid: set[str] = field(default_factory=set)
    exposure: int = 0
    in_force: str | None = None
    """The allowance of the last hold's plan; any counts before the first hold."""
    window: int = 0
    spent: int = 0
    """In the window that began last, by requests that were held in it."""
    window_held: int = 0

    # What there is.

    def rank(self, name: str) -> tuple[int, int, str]:
        """The drawing order: allowances, then what ends first, then the credit line."""
        bucket = self.buckets.get(name)
        return (2, 0, name) if bucket is None else (0 if bucket.is_allowance else 1, bucket.ends, name)

    def drawable(self, unit: str, allowance: str | None, own: Collection[str] = ()) -> list[tuple[str, Bucket]]:
        """Live buckets, of allowances only the named one; ``own`` though they ended; every bucket below zero."""
        found = []
        for name in sorted(self.buckets, key=self.rank):
            bucket = self.buckets[name]
            is_in_force = not bucket.is_allowance or allowance is None or allowance == name
            if bucket.unit == unit and (
                bucket.remaining < 0 or name in own or (bucket.ends > self.now and is_in_force)
            ):
                found.append((name, bucket))
        return found

    @property
    def balance(self) -> int:
        return sum(bucket.remaining for _, bucket in self.drawable(MONEY, self.in_force))

    def left(self, allowance: str | None) -> list[tuple[str, int]]:
        """What every bucket has that may be drawn beside this allowance, in drawing order."""
        found = [*self.drawable(MONEY, allowance), *self.drawable(CALLS, allowance)]
        found.sort(key=lambda one: self.rank(one[0]))
        return [(name, bucket.remaining) for name, bucket in found if bucket.remaining]

    def left_for(self, request: Request) -> list[tuple[str, int]]:
        """The same, as a hold would find it."""
        before = dict(self.buckets)
        self.put_in_place(request)
        found = self.left(request.allowance)
        self.buckets = before
        return found

    def held(self, holds: Iterable[Hold]) -> Counter[str]:
        return sum((Counter(hold.draws) for hold in holds), Counter())

    def line_left(self, credit_limit: int, kept: Iterable[Hold]) -> int:
        return max(0, credit_limit - self.exposure - self.held(kept)[LINE])

    def available(self, credit_limit: int, allowance: str | None, kept: Collection[Hold]) -> int:
        """Nanos to draw, if only these holds kept what they hold and all others gave it back."""
        back = self.held(self.holds.values()) - self.held(kept)
        money = sum(bucket.remaining + back[name] for name, bucket in self.drawable(MONEY, allowance))
        return money + self.line_left(credit_limit, kept) if money >= 0 else money

    def counted(self, cap: Cap, own: int) -> tuple[int, int]:
        """Spent and held of a cap's window; a hold that outlives its window is alone in it."""
        return (self.spent, self.window_held) if cap.start == self.window else (0, own)

    def headroom(self, cap: Cap | None, own: int) -> tuple[int, int]:
        """What a cap leaves at once, and with all other holds given back."""
        if cap is None:
            return FOREVER, FOREVER
        spent, held = self.counted(cap, own)
        return cap.nanos - spent - held, cap.nanos - spent

    # The one waterfall: from the buckets in their order, then from the credit line, then from what owes the rest.

    def draw(
        self,
        unit: str,
        amount: int,
        credit_limit: int,
        allowance: str | None,
        own: Collection[str] = (),
        only: str = "",
        owes: str = "",
    ) -> dict[str, int]:
        """Without ``owes`` what debts leave is the most that is drawn, with it they do not count."""
        buckets = [(name, b) for name, b in self.drawable(unit, allowance, own) if only in ("", name)]
        money, draws = sum(bucket.remaining for _, bucket in buckets), Counter[str]()
        most = amount if owes else min(amount, money)
        for name, bucket in buckets:
            draws[name] = max(0, min(bucket.remaining, most - draws.total()))
            bucket.remaining -= draws[name]
        if unit == MONEY and (owes or money >= 0):
            draws[LINE] = min(amount - draws.total(), self.line_left(credit_limit, self.holds.values()))
        if owes:
            rest = amount - draws.total()
            draws[owes] += rest
            if owes != LINE:
                self.buckets[owes].remaining -= rest
        return self.in_order(draws)

    def in_order(self, draws: Counter[str]) -> dict[str, int]:
        return {name: draws[name] for name in sorted(draws, key=self.rank) if draws[name]}

    def count(self, request: Request, held: int, charged: int) -> None:
        """Under its cap, unless that window is over."""
        if request.cap is not None and request.cap.start == self.window:
            self.window_held, self.spent = max(0, self.window_held + held), self.spent + charged

    def begin(self, cap: Cap) -> None:
        if cap.start > self.window:
            self.window, self.spent, self.window_held = cap.start, 0, 0

    def pay_debts(self) -> None:
        """Packs pay what no open hold can give back; an allowance pays nothing."""
        held, names = self.held(self.holds.values()), sorted(self.buckets, key=self.rank)
        for debtor, payer in product(names, names):
            owing, paying = self.buckets[debtor], self.buckets[payer]
            debt = -(owing.remaining + held[debtor])
            is_alike = (owing.unit, owing.scope) == (paying.unit, paying.scope)
            if debt > 0 and paying.remaining > 0 and is_alike and paying.ends > self.now and not paying.is_allowance:
                self.pay(debtor, payer, min(debt, paying.remaining))

    def pay(self, debtor: str, payer: str, amount: int) -> None:
        self.buckets[debtor].remaining += amount
        self.buckets[debtor].payers[payer] += amount
        self.buckets[payer].remaining -= amount

    # The life of a hold.

    def hold(self, rid: str, request: Request) -> Hold | Refusal:
        if rid in self.holds:
            is_same = (self.holds[rid].request.asked, self.holds[rid].request.model) == (request.asked, request.model)
            return self.holds[rid] if is_same else Refusal("duplicate")
        if rid in self.expired or rid in self.settled:
            return Refusal("duplicate")
        before = dict(self.buckets)
        self.put_in_place(request)
        found = self.new_hold(request)
        if isinstance(found, Refusal):
            self.buckets = before
            return found
        self.in_force, self.holds[rid] = request.allowance, found
        if found.request.cap is not None:
            self.begin(found.request.cap)
            self.window_held += found.held if found.unit == MONEY else 0
        return found

    def put_in_place(self, request: Request) -> None:
        """An allowance is given once; its end may be put off."""
        if request.given is not None:
            bucket = self.buckets.get(request.allowance) or replace(request.given, payers=Counter())
            self.buckets[request.allowance] = replace(bucket, ends=max(bucket.ends, request.given.ends))

    def new_hold(self, request: Request) -> Hold | Refusal:
        if request.cap is not None:  # a gateway with a late clock counts in the window that others are in
            request = replace(request, cap=request.cap._replace(start=max(request.cap.start, self.window)))
        hold = Hold(request, affords=request.asked)
        calls = [
            (name, bucket)
            for name, bucket in self.drawable(CALLS, request.allowance)
            if not bucket.scope or request.model in bucket.scope
        ]
        if sum(bucket.remaining for _, bucket in calls) > 0:
            first = next(name for name, bucket in calls if bucket.remaining > 0)
            self.buckets[first].remaining -= 1
            hold.unit, hold.draws = CALLS, {first: 1}
            return hold
        hold.affords = min(
            request.asked,
            self.available(request.credit_limit, request.allowance, ()),
            self.headroom(request.cap, 0)[1],
        )
        refusal = self.grow(hold, request.first, 1, request.allowance)
        held = self.held(self.holds.values())
        if refusal and refusal.reason == "insufficient" and sum(b.remaining + held[name] for name, b in calls) > 0:
            others = self.others(hold, request.allowance)
            return Refusal("on_hold", refusal.left, others)
        return refusal or hold

    def others(self, hold: Hold, allowance: str | None) -> int:
        """Nanos that other holds have of what this one may draw."""
        held = self.held(self.holds.values()) - Counter(hold.draws)
        return held[LINE] + sum(held[name] for name, _ in self.drawable(MONEY, allowance))

    def extend(self, rid: str, total: int, least: int) -> int | Refusal:
        if rid not in self.holds:
            return Refusal("unknown")
        hold = self.holds[rid]
        before = hold.held
        if refusal := self.grow(hold, total, least, self.in_force):
            return refusal
        self.count(hold.request, hold.held - before, 0)
        return hold.held

    def grow(self, hold: Hold, total: int, least: int, allowance: str | None) -> Refusal | None:
        """Raise a hold of money to a total, or by all there is where that comes to the least."""
        request, have, all_open = hold.request, hold.held, list(self.holds.values())
        if hold.unit == CALLS or have >= total:
            return None
        available = self.available(request.credit_limit, allowance, all_open)
        if have + available < least:
            balance = sum(bucket.remaining for _, bucket in self.drawable(MONEY, allowance))
            if have + self.available(request.credit_limit, allowance, [hold] if have else []) >= least:
                return Refusal("on_hold", balance, self.others(hold, allowance))
            source = "debt" if balance < 0 else "overage_cap" if request.credit_limit else "balance"
            return Refusal("insufficient", balance, source)
        at_once, potential = self.headroom(request.cap, have)
        if request.cap is not None and have + at_once < least:
            spent, held = self.counted(request.cap, have)
            return Refusal("on_hold", at_once, held) if potential >= least else Refusal("capped", spent)
        amount = min(total - have, available, at_once)
        if amount > 0:
            drawn = self.draw(MONEY, amount, request.credit_limit, allowance)
            hold.draws = self.in_order(Counter(hold.draws) + Counter(drawn))
        return None

    def checkpoint(self, rid: str, used: Counter[str], held: int) -> None:
        if rid in self.holds and used[MONEY] >= self.holds[rid].used[MONEY]:
            self.holds[rid].used, self.holds[rid].reported = used, held

    def settle(self, rid: str, used: Counter[str], held: int, snapshot: Hold | None) -> Charge | Refusal:
        """``held`` and ``snapshot``: what its gateway says that it held, in case the store lost it."""
        if rid in self.holds:
            self.settled[rid] = self.priced(self.close(rid, used, held))
        elif rid in self.expired:
            self.settled[rid] = self.priced(self.settle_late(self.expired.pop(rid), used, held))
        elif rid in self.settled:
            return replace(self.settled[rid], is_repeat=True)
        elif snapshot is None:
            return Refusal("unknown")
        else:
            recovered = self.recover(snapshot, used, held)
            if isinstance(recovered, Refusal):
                return recovered
            self.settled[rid] = self.priced(recovered)
        return self.settled[rid]

    def priced(self, charge: Charge) -> Charge:
        """Each draw says what its bucket was sold for, as it was sold: a refund changes neither number."""
        buckets = {name: self.buckets[name] for name in charge.draws if name != LINE}
        return replace(charge, sales={name: (b.price, b.sold) for name, b in buckets.items() if b.price})

    def close(self, rid: str, used: Counter[str], held: int) -> Charge:
        """Charge at most the hold; the rest goes back to where it came from."""
        hold = self.holds[rid]
        self.grow_again(hold, min(used[MONEY], held))
        del self.holds[rid]
        rest, draws = min(used[hold.unit], hold.held), {}
        for name, amount in hold.draws.items():
            draws[name] = min(amount, rest)
            rest -= draws[name]
            if name == LINE:
                self.exposure += draws[name]
            else:
                self.buckets[name].remaining += amount - draws[name]
        hold.charged = sum(draws.values())
        charged = hold.charged if hold.unit == MONEY else 0
        self.count(hold.request, -hold.held if hold.unit == MONEY else 0, charged)
        self.pay_debts()
        return Charge(charged, {name: amount for name, amount in draws.items() if amount})

    def grow_again(self, hold: Hold, total: int) -> None:
        """What was delivered of an extension that the store lost is drawn, whatever is left."""
        rest = total - hold.held
        if hold.unit == MONEY and rest > 0:
            drawn = self.draw_owed(hold, rest)
            hold.draws = self.in_order(Counter(hold.draws) + Counter(drawn))
            self.count(hold.request, rest, 0)

    def draw_owed(self, hold: Hold, amount: int) -> dict[str, int]:
        names = list(hold.draws)
        only = names[-1] if hold.unit == CALLS else ""
        allowance = (hold.request.allowance or None) if self.in_force is None else self.in_force
        return self.draw(hold.unit, amount, hold.request.credit_limit, allowance, names, only, owes=names[-1])

    def expire(self, rid: str) -> Charge:
        hold = self.holds[rid]
        self.expired[rid] = hold
        return self.priced(self.close(rid, hold.used, hold.reported))

    def settle_late(self, hold: Hold, used: Counter[str], held: int) -> Charge:
        """Charge what the last checkpoint missed, as far as it is available now."""
        if hold.unit == CALLS:
            (only,) = hold.draws
            due = min(1, used[CALLS]) - hold.charged
            return Charge(0, self.draw(CALLS, max(0, due), 0, self.in_force, only=only))
        due = max(0, min(used[MONEY], max(hold.held, held)) - hold.charged)
        return self.charge_now(hold, self.draw(MONEY, due, hold.request.credit_limit, self.in_force))

    def charge_now(self, hold: Hold, draws: dict[str, int]) -> Charge:
        charged = sum(draws.values()) if hold.unit == MONEY else 0
        self.exposure += draws.get(LINE, 0)
        self.count(hold.request, 0, charged)
        self.pay_debts()
        return Charge(charged, draws)

    def recover(self, lost: Hold, used: Counter[str], held: int) -> Charge | Refusal:
        """Charge a hold that the store has lost, whatever is left; what its buckets do not have they owe."""
        due = min(used[MONEY], held) if lost.unit == MONEY else min(1, used[CALLS])
        draws: dict[str, int] = {}
        if due > 0:
            if lost.draws.keys() - self.buckets.keys() - {LINE, lost.request.allowance}:
                return Refusal("unresolved")
            if lost.request.allowance in lost.draws:
                self.put_in_place(lost.request)
            draws = self.draw_owed(lost, due)
        if lost.request.cap is not None:
            self.begin(lost.request.cap)
        return self.charge_now(lost, draws)

    # Movements of credit, each once by its source.

    def fill(self, source: str, bucket: Bucket) -> bool:
        """A grant or an adjustment."""
        if source in self.buckets:
            return False
        self.buckets[source] = replace(bucket, granted=bucket.remaining, sold=bucket.remaining)
        self.take_waiting(source)
        self.pay_debts()
        return True

    def take_waiting(self, granted_by: str) -> None:
        """Clawbacks take in their order, together at most what was granted."""
        bucket = self.buckets[granted_by]
        for clawback in self.clawbacks.values():
            if clawback.granted_by == granted_by and clawback.restored is None:
                taken = max(0, min(clawback.waiting, bucket.granted))
                bucket.remaining, bucket.granted = bucket.remaining - taken, bucket.granted - taken
                clawback.waiting, clawback.taken = clawback.waiting - taken, clawback.taken + taken

    def claw_back(self, source: str, granted_by: str, amount: int) -> int:
        if source not in self.clawbacks:
            self.clawbacks[source] = Clawback(granted_by, amount)
            if granted_by in self.buckets:
                self.take_waiting(granted_by)
                self.pay_debts()
            self.clawbacks[source].reply = self.clawbacks[source].taken
        return self.clawbacks[source].reply

    def restore(self, source: str) -> int | Refusal:
        """Give back what a clawback took: once its bucket owes nothing, first to those who paid its debt."""
        if source not in self.clawbacks:
            return Refusal("unknown")
        clawback = self.clawbacks[source]
        if clawback.restored is None:
            clawback.restored = given = clawback.taken
            if given:
                bucket = self.buckets[clawback.granted_by]
                bucket.remaining, bucket.granted = bucket.remaining + given, bucket.granted + given
                self.give_back(clawback.granted_by, given)
                self.take_waiting(clawback.granted_by)
                self.pay_debts()
        return clawback.restored

    def give_back(self, name: str, amount: int) -> None:
        """Of what came back into a bucket and it does not owe, those who paid its debts get theirs, and so on."""
        payers = self.buckets[name].payers
        for payer in sorted(payers, key=self.rank):
            part = max(0, min(amount, payers[payer], self.buckets[name].remaining))
            if part:
                amount -= part
                self.pay(name, payer, -part)
                self.give_back(payer, part)

    def repay(self, source: str, nanos: int) -> bool:
        is_new = source not in self.repaid
        self.exposure -= min(nanos, self.exposure) if is_new else 0
        self.repaid.add(source)
        return is_new
