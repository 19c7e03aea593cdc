"""Subscriptions: renewals, usage, cancellation, and plan changes."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import dodopayments
import pytest

from tests.support.sandbox_world import World, world


@pytest.fixture
def there(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path / "dodo") as running:
        yield running


def test_new_subscription_lasts_a_calendar_month(there: World) -> None:
    customer, plan = there.customer(), there.metered(fixed_price=100)
    one = there.subscribe(customer, plan)
    assert (one.status, one.recurring_pre_tax_amount, one.product_id) == ("active", 100, plan.product_id)
    assert timedelta(days=28) <= one.next_billing_date - one.previous_billing_date <= timedelta(days=31)
    assert [(m.name, m.price_per_unit, m.free_threshold) for m in one.meters] == [("Charges", "0.0000001", 0)]
    first = there.dodo.payments.list(subscription_id=one.subscription_id).items[0]
    assert (first.charge_type, first.total_amount, first.includes_usage) == ("new", 100, False)
    assert first.service_periods[0].ends_at == one.next_billing_date
    found = there.dodo.subscriptions.list(customer_id=customer, status="active").items
    assert [each.subscription_id for each in found] == [one.subscription_id]


def test_failed_first_payment_fails_the_subscription(there: World) -> None:
    customer = there.customer()
    there.control(f"customers/{customer}/card", declines=True)
    failed = there.buy(customer, there.metered())
    assert failed["status"] == "failed"
    assert there.dodo.subscriptions.retrieve(str(failed["subscription_id"])).status == "failed"


def test_renewal_bills_the_usage_of_its_period(there: World) -> None:
    customer = there.customer()
    one = there.subscribe(customer, there.metered(fixed_price=100))
    there.charge(customer, 12_300_000_000, 4_000_000, 1_000_000)
    usage = there.dodo.subscriptions.retrieve_usage_history(one.subscription_id).items
    assert [meter.total_price for meter in usage[0].meters] == [1231]
    there.days(32)
    renewed = there.dodo.subscriptions.retrieve(one.subscription_id)
    assert (renewed.status, renewed.previous_billing_date) == ("active", one.next_billing_date)
    bill = there.dodo.payments.list(subscription_id=one.subscription_id).items[0]
    assert (bill.charge_type, bill.includes_usage, bill.total_amount) == ("renewal", True, 1331)
    lines = there.dodo.payments.retrieve_line_items(bill.payment_id).items
    assert [(line.name, line.amount) for line in lines] == [("Pay as you go", 100), ("Charges", 1231)]


def test_usage_is_billed_once_by_timestamp(there: World) -> None:
    customer = there.customer()
    one = there.subscribe(customer, there.metered())
    for month, dollars in enumerate((1, 2, 3)):
        there.charge(customer, dollars * 10**9, prefix=f"m{month}-")
        there.days(31)
    bills = there.dodo.payments.list(subscription_id=one.subscription_id).items
    assert [bill.total_amount for bill in bills] == [300, 200, 100, 0]
    closed = there.dodo.subscriptions.retrieve_usage_history(one.subscription_id).items[1:]
    assert [period.meters[0].consumed_units for period in closed] == ["3000000000", "2000000000", "1000000000"]
    assert {bill.includes_usage for bill in bills[:3]} == {True}


def test_clock_jump_renews_every_period(there: World) -> None:
    one = there.subscribe(there.customer(), there.recurring(2000))
    answer = there.control("clock", advance_s=370 * 86_400).json()
    assert answer["renewals"] == 12
    assert len(there.dodo.payments.list(subscription_id=one.subscription_id, page_size=100).items) == 13


def test_free_threshold(there: World) -> None:
    meter = there.meter()
    plan = there.metered({"meter_id": meter, "price_per_unit": "0.0000001", "free_threshold": 3_000_000_000})
    customer = there.customer()
    one = there.subscribe(customer, plan)
    there.charge(customer, 3_000_000_000, 10_000_000)
    usage = there.dodo.subscriptions.retrieve_usage_history(one.subscription_id, meter_id=meter).items[0].meters[0]
    assert (usage.consumed_units, usage.chargeable_units, usage.total_price) == ("3010000000", "10000000", 1)


def test_archived_meter_counts_nothing(there: World) -> None:
    customer, meter = there.customer(), there.meter()
    one = there.subscribe(customer, there.metered({"meter_id": meter, "price_per_unit": "0.0000001"}))
    there.charge(customer, 10**9, prefix="before")
    there.dodo.meters.archive(meter)
    there.control("clock", advance_s=1)
    there.charge(customer, 10**9, prefix="after")
    history = there.dodo.subscriptions.retrieve_usage_history(one.subscription_id).items
    assert history[0].meters[0].consumed_units == str(10**9)


def test_cancellation_at_billing_date_bills_last_usage(there: World) -> None:
    customer = there.customer()
    one = there.subscribe(customer, there.metered(fixed_price=100))
    asked = there.dodo.subscriptions.update(one.subscription_id, cancel_at_next_billing_date=True)
    assert (asked.status, asked.cancel_at_next_billing_date) == ("active", True)
    there.charge(customer, 5 * 10**9)
    there.days(40)
    ended = there.dodo.subscriptions.retrieve(one.subscription_id)
    assert (ended.status, ended.cancelled_at) == ("cancelled", one.next_billing_date)
    last = there.dodo.payments.list(subscription_id=one.subscription_id).items[0]
    assert (last.total_amount, last.charge_type, last.service_periods) == (500, "renewal", [])
    there.days(40)
    assert len(there.dodo.payments.list(subscription_id=one.subscription_id).items) == 2


def test_immediate_cancellation(there: World) -> None:
    one = there.subscribe(there.customer(), there.metered())
    assert there.dodo.subscriptions.update(one.subscription_id, status="cancelled").status == "cancelled"
    there.days(40)
    assert len(there.dodo.payments.list().items) == 1
    with pytest.raises(dodopayments.BadRequestError):
        there.dodo.subscriptions.update(one.subscription_id, status="active")


def test_cancellation_can_be_withdrawn(there: World) -> None:
    one = there.subscribe(there.customer(), there.metered())
    there.dodo.subscriptions.update(one.subscription_id, cancel_at_next_billing_date=True)
    there.dodo.subscriptions.update(one.subscription_id, cancel_at_next_billing_date=False)
    there.days(32)
    assert there.dodo.subscriptions.retrieve(one.subscription_id).status == "active"


def test_failed_renewal_goes_on_hold(there: World) -> None:
    customer = there.customer()
    one = there.subscribe(customer, there.metered())
    there.charge(customer, 7 * 10**9)
    there.control(f"customers/{customer}/card", declines=True)
    there.days(32)
    assert there.dodo.subscriptions.retrieve(one.subscription_id).status == "on_hold"
    failed = there.dodo.payments.list(status="failed").items[0]
    assert (failed.total_amount, failed.includes_usage, failed.service_periods) == (700, True, [])
    there.control(f"customers/{customer}/card", declines=False)
    assert there.control(f"subscriptions/{one.subscription_id}/renew").json()["status"] == "active"
    assert [bill.total_amount for bill in there.dodo.payments.list(status="succeeded").items] == [700, 0]


def test_subscription_expires(there: World) -> None:
    plan = there.recurring(1000, subscription_period_count=2, subscription_period_interval="Month")
    one = there.subscribe(there.customer(), plan)
    there.days(80)
    assert there.dodo.subscriptions.retrieve(one.subscription_id).status == "expired"
    assert len(there.dodo.payments.list().items) == 2


def test_trial_is_free(there: World) -> None:
    one = there.subscribe(there.customer(), there.recurring(1000, trial_period_days=7))
    assert one.next_billing_date - one.created_at == timedelta(days=7)
    there.days(8)
    assert [bill.total_amount for bill in there.dodo.payments.list().items] == [1000, 0]


def test_renewal_without_moving_the_clock(there: World) -> None:
    customer = there.customer()
    one = there.subscribe(customer, there.metered())
    there.charge(customer, 2 * 10**9)
    there.control(f"subscriptions/{one.subscription_id}/renew")
    assert there.dodo.payments.list().items[0].total_amount == 200
    there.charge(customer, 10**9, prefix="next")
    there.control(f"subscriptions/{one.subscription_id}/renew")
    assert there.dodo.payments.list().items[0].total_amount == 100


@pytest.mark.parametrize(
    ("mode", "due", "keeps_date"),
    [
        ("full_immediately", 3000, False),
        ("difference_immediately", 1000, False),
        ("prorated_immediately", 2000, False),
        ("prorated_immediately_keep_cycle", 500, True),
        ("do_not_bill", 0, True),
    ],
)
def test_plan_change_is_billed_by_mode(there: World, mode: str, due: int, keeps_date: bool) -> None:
    one = there.subscribe(there.customer(), there.recurring(2000))
    half = (one.next_billing_date - one.previous_billing_date) / 2
    there.control("clock", now=(one.previous_billing_date + half).isoformat())
    changed = there.dodo.subscriptions.change_plan(
        one.subscription_id,
        product_id=there.recurring(3000).product_id,
        quantity=1,
        proration_billing_mode=mode,
    )
    bill = there.dodo.payments.retrieve(str(changed.payment_id))
    assert (bill.charge_type, bill.total_amount) == ("plan_change", due)
    now = there.dodo.subscriptions.retrieve(one.subscription_id)
    assert now.recurring_pre_tax_amount == 3000
    assert (now.next_billing_date == one.next_billing_date) == keeps_date


@pytest.mark.parametrize(
    ("mode", "due", "renewals"),
    [
        ("full_immediately", 500, [500, 500]),
        ("difference_immediately", 0, [0, 0]),  # 1500 are given back: 1500 - 500 - 500
        ("prorated_immediately", 0, [0, 500]),  # 1000 - 500
        ("prorated_immediately_keep_cycle", 0, [0, 250]),  # 1000 - 250
        ("do_not_bill", 0, [500, 500]),
    ],
)
def test_downgrade_credit_pays_next_invoices(there: World, mode: str, due: int, renewals: list[int]) -> None:
    customer = there.customer()
    one = there.subscribe(customer, there.recurring(2000))
    half = (one.next_billing_date - one.previous_billing_date) / 2
    there.control("clock", now=(one.previous_billing_date + half).isoformat())
    there.dodo.subscriptions.change_plan(
        one.subscription_id,
        product_id=there.recurring(500).product_id,
        quantity=1,
        proration_billing_mode=mode,  # type: ignore[arg-type]
    )
    assert there.buy(customer, there.pack(700))["total_amount"] == 700, "the balance pays only subscriptions"
    for _ in renewals:
        there.control(f"subscriptions/{one.subscription_id}/renew")
    bills = [bill.total_amount for bill in there.dodo.payments.list().items][::-1]
    assert bills == [2000, due, 700, *renewals]


def test_declined_renewal_keeps_the_balance(there: World) -> None:
    customer = there.customer()
    one = there.subscribe(customer, there.recurring(2000))
    there.dodo.subscriptions.change_plan(
        one.subscription_id, product_id=there.recurring(1900).product_id, quantity=1,
        proration_billing_mode="difference_immediately",
    )  # fmt: skip
    there.control(f"customers/{customer}/card", declines=True)
    there.control(f"subscriptions/{one.subscription_id}/renew")
    there.control(f"customers/{customer}/card", declines=False)
    there.control(f"subscriptions/{one.subscription_id}/renew")
    failed, paid = there.dodo.payments.list().items[1::-1]
    assert (failed.status, paid.status, paid.total_amount) == ("failed", "succeeded", 1800)
    refund = there.dodo.refunds.create(payment_id=paid.payment_id)
    assert (refund.amount, refund.is_partial) == (1800, False)


def test_plan_change_bills_usage_once(there: World) -> None:
    customer, meter = there.customer(), {"meter_id": there.meter(), "price_per_unit": "0.0000001"}
    one = there.subscribe(customer, there.metered(meter))
    there.charge(customer, 3 * 10**9)
    there.control("clock", advance_s=60)
    there.dodo.subscriptions.change_plan(
        one.subscription_id, product_id=there.metered(meter, fixed_price=500).product_id, quantity=1,
        proration_billing_mode="full_immediately",
    )  # fmt: skip
    there.charge(customer, 10**9, prefix="later")
    there.days(32)
    assert [bill.total_amount for bill in there.dodo.payments.list().items] == [600, 800, 0]


def test_scheduled_plan_change(there: World) -> None:
    one, bigger = there.subscribe(there.customer(), there.recurring(1000)), there.recurring(3000)

    def schedule() -> None:
        there.dodo.subscriptions.change_plan(
            one.subscription_id, product_id=bigger.product_id, quantity=1, proration_billing_mode="do_not_bill",
            effective_at="next_billing_date",
        )  # fmt: skip

    schedule()
    scheduled = there.dodo.subscriptions.retrieve(one.subscription_id).scheduled_change
    assert scheduled is not None
    assert scheduled.effective_at == one.next_billing_date
    there.dodo.subscriptions.cancel_change_plan(one.subscription_id)
    there.days(32)
    schedule()
    there.days(31)
    assert [bill.total_amount for bill in there.dodo.payments.list().items] == [3000, 1000, 1000]
    assert there.dodo.subscriptions.retrieve(one.subscription_id).product_id == bigger.product_id


@pytest.mark.parametrize(
    "mode",
    [
        "full_immediately",
        "difference_immediately",
        "prorated_immediately",
        "prorated_immediately_keep_cycle",
        "do_not_bill",
    ],
)
@pytest.mark.parametrize("cents", [500, 3000])
def test_preview_of_plan_change_is_what_the_change_does(there: World, mode: str, cents: int) -> None:
    there.control("settings", tax_bps=1900)
    customer = there.customer()
    one = there.subscribe(customer, there.metered(fixed_price=2000))
    there.charge(customer, 3 * 10**9)
    half = (one.next_billing_date - one.previous_billing_date) / 2
    there.control("clock", now=(one.previous_billing_date + half).isoformat())
    asked = {
        "product_id": there.recurring(cents).product_id,
        "quantity": 1,
        "proration_billing_mode": mode,
    }
    before = there.dodo.subscriptions.retrieve(one.subscription_id)
    preview = there.dodo.subscriptions.preview_change_plan(one.subscription_id, **asked)  # type: ignore[arg-type]
    assert there.dodo.subscriptions.retrieve(one.subscription_id) == before
    assert len(there.payments(customer)) == 1
    changed = there.dodo.subscriptions.change_plan(one.subscription_id, **asked)  # type: ignore[arg-type]
    bill = there.dodo.payments.retrieve(str(changed.payment_id))
    charge = preview.immediate_charge
    assert (charge.summary.total_amount, charge.summary.tax) == (bill.total_amount, bill.tax)
    assert [line.type for line in charge.line_items] == ["subscription", "meter"]
    after = there.dodo.subscriptions.retrieve(one.subscription_id)
    assert (preview.new_plan.product_id, preview.new_plan.recurring_pre_tax_amount) == (after.product_id, cents)
    if mode not in ("do_not_bill", "prorated_immediately_keep_cycle"):
        assert abs(preview.new_plan.next_billing_date - after.next_billing_date).total_seconds() < 60
    else:
        assert preview.new_plan.next_billing_date == after.next_billing_date == one.next_billing_date


def test_preview_of_scheduled_change_costs_nothing_now(there: World) -> None:
    one, other = there.subscribe(there.customer(), there.recurring(2000)), there.recurring(3000)
    preview = there.dodo.subscriptions.preview_change_plan(
        one.subscription_id,
        product_id=other.product_id,
        quantity=1,
        proration_billing_mode="prorated_immediately",
        effective_at="next_billing_date",
    )
    charge = preview.immediate_charge
    assert (charge.summary.total_amount, charge.line_items) == (0, [])
    assert charge.effective_at == one.next_billing_date


def test_scheduled_change_is_replaced_only_when_asked(there: World) -> None:
    one = there.subscribe(there.customer(), there.recurring(2000))
    first, second = there.recurring(3000).product_id, there.recurring(4000).product_id
    mode = "do_not_bill"
    there.dodo.subscriptions.change_plan(
        one.subscription_id,
        product_id=first,
        quantity=1,
        proration_billing_mode=mode,
        effective_at="next_billing_date",
    )
    for when in ("immediately", "next_billing_date"):
        with pytest.raises(dodopayments.ConflictError):
            there.dodo.subscriptions.change_plan(
                one.subscription_id,
                product_id=second,
                quantity=1,
                proration_billing_mode=mode,
                effective_at=when,
            )
    there.dodo.subscriptions.change_plan(
        one.subscription_id,
        product_id=second,
        quantity=1,
        proration_billing_mode=mode,
        effective_at="next_billing_date",
        cancel_scheduled_change_plan=True,
    )
    scheduled = there.dodo.subscriptions.retrieve(one.subscription_id).scheduled_change
    assert scheduled is not None
    assert scheduled.product_id == second


def test_plan_change_by_payment_link_is_refused(there: World) -> None:
    one, other = there.subscribe(there.customer(), there.recurring(2000)), there.recurring(3000).product_id
    for more in ({"collect_via_payment_link": True}, {"return_url": "http://127.0.0.1/"}):
        with pytest.raises(dodopayments.UnprocessableEntityError):
            there.dodo.subscriptions.change_plan(
                one.subscription_id,
                product_id=other,
                quantity=1,
                proration_billing_mode="do_not_bill",
                **more,  # type: ignore[arg-type]
            )
