"""Month by month: what came in, what of it was earned, and what is still owed as credit.

A fold: the journal and the cash book are read from their beginning, in order, and both only grow at their end.
So a month that is over is the same whenever it is asked for, whatever was changed since.

Credit that was sold is deferred revenue until it is used or expires. What is left of it is worth its share of the
price, rounded down, and a draw earns the difference that it makes: in the end exactly the price was earned.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from typing import cast

from redis.asyncio import Redis

from billing.clock import month_of, unix_ms
from billing.commerce.cash import USD, CashBook, Entry, Kind
from billing.ledger.journal import Entry as JournalEntry
from billing.ledger.journal import order
from billing.money import NANOS_PER_CENT, divide_down, share_of
from billing.pricing.costs import PERCENT, Costs
from billing.reports.history import journal_until
from billing.reports.report import cost_of
from billing.reports.worth import Worth
from billing.store.keys import ALL_SHARDS
from billing.usage import OVERAGE, BucketId, Draw, TenantId, Unit, UsageRecord

DAY_MS = 24 * 3_600_000
NEVER = 2**63


@dataclass(frozen=True, slots=True)
class Month:
    """One line of the statement: a calendar month in UTC, or the part of it that was asked for. Amounts are nanos."""

    name: str
    """``2026-11``, or ``2026-11-03 to 2026-11-30`` for a part of it."""
    # What came in, from the cash book.
    paid: int
    """Payments, tax included."""
    tax: int
    """Of payments, less that of what was refunded or disputed: Dodo pays it to the state."""
    refunds: int
    """Tax included."""
    disputes: int
    """Disputed payments, less those that were won; tax included."""
    fees: int
    """What Dodo kept, as far as it says."""
    paid_out: int
    # What was earned, from the journal.
    prepaid: int
    """Use of packs."""
    allowance: int
    """Use of what subscriptions include."""
    postpaid: int
    """Use on credit, which is invoiced later."""
    expired: int
    """Credit that was sold and ended unused, in packs and in periods of subscriptions."""
    given: int
    """Use of credit that was given away, at list price. Not earned."""
    # What there is at the end.
    deferred: int
    """Sold, not yet used, not expired."""
    unpaid: int
    """Postpaid use that no payment has covered."""
    differences: int
    """What cash has of what was sold, less what it would be at list prices: discounts, other products, cents."""
    cost: int | None
    """Of compute; ``None`` where it is not known of all of it."""

    @property
    def earned(self) -> int:
        return self.prepaid + self.allowance + self.postpaid + self.expired

    @property
    def net(self) -> int:
        """What the month added to the balance at Dodo, before payouts."""
        return self.paid - self.tax - self.refunds - self.disputes - self.fees

    @property
    def margin_percent(self) -> int | None:
        """What is left of what was earned when compute and fees are paid, rounded down."""
        if self.cost is None or self.earned <= 0:
            return None
        return (self.earned - self.cost - self.fees) * PERCENT // self.earned


@dataclass
class _Bucket:
    """Credit of one sale. ``left`` units of what was sold are not drawn or taken back."""

    price: int
    sold: int
    left: int
    ends_ms: int
    is_over: bool = False

    @property
    def worth(self) -> int:
        return divide_down(self.left * self.price, self.sold)

    def take(self, units: int) -> int:
        """What it is worth less without these units."""
        before = self.worth
        self.left -= units
        return before - self.worth


@dataclass
class _Period:
    """One paid period of a subscription: what of its fee is not used yet."""

    left: int = 0
    ends_ms: int = 0
    """0 until its fee is booked."""
    is_over: bool = False


@dataclass
class _Books:
    """One tenant's sales, and the payments that its refunds and disputes may be of."""

    buckets: dict[BucketId, _Bucket] = field(default_factory=dict)
    allowances: dict[BucketId, _Bucket] = field(default_factory=dict)
    periods: defaultdict[str, _Period] = field(default_factory=lambda: defaultdict(_Period))
    """By the beginning of the names of the period's allowances: subscription and start."""
    payments: dict[str, Entry] = field(default_factory=dict)
    early: defaultdict[str, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    """By payment, its refunds and disputes that were booked before it, as when a webhook overtakes another."""
    next_end_ms: int = NEVER
    """When the next of what was sold may be over."""


class Statement:
    """Adds up entries of the journal and of the cash book, each tenant's in the order of time."""

    def __init__(self, worth: Worth, costs: Costs | None = None) -> None:
        """``costs`` values all compute, in place of what the catalogs of then say."""
        self._worth, self._costs = worth, costs
        self._sums: defaultdict[int, Counter[str]] = defaultdict(Counter)
        """By day in UTC since 1970: what is earned may be shown of any days."""
        self._compute: defaultdict[int, Counter[Costs | None]] = defaultdict(Counter)
        self._books: defaultdict[TenantId, _Books] = defaultdict(_Books)
        self._left_out: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self.first_ms: dict[TenantId, int] = {}
        """When each tenant's first entry of the journal was written."""

    def add(self, entry: JournalEntry) -> None:
        """Raises UnreadableEntry."""
        at_ms, books = order(entry.id)[0], self._books[entry.tenant]
        self.first_ms.setdefault(entry.tenant, at_ms)
        self._end_what_is_over(books, at_ms)
        if entry.is_usage:
            self._use(books, entry.record(), at_ms)
            return
        moved = entry.movement()
        bucket, amount = BucketId(str(moved["bucket"])), int(str(moved["amount"]))
        if entry.kind == "grant":
            self._sell(books, bucket, amount, at_ms, moved)
        elif entry.kind in ("clawback", "restore"):
            self._take_back(books, bucket, amount if entry.kind == "clawback" else -amount, at_ms)
        elif entry.kind == "repay":
            self._count(at_ms, "unpaid", -amount)
        for row in cast(Sequence[Mapping[str, str | int]], moved.get("paid", ())):
            self._draw_bucket(books, BucketId(str(row["bucket"])), int(row["amount"]), at_ms)
            self._draw_bucket(books, BucketId(str(row["debt"])), -int(row["amount"]), at_ms)

    def add_cash(self, entry: Entry) -> None:
        if entry.settled_currency != USD:
            self._left_out[entry.booked_at_ms // DAY_MS][entry.settled_currency] += 1
            return
        at_ms, books = entry.booked_at_ms, self._books[entry.tenant]
        self._end_what_is_over(books, at_ms)
        whole, tax = (NANOS_PER_CENT * cents for cents in (entry.settled, entry.settled_tax))
        columns = {
            Kind.PAYMENT: "paid", Kind.REFUND: "refunds", Kind.DISPUTE_OPENED: "disputes",
            Kind.DISPUTE_WON: "disputes", Kind.FEE: "fees", Kind.PAYOUT: "paid_out",
        }  # fmt: skip
        if entry.kind not in columns:
            return
        self._count(at_ms, columns[entry.kind], whole if entry.kind is Kind.PAYMENT else -whole)
        self._count(at_ms, "tax", tax)
        if entry.kind is Kind.PAYMENT:
            books.payments[entry.payment_id] = entry
            self._sell_fees(books, entry, at_ms)
            for taken in books.early.pop(entry.payment_id, ()):
                self._take_fee_back(books, taken, at_ms)
        elif entry.kind in (Kind.REFUND, Kind.DISPUTE_OPENED, Kind.DISPUTE_WON):
            self._take_fee_back(books, entry, at_ms)

    def end(self, end_ms: int) -> None:
        """Everything until ``end_ms`` was added: what expires before then has expired."""
        for books in self._books.values():
            self._end_what_is_over(books, end_ms - 1)

    def months(self, start_ms: int, end_ms: int) -> list[Month]:
        """One line for each calendar month of whole days in UTC."""
        return [self._month(first, last) for first, last in _parts(start_ms // DAY_MS, -(-end_ms // DAY_MS))]

    def left_out(self, start_ms: int, end_ms: int) -> dict[str, int]:
        """Entries of the cash book in no sum, by the currency in which Dodo settles them."""
        sums = Counter[str]()
        for day, counted in self._left_out.items():
            if start_ms <= day * DAY_MS < end_ms:
                sums.update(counted)
        return dict(sorted(sums.items()))

    # The course of credit that was sold.

    def _sell(self, books: _Books, bucket: BucketId, amount: int, at_ms: int, moved: Mapping[str, object]) -> None:
        price, ends_ms = int(str(moved.get("price", 0))), int(str(moved.get("expires_at_ms", 0)))
        if not price:
            price, ends_ms = self._worth.of_grant(str(moved["source"]), amount, at_ms)
        if price:
            ends_ms = max(ends_ms, at_ms) if ends_ms else 0  # what comes late is not over before it came
            books.buckets[bucket] = _Bucket(price, amount, amount, ends_ms)
            books.next_end_ms = min(books.next_end_ms, ends_ms or NEVER)
            self._count(at_ms, "deferred", price)

    def _use(self, books: _Books, record: UsageRecord, at_ms: int) -> None:
        costs = self._costs or self._worth.history.at(at_ms).costs
        self._compute[at_ms // DAY_MS][costs] += record.usage.compute_ms
        for draw in record.draws:
            if draw.bucket == OVERAGE:
                self._count(at_ms, "postpaid", draw.amount)
                self._count(at_ms, "unpaid", draw.amount)
            elif draw.bucket in books.buckets:
                self._draw_bucket(books, draw.bucket, draw.amount, at_ms)
            elif not (earned := self._worth.of_draw(draw, record)):
                self._count(at_ms, "given", draw.amount if draw.unit is Unit.NANOS else record.list_nanos)
            elif draw.bucket.startswith("allowance:"):
                self._draw_period(books, draw, earned, at_ms)
            else:
                self._count(at_ms, "prepaid", earned)

    def _draw_bucket(self, books: _Books, name: BucketId, units: int, at_ms: int) -> None:
        bucket = books.buckets.get(name)
        if bucket is not None:
            earned = bucket.take(units)
            self._count(at_ms, "prepaid", earned)
            self._count(at_ms, "expired" if bucket.is_over else "deferred", -earned)

    def _take_back(self, books: _Books, name: BucketId, units: int, at_ms: int) -> None:
        bucket = books.buckets.get(name)
        if bucket is not None:
            self._count(at_ms, "expired" if bucket.is_over else "deferred", -bucket.take(units))

    def _draw_period(self, books: _Books, draw: Draw, earned: int, at_ms: int) -> None:
        """Without a booked fee the use is earned, and what is booked later is that much less to be earned."""
        if draw.price:
            fresh = _Bucket(draw.price, draw.sold, draw.sold, 0)
            earned = books.allowances.setdefault(draw.bucket, fresh).take(draw.amount)
        period = books.periods[":".join(draw.bucket.split(":")[1:3])]
        period.left -= earned
        self._count(at_ms, "allowance", earned)
        if period.ends_ms:
            self._count(at_ms, "expired" if period.is_over else "deferred", -earned)

    def _sell_fees(self, books: _Books, entry: Entry, at_ms: int) -> None:
        whole, count = (entry.parts or {}).get("fee", 0), len(entry.fees)
        for number, fee in enumerate(entry.fees):
            part = divide_down(whole * (number + 1), count) - divide_down(whole * number, count)
            period = books.periods[f"{fee.subscription_id}:{fee.period_start_ms}"]
            if not period.ends_ms:
                period.ends_ms = max(fee.period_end_ms, at_ms)  # a fee that is booked late is earned when it is booked
                books.next_end_ms = min(books.next_end_ms, period.ends_ms)
                self._count(at_ms, "deferred", period.left)
            period.left += part
            self._count(at_ms, "expired" if period.is_over else "deferred", part)

    def _take_fee_back(self, books: _Books, entry: Entry, at_ms: int) -> None:
        payment = books.payments.get(entry.payment_id)
        if payment is None:
            books.early[entry.payment_id].append(entry)
            return
        if not payment.fees or not payment.net_nanos:
            return
        sign, net = (1, entry.net_nanos) if entry.net_nanos >= 0 else (-1, -entry.net_nanos)
        fee = (payment.parts or {}).get("fee", 0)
        part = sign * share_of(max(0, fee), min(net, payment.net_nanos), payment.net_nanos)
        if entry.what:  # that alone was refunded
            part = sign * net if entry.what == "fee" else 0
        first = payment.fees[0]
        period = books.periods[f"{first.subscription_id}:{first.period_start_ms}"]
        period.left += part
        self._count(at_ms, "expired" if period.is_over else "deferred", part)

    def _end_what_is_over(self, books: _Books, now_ms: int) -> None:
        """What has ended since is earned on the day of its end."""
        if now_ms < books.next_end_ms:
            return
        for bucket in books.buckets.values():
            if not bucket.is_over and 0 < bucket.ends_ms <= now_ms:
                bucket.is_over = True
                self._expire(bucket.ends_ms, bucket.worth)
        for period in books.periods.values():
            if not period.is_over and 0 < period.ends_ms <= now_ms:
                period.is_over = True
                self._expire(period.ends_ms, period.left)
        ends = [one.ends_ms for one in books.buckets.values() if not one.is_over]
        ends += [one.ends_ms for one in books.periods.values() if not one.is_over]
        books.next_end_ms = min((end for end in ends if end), default=NEVER)

    def _expire(self, at_ms: int, nanos: int) -> None:
        self._count(at_ms, "expired", nanos)
        self._count(at_ms, "deferred", -nanos)

    def _count(self, at_ms: int, column: str, nanos: int) -> None:
        self._sums[at_ms // DAY_MS][column] += nanos

    # Lines.

    def _month(self, first: int, last: int) -> Month:
        """``first`` and ``last`` day, both included."""
        sums, until, compute = Counter[str](), Counter[str](), Counter[Costs | None]()
        for day, counted in self._sums.items():
            if day <= last:
                _add(until, counted)
            if first <= day <= last:
                _add(sums, counted)
                compute.update(self._compute.get(day, {}))
        cost = cost_of(compute)
        names = ("paid", "tax", "refunds", "disputes", "fees", "paid_out")
        earned = ("prepaid", "allowance", "postpaid", "expired")
        came_in = sums["paid"] - sums["tax"] - sums["refunds"] - sums["disputes"]
        explained = sum(sums[name] for name in earned) + sums["deferred"] - sums["unpaid"]
        return Month(
            name=_name(first, last),
            **{name: sums[name] for name in (*names, *earned, "given")},
            deferred=until["deferred"],
            unpaid=until["unpaid"],
            differences=came_in - explained,
            cost=cost,
        )


def _add(to: Counter[str], more: Counter[str]) -> None:
    for name, nanos in more.items():
        to[name] += nanos


def _parts(first: int, end: int) -> Iterable[tuple[int, int]]:
    """First and last day of each calendar month, cut to the days from ``first`` until before ``end``."""
    while first < end:
        after = min(end, unix_ms(month_of(first * DAY_MS)[1]) // DAY_MS)
        yield first, after - 1
        first = after


def _name(first: int, last: int) -> str:
    start, after = month_of(first * DAY_MS)
    if (unix_ms(start) // DAY_MS, unix_ms(after) // DAY_MS) == (first, last + 1):
        return f"{start:%Y-%m}"
    return " to ".join(f"{datetime.fromtimestamp(day * DAY_MS // 1_000, UTC):%Y-%m-%d}" for day in (first, last))


async def read_statement(redis: Redis, worth: Worth, costs: Costs | None, end_ms: int) -> Statement:
    """Add up everything that was written before ``end_ms``.

    Raises:
        ArchiveUnavailable: the archive cannot be read from here.
        UnreadableEntry: an entry is not one of ours.
    """
    statement, waiting = Statement(worth, costs), defaultdict[TenantId, deque[Entry]](deque)
    for booked in await CashBook(redis).until(end_ms):
        waiting[booked.tenant].append(booked)
    for shard in ALL_SHARDS:
        async for entry in journal_until(redis, shard, end_ms):
            cash = waiting[entry.tenant]
            while cash and cash[0].booked_at_ms <= order(entry.id)[0]:
                statement.add_cash(cash.popleft())
            statement.add(entry)
    for booked in chain(*waiting.values()):
        statement.add_cash(booked)
    statement.end(end_ms)
    return statement
