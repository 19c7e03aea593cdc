"""The cash book: what was paid, refunded, disputed and kept as a fee, each booked once and never changed.

An entry is dated by its booking, so that a month that is over gets no more entries; Dodo's own time stands beside it.
Amounts that Dodo settles in US dollars are nanos in a report; those of another currency are listed and not added.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from itertools import accumulate, pairwise
from typing import Self, cast

from redis.asyncio import Redis

from billing.commerce.inbox import PurchasedCredit
from billing.dodo.client import Dodo
from billing.dodo.errors import DodoRefused
from billing.dodo.wire import BalanceLine, Dispute, Payment, Refund
from billing.money import NANOS_PER_CENT, Nanos, divide_down, share_of
from billing.store.connection import guarded
from billing.store.guard import BULK_DEADLINE_S
from billing.store.keys import CASH, CASH_BOOKED
from billing.store.scripts import Script
from billing.usage import TenantId

USD = "USD"
READ = 1_000
SLACK_MS = 3 * 24 * 3_600_000
"""Dodo's lines are asked for from so long before the newest that is booked."""

NO_TENANT = TenantId("")
"""In place of a tenant, where an entry is of none."""

log = logging.getLogger("farebox.billing.commerce.cash")


class Kind(StrEnum):
    """What an entry is about."""

    PAYMENT = "payment"
    REFUND = "refund"
    DISPUTE_OPENED = "dispute_opened"
    DISPUTE_WON = "dispute_won"
    """Won, or withdrawn: the money comes back."""
    DISPUTE_LOST = "dispute_lost"
    """Moves nothing: what was disputed is gone since it was opened."""
    FEE = "fee"
    """What Dodo keeps."""
    PAYOUT = "payout"
    OTHER = "other"
    """Another line of Dodo's ledger, such as an adjustment."""


@dataclass(frozen=True, slots=True)
class Fee:
    """What a subscription's fee pays for."""

    subscription_id: str
    period_start_ms: int
    period_end_ms: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the cash book. Amounts are minor units; what leaves us is below zero."""

    id: str
    """The business id that it is booked once by, such as ``payment:pay_1``."""
    kind: Kind
    amount: int
    """In the buyer's currency, tax included."""
    tax: int
    currency: str
    settled: int
    """What it adds to the balance at Dodo, tax included, in ``settled_currency``."""
    settled_tax: int
    settled_currency: str
    at_ms: int
    """Dodo's time."""
    tenant: TenantId = NO_TENANT
    payment_id: str = ""
    what: str = ""
    """Of a payment: ``pack``, ``fee``, ``usage`` and ``foreign``, joined by ``+``; of Dodo's lines: its own word.

    ``explained`` gives refunds and disputes that of their payment.
    """
    parts: Mapping[str, int] | None = None
    """Of a payment in US dollars: nanos without tax by what they paid for."""
    fees: tuple[Fee, ...] = ()
    booked_at_ms: int = 0
    """By the store's clock; 0 before it is booked."""

    @property
    def net_nanos(self) -> Nanos:
        """Without tax. Only of an entry that is settled in US dollars."""
        return Nanos((self.settled - self.settled_tax) * NANOS_PER_CENT)

    @property
    def foreign(self) -> int | None:
        """Of ``settled``, without tax, what was for products that are not ours.

        ``None`` of lines of Dodo's, and where it is not known.
        """
        bought, net = self.what.split("+"), self.settled - self.settled_tax
        if self.kind not in _ABOUT_PAYMENTS or not self.what:
            return None
        if "foreign" not in bought or len(bought) == 1:
            return net if "foreign" in bought else 0
        # Its list prices leave that to a foreign product. A discount makes it less, and may take all of it.
        part = divide_down((self.parts or {}).get("foreign", 0), NANOS_PER_CENT)
        return part if 0 < part * (1 if net > 0 else -1) <= abs(net) else None

    @property
    def ours(self) -> int | None:
        """The rest of it: what was for packs, fees and usage of ours."""
        return None if self.foreign is None else self.settled - self.settled_tax - self.foreign

    def to_json(self) -> str:
        raw = asdict(self)
        del raw["booked_at_ms"]
        return json.dumps({name: value for name, value in raw.items() if value or isinstance(value, int)})

    @classmethod
    def from_json(cls, text: str, booked_at_ms: int) -> Self:
        raw = json.loads(text)
        fees = tuple(Fee(**one) for one in raw.pop("fees", ()))
        return cls(**{**raw, "kind": Kind(raw["kind"]), "fees": fees, "booked_at_ms": booked_at_ms})


