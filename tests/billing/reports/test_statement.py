"""Month by month, worked out by hand: credit is owed until it is used or expires, and the past stays as it was."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from billing.commerce.cash import Entry, Fee, Kind
from billing.ledger.journal import Entry as JournalEntry
from billing.reports.statement import Month, Statement
from billing.usage import OVERAGE, BucketId, Draw, TenantId, Unit
from tests.support.reports import USD, WORTH, record

ACME = TenantId("acme")
CENTS = 10_000_000


def at(day: str) -> int:
    return int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()) * 1_000


OCTOBER, JANUARY = at("2026-10-01"), at("2027-01-01")


def moved(day: str, kind: str, bucket: str, amount: int, **more: object) -> JournalEntry:
    payload = {"source": bucket, "unit": "nanos", "amount": amount, "bucket": bucket, "seq": 1} | more
    return JournalEntry(f"{at(day)}-0", kind, ACME, json.dumps(payload))


def sold(day: str, amount: int, price: int, ends: str = "", bucket: str = "payment:1") -> JournalEntry:
    return moved(day, "grant", bucket, amount, price=price, expires_at_ms=at(ends) if ends else 0)


def used(day: str, *draws: Draw, **changes: object) -> JournalEntry:
    made = record("", 0, draws=draws, occurred_at_ms=at(day), **changes)
    return JournalEntry(f"{at(day)}-0", "usage", ACME, made.to_json())


def draw(amount: int, price: int = 0, sold: int = 0, bucket: str = "payment:1", unit: Unit = Unit.NANOS) -> Draw:
    return Draw(BucketId(bucket), unit, amount, price, sold)


def cash(day: str, kind: Kind, settled: int, tax: int = 0, **more: object) -> Entry:
    made = Entry(f"{kind}:{day}", kind, settled, tax, "USD", settled, tax, "USD", at(day), ACME, booked_at_ms=at(day))
    return replace(made, **more)  # type: ignore[arg-type]


def fee(day: str, dollars: int, start: str, end: str, payment: str = "pay_1") -> Entry:
    paid = cash(day, Kind.PAYMENT, dollars * 100, payment_id=payment, what="fee", parts={"fee": dollars * USD})
    return replace(paid, fees=(Fee("sub_1", at(start), at(end)),))


def months(*entries: JournalEntry | Entry, until: int = JANUARY) -> list[Month]:
    """October to December, of what was written before ``until``."""
    statement = Statement(WORTH)
    for one in entries:
        if isinstance(one, Entry):
            statement.add_cash(one)
        else:
            statement.add(one)
    statement.end(until)
    return statement.months(OCTOBER, JANUARY)


def column(found: Sequence[Month], *names: str) -> list[tuple[int, ...]]:
    return [tuple(getattr(month, name) for name in names) for month in found]


def test_pack_is_owed_until_it_is_used() -> None:
    """$50 for 55 units: 22 are used in October, 11 in December."""
    found = months(sold("2026-10-02", 55, 50 * USD), used("2026-10-03", draw(22)), used("2026-12-31", draw(11)))
    assert column(found, "prepaid", "deferred") == [(20 * USD, 30 * USD), (0, 30 * USD), (10 * USD, 20 * USD)]
    assert [one.name for one in found] == ["2026-10", "2026-11", "2026-12"]


def test_what_is_left_of_a_pack_is_earned_when_it_expires() -> None:
    found = months(sold("2026-10-02", 10, 100, "2026-11-15"), used("2026-10-03", draw(3)))
    assert column(found, "prepaid", "expired", "deferred") == [(30, 0, 70), (0, 70, 0), (0, 0, 0)]


def test_pack_that_has_not_expired_yet_is_owed() -> None:
    found = months(sold("2026-10-02", 10, 100, "2026-11-15"), until=at("2026-11-14"))
    assert column(found, "expired", "deferred") == [(0, 100), (0, 100), (0, 100)]


def test_parts_that_do_not_divide_add_up_to_the_price() -> None:
    """A price of 100 for 7 units: each is worth 14 or 15, all of them 100."""
    uses = [used("2026-10-03", draw(1)) for _ in range(7)]
    found = months(sold("2026-10-02", 7, 100), *uses)
    assert column(found[:1], "prepaid", "deferred") == [(100, 0)]


def test_price_of_more_digits_than_a_double_has_is_exact() -> None:
    found = months(sold("2026-10-02", 3, 10**18 + 2), used("2026-10-03", draw(1)))
    assert column(found[:1], "prepaid", "deferred") == [(333_333_333_333_333_334, 666_666_666_666_666_668)]


def test_refund_takes_what_is_owed_and_a_won_dispute_gives_it_back() -> None:
    entries = (
        sold("2026-10-02", 10, 100),
        moved("2026-10-05", "clawback", "payment:1", 4),
        moved("2026-11-05", "restore", "payment:1", 4),
        used("2026-12-05", draw(10)),
    )
    assert column(months(*entries), "prepaid", "deferred") == [(0, 60), (0, 100), (100, 0)]


def test_refund_of_expired_credit_is_earned_no_more() -> None:
    entries = (sold("2026-10-02", 10, 100, "2026-10-20"), moved("2026-11-05", "clawback", "payment:1", 10))
    assert column(months(*entries), "expired", "deferred") == [(100, 0), (-100, 0), (0, 0)]


def test_hold_that_outlives_its_pack_was_use_and_no_expiry() -> None:
    entries = (sold("2026-10-02", 10, 100, "2026-10-20"), used("2026-11-01", draw(4)))
    assert column(months(*entries), "prepaid", "expired") == [(0, 100), (40, -40), (0, 0)]


def test_debt_that_another_pack_pays_is_earned_from_that() -> None:
    """10 units for 100 are used and refunded; then 20 units for 400 pay the 10 that are owed."""
    paid = [{"bucket": "payment:2", "debt": "payment:1", "amount": 10}]
    entries = (
        sold("2026-10-02", 10, 100),
        used("2026-10-03", draw(10)),
        moved("2026-10-04", "clawback", "payment:1", 10),
        moved("2026-11-01", "grant", "payment:2", 20, price=400, paid=paid),
    )
    assert column(months(*entries), "prepaid", "deferred") == [(100, -100), (100, 200), (0, 200)]


def test_fee_is_owed_until_its_period_is_used_or_over() -> None:
    """$20 for 10 units from mid-October: 3 are used then, 2 in November, the rest ends with the period."""
    bucket = f"allowance:sub_1:{at('2026-10-15')}:pro"
    some = (draw(units, 20 * USD, 10, bucket) for units in (3, 2))
    entries = (
        fee("2026-10-15", 20, "2026-10-15", "2026-11-15"),
        used("2026-10-20", next(some)),
        used("2026-11-02", next(some)),
    )
    assert column(months(*entries), "allowance", "expired", "deferred", "differences") == [
        (6 * USD, 0, 14 * USD, 0),
        (4 * USD, 10 * USD, 0, 0),
        (0, 0, 0, 0),
    ]


def test_period_that_nobody_used_is_earned_at_its_end() -> None:
    found = months(fee("2026-10-15", 20, "2026-10-15", "2026-11-15"))
    assert column(found, "expired", "deferred") == [(0, 20 * USD), (20 * USD, 0), (0, 0)]


@pytest.mark.parametrize(("booked", "over"), [("2026-11-02", 1), ("2026-12-02", 2)])
def test_fee_that_is_booked_late_changes_no_month_before(booked: str, over: int) -> None:
    """Its use in October stays earned there, whether the fee comes within its period or after it."""
    some = draw(3, 20 * USD, 10, f"allowance:sub_1:{at('2026-10-15')}:pro")
    alone = months(used("2026-10-20", some))
    found = months(used("2026-10-20", some), fee(booked, 20, "2026-10-15", "2026-11-15"))
    assert found[:over] == alone[:over]
    assert sum(month.earned for month in found) == 20 * USD
    assert found[-1].deferred == 0


def test_refunded_fee_is_owed_no_more() -> None:
    refund = cash("2026-10-20", Kind.REFUND, -2000, payment_id="pay_1")
    found = months(fee("2026-10-15", 20, "2026-10-15", "2026-11-15"), refund)
    assert column(found[:2], "expired", "deferred", "refunds", "differences") == [(0, 0, 20 * USD, 0), (0, 0, 0, 0)]


@pytest.mark.parametrize("refunded", ["2026-10-14", "2026-09-30"])
def test_fee_whose_refund_is_booked_before_it_is_not_owed(refunded: str) -> None:
    refund = cash(refunded, Kind.REFUND, -2000, payment_id="pay_1")
    found = months(refund, fee("2026-10-15", 20, "2026-10-15", "2026-11-15"))
    assert column(found, "expired", "deferred") == [(0, 0)] * 3


def test_dispute_that_is_won_before_its_fee_is_booked_leaves_the_fee_owed() -> None:
    opened = cash("2026-10-02", Kind.DISPUTE_OPENED, -2000, payment_id="pay_1")
    won = cash("2026-10-03", Kind.DISPUTE_WON, 2000, payment_id="pay_1")
    found = months(opened, won, fee("2026-10-15", 20, "2026-10-15", "2026-11-15"))
    assert column(found, "expired", "deferred", "differences") == [(0, 20 * USD, 0), (20 * USD, 0, 0), (0, 0, 0)]


def test_postpaid_use_is_earned_when_it_is_used_and_unpaid_until_it_is_repaid() -> None:
    found = months(used("2026-10-03", draw(90, bucket=OVERAGE)), moved("2026-11-01", "repay", OVERAGE, 60))
    assert column(found, "postpaid", "unpaid") == [(90, 90), (0, 30), (0, 30)]


def test_gift_is_given_at_list_price_and_not_earned() -> None:
    entries = (
        moved("2026-10-01", "grant", "operator:gift", 50),
        used("2026-10-03", draw(7, bucket="operator:gift")),
        used("2026-10-04", draw(1, bucket="operator:calls", unit=Unit.REQUESTS), list_nanos=5),
    )
    assert column(months(*entries)[:1], "given", "earned", "deferred") == [(12, 0, 0)]


def test_credit_sold_before_prices_were_kept_is_worth_what_the_catalog_of_then_says() -> None:
    """55 dollars of the bonus pack for 50; its entry and draws say no price."""
    pack = "payment:pay_1:pdt_bonus"
    found = months(moved("2026-10-02", "grant", pack, 55 * USD), used("2026-11-03", draw(11 * USD, bucket=pack)))
    assert column(found, "prepaid", "deferred") == [(0, 50 * USD), (10 * USD, 40 * USD), (0, 40 * USD)]


def test_cash_is_added_in_dollars_and_other_currencies_are_not() -> None:
    entries = (
        cash("2026-10-02", Kind.PAYMENT, 1190, 190),
        cash("2026-10-02", Kind.FEE, -88),
        cash("2026-10-03", Kind.REFUND, -238, -38),
        cash("2026-10-04", Kind.DISPUTE_OPENED, -119, -19),
        cash("2026-11-04", Kind.DISPUTE_WON, 119, 19),
        cash("2026-11-05", Kind.PAYOUT, -500),
        cash("2026-10-06", Kind.PAYMENT, 900, settled_currency="EUR"),
    )
    names = ("paid", "tax", "refunds", "disputes", "fees", "net", "paid_out")
    assert column(months(*entries)[:2], *names) == [
        tuple(cents * CENTS for cents in (1190, 133, 238, 119, 88, 612, 0)),
        tuple(cents * CENTS for cents in (0, 19, 0, -119, 0, 100, 500)),
    ]


def test_part_of_a_month_is_named_by_its_days() -> None:
    statement = Statement(WORTH)
    statement.add(used("2026-10-31", draw(5, bucket=OVERAGE)))
    found = statement.months(at("2026-10-31"), at("2026-11-02"))
    assert [(one.name, one.postpaid) for one in found] == [
        ("2026-10-31 to 2026-10-31", 5),
        ("2026-11-01 to 2026-11-01", 0),
    ]