class CashBook:
    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._book = Script(redis, "commerce/book")

    async def book(self, entry: Entry) -> bool:
        """Add an entry; False where its id was booked before."""
        async with guarded(BULK_DEADLINE_S):
            is_new = await self._book.number(
                keys={"book": CASH, "booked": CASH_BOOKED}, args={"id": entry.id, "entry": entry.to_json()}
            )
        return bool(is_new)

    async def until(self, end_ms: int) -> list[Entry]:
        """Everything that was booked before then, in the order of booking."""
        found: list[Entry] = []
        start, end = "-", f"({end_ms}-0"
        while end_ms > 0:
            async with guarded(BULK_DEADLINE_S):
                raw = await self._redis.xrange(CASH, min=start, max=end, count=READ)
            rows = cast(Sequence[tuple[str, Mapping[str, str]]], raw)
            found += [Entry.from_json(fields["e"], _ms(id_)) for id_, fields in rows]
            if len(rows) < READ:
                break
            start = f"({rows[-1][0]}"
        return found

    async def book_lines(self, dodo: Dodo) -> int:
        """Book the fees and payouts of Dodo's own ledger that are not booked yet. How many were new.

        Raises:
            DodoUnavailable: the rest is read the next time.
        """
        since = await self._newest_line_ms()
        try:
            lines = await dodo.balance_lines(max(0, since - SLACK_MS))
        except DodoRefused as refused:  # a key without the right to it: fees stay unknown
            log.info("Dodo does not show its ledger: %s", refused)
            return 0
        entries = [line_entry(line) for line in sorted(lines, key=lambda line: (line.at_ms, line.id))]
        return sum([await self.book(entry) for entry in entries if entry is not None])

    async def _newest_line_ms(self) -> int:
        """Dodo's time of the line that was booked last; 0 where none was."""
        end = "+"
        while True:
            async with guarded(BULK_DEADLINE_S):
                raw = await self._redis.xrevrange(CASH, max=end, count=READ)
            rows = cast(Sequence[tuple[str, Mapping[str, str]]], raw)
            for id_, fields in rows:
                if fields["id"].startswith(LINE):
                    return Entry.from_json(fields["e"], _ms(id_)).at_ms
            if len(rows) < READ:
                return 0
            end = f"({rows[-1][0]}"


def explained(entries: Sequence[Entry]) -> list[Entry]:
    """The same, of which refunds and disputes say what their payment was for, wherever that stands among them.

    Of a cart with foreign products only a refund of all of it says how much was for those.
    """
    payments = {entry.payment_id: entry for entry in entries if entry.kind is Kind.PAYMENT}
    return [_explained(entry, payments.get(entry.payment_id)) for entry in entries]


def _explained(entry: Entry, payment: Entry | None) -> Entry:
    if payment is None or entry.what or entry.kind not in _ABOUT_PAYMENTS:
        return entry
    sign = {-payment.settled: -1, payment.settled: 1}.get(entry.settled)
    parts = None if sign is None or payment.parts is None else {k: sign * v for k, v in payment.parts.items()}
    return replace(entry, what=payment.what, parts=parts)


_ABOUT_PAYMENTS = (Kind.PAYMENT, Kind.REFUND, Kind.DISPUTE_OPENED, Kind.DISPUTE_WON, Kind.DISPUTE_LOST)
LINE = "dodo:"
"""Begins the id of an entry that was read from Dodo's own ledger."""
_FROM_WEBHOOKS = ("payment", "refund", "refund_reversal", "dispute", "dispute_reversal", "tax", "tax_reversal")
"""Lines of Dodo's ledger that are booked from webhooks, with what they were for."""
_PAYOUTS = ("payout", "payout_reversal")


def payment_entry(
    payment: Payment,
    tenant: TenantId,
    credits_: Sequence[PurchasedCredit] = (),
    fees: Sequence[tuple[Fee, Nanos]] = (),
    usage_cents: int = 0,
    is_foreign: bool = False,
) -> Entry:
    """A payment that succeeded. ``fees``: each with its list price; ``is_foreign``: it is for other products, too."""
    prices = {
        "pack": sum(credit.price for credit in credits_),
        "fee": sum(price for _, price in fees),
        "usage": usage_cents * NANOS_PER_CENT,
    }
    bought = {"pack": bool(credits_), "fee": bool(fees), "usage": usage_cents > 0, "foreign": is_foreign}
    what = [name for name, is_bought in bought.items() if is_bought]
    made = Entry(
        id=f"payment:{payment.id}", kind=Kind.PAYMENT, amount=payment.total_amount, tax=payment.tax,
        currency=payment.currency, settled=payment.settled_amount, settled_tax=payment.settled_tax,
        settled_currency=payment.settled_currency, at_ms=payment.created_at_ms or 0, tenant=tenant,
        payment_id=payment.id, what="+".join(what), fees=tuple(fee for fee, _ in fees),
    )  # fmt: skip
    if made.settled_currency != USD or not what:
        return made
    # What the list prices leave is the last one's: a foreign product's price and a changed plan's are not known here.
    parts = {name: prices[name] for name in what if name in prices}
    last = "foreign" if is_foreign else "fee" if fees else "discount"
    parts[last] = parts.get(last, 0) + made.net_nanos - sum(parts.values())
    return replace(made, parts={name: nanos for name, nanos in parts.items() if nanos})


def net_nanos(payment: Payment) -> Nanos:
    """What a payment brought without tax; 0 where Dodo does not settle it in US dollars."""
    cents = payment.settled_amount - payment.settled_tax if payment.settled_currency == USD else 0
    return Nanos(max(0, cents) * NANOS_PER_CENT)


def sold_for(payment: Payment, packs: Sequence[PurchasedCredit]) -> list[PurchasedCredit]:
    """The packs that are all of a payment, priced at what was paid for each without tax: its share by list price.

    They keep their list prices where Dodo does not settle it in US dollars. A nano is the least, since 0 says nothing.
    """
    whole, listed = net_nanos(payment), sum(pack.price for pack in packs)
    if payment.settled_currency != USD or not listed:
        return list(packs)
    ends = [divide_down(whole * upto, listed) for upto in accumulate(pack.price for pack in packs)]
    prices = [end - start for start, end in pairwise([0, *ends])]
    return [replace(pack, price=max(1, price)) for pack, price in zip(packs, prices, strict=True)]


def refund_entry(refund: Refund, payment: Payment, tenant: TenantId, what: str = "") -> Entry:
    """``what``: the one thing of the payment that was refunded; empty where that is a share of all, or not known."""
    amount = payment.total_amount if refund.amount is None else min(max(refund.amount, 0), payment.total_amount)
    made = _taken(f"refund:{refund.id}", Kind.REFUND, payment, tenant, amount, refund.created_at_ms, -1)
    return replace(made, what=what)


def dispute_entry(dispute: Dispute, payment: Payment, tenant: TenantId, kind: Kind) -> Entry:
    """``kind``: opened, won or lost, each of which is booked once."""
    amount = payment.total_amount if dispute.amount is None else min(max(dispute.amount, 0), payment.total_amount)
    sign = {Kind.DISPUTE_OPENED: -1, Kind.DISPUTE_WON: 1}.get(kind, 0)
    return _taken(f"{kind.value}:{dispute.id}", kind, payment, tenant, amount, dispute.created_at_ms, sign)


def _taken(
    id_: str, kind: Kind, payment: Payment, tenant: TenantId, amount: int, at_ms: int | None, sign: int
) -> Entry:
    """The share of a payment that ``amount`` of its minor units is, which goes or comes back."""

    def share(whole: int) -> int:
        return sign * share_of(whole, amount, payment.total_amount)

    return Entry(
        id=id_, kind=kind, amount=sign * amount, tax=share(payment.tax), currency=payment.currency,
        settled=share(payment.settled_amount), settled_tax=share(payment.settled_tax),
        settled_currency=payment.settled_currency, at_ms=at_ms or 0, tenant=tenant, payment_id=payment.id,
    )  # fmt: skip


def line_entry(line: BalanceLine) -> Entry | None:
    """A line of Dodo's ledger; ``None`` for one that is booked from a webhook."""
    if line.kind in _FROM_WEBHOOKS:
        return None
    kind = Kind.PAYOUT if line.kind in _PAYOUTS else Kind.FEE if "fee" in line.kind else Kind.OTHER
    cents = line.usd_cents if line.is_credit else -line.usd_cents
    amount = line.amount if line.is_credit else -line.amount
    return Entry(
        id=f"{LINE}{line.id}", kind=kind, amount=amount, tax=0, currency=line.currency, settled=cents, settled_tax=0,
        settled_currency=USD, at_ms=line.at_ms, payment_id=line.reference_id, what=line.kind,
    )  # fmt: skip


def in_usd(entries: Iterable[Entry]) -> list[Entry]:
    """Those that a report in US dollars can add up."""
    return [entry for entry in entries if entry.settled_currency == USD]


def _ms(entry_id: str) -> int:
    return int(entry_id.partition("-")[0])
