"""Money in the sandbox: what a checkout charges, what a period costs, what is given back."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import dodopayments
import pytest

from tests.cluster.dodo_world import World, world


@pytest.fixture
def there(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path / "dodo") as running:
        yield running


def code(error: pytest.ExceptionInfo[dodopayments.APIStatusError]) -> str:
    return str(error.value.body["code"])


def test_a_paid_pack_is_one_payment_with_its_cart_and_the_sessions_metadata(there: World) -> None:
    customer, pack = there.customer(), there.pack(500)
    session = there.session(customer, pack, quantity=3, metadata={"farebox_tenant": "t1"})
    before = there.dodo.checkout_sessions.retrieve(session)
    assert (before.payment_id, before.payment_status, before.customer_email) == (None, None, "acme@example.com")
    paid = there.dodo.payments.retrieve(there.admin(f"pay/{session}").json()["payment_id"])
    assert (paid.status, paid.total_amount, paid.currency, paid.charge_type) == ("succeeded", 1500, "USD", None)
    assert [(one.product_id, one.quantity) for one in paid.product_cart or []] == [(pack.product_id, 3)]
    assert paid.metadata == {"farebox_tenant": "t1"}
    assert (paid.customer.customer_id, paid.checkout_session_id) == (customer, session)
    assert there.dodo.checkout_sessions.retrieve(session).payment_status == "succeeded"
    assert there.dodo.payments.list(customer_id=customer, status="succeeded").items[0].payment_id == paid.payment_id


def test_a_session_is_paid_once(there: World) -> None:
    session = there.session(there.customer(), there.pack())
    there.admin(f"pay/{session}")
    again = there.http.post(f"/_sandbox/pay/{session}")
    assert (again.status_code, again.json()["code"]) == (409, "CHECKOUT_SESSION_CONSUMED")
    assert len(there.dodo.payments.list().items) == 1


def test_a_session_ends_after_a_day(there: World) -> None:
    session = there.session(there.customer(), there.pack())
    there.days(1.01)
    assert there.http.post(f"/_sandbox/pay/{session}").json()["code"] == "CHECKOUT_SESSION_EXPIRED"


def test_a_declined_card_leaves_the_session_to_be_paid_later(there: World) -> None:
    session = there.session(there.customer(), there.pack())
    failed = there.admin(f"pay/{session}", decline=True).json()
    assert (failed["status"], failed["error_code"]) == ("failed", "CARD_DECLINED")
    assert there.dodo.checkout_sessions.retrieve(session).payment_status == "failed"
    assert there.admin(f"pay/{session}").json()["status"] == "succeeded"


def test_a_cart_names_known_products_and_customers_in_sane_numbers(there: World) -> None:
    pack, metered, customer = there.pack(), there.metered(), there.customer()
    with pytest.raises(dodopayments.BadRequestError) as refused:
        there.session(customer, metered, quantity=2)
    assert code(refused) == "INVALID_QUANTITY"
    with pytest.raises(dodopayments.NotFoundError):
        there.session("cus_none", pack)
    with pytest.raises(dodopayments.UnprocessableEntityError):
        there.session(customer, pack, quantity=0)
    line = {"product_id": pack.product_id, "quantity": 1}
    for cart in ([], [line] * 21):
        with pytest.raises(dodopayments.UnprocessableEntityError):
            there.dodo.checkout_sessions.create(product_cart=cart)
    with pytest.raises(dodopayments.NotFoundError):
        there.dodo.checkout_sessions.create(product_cart=[{"product_id": "pdt_none", "quantity": 1}])


def test_a_checkout_by_email_takes_the_customer_who_has_it(there: World) -> None:
    known = there.dodo.customers.create(email="a@example.com", name="Ada").customer_id
    cart = [{"product_id": there.pack().product_id, "quantity": 1}]
    for email, name in (("a@example.com", "Someone else"), ("new@example.com", "New")):
        session = there.dodo.checkout_sessions.create(product_cart=cart, customer={"email": email, "name": name})
        there.admin(f"pay/{session.session_id}")
    newest, oldest = there.dodo.payments.list().items
    assert oldest.customer.customer_id == known
    assert newest.customer.name == "New"


def test_a_saved_card_is_charged_at_once(there: World) -> None:
    customer, pack = there.customer(), there.pack()
    there.buy(customer, pack)
    method = there.dodo.customers.retrieve_payment_methods(customer).items[0].payment_method_id
    cart = [{"product_id": pack.product_id, "quantity": 2}]
    made = there.dodo.checkout_sessions.create(
        product_cart=cart, customer={"customer_id": customer}, payment_method_id=method, confirm=True
    )
    assert made.checkout_url is None
    assert there.dodo.payments.retrieve(str(made.payment_id)).total_amount == 1000
    with pytest.raises(dodopayments.NotFoundError):
        there.dodo.checkout_sessions.create(
            product_cart=cart, customer={"customer_id": customer}, payment_method_id="pm_none", confirm=True
        )


def test_what_is_paid_is_not_the_price_once_there_is_tax(there: World) -> None:
    there.admin("settings", tax_bps=1925)
    paid = there.dodo.payments.retrieve(str(there.buy(there.customer(), there.pack(499))["payment_id"]))
    assert (paid.tax, paid.total_amount) == (96, 595)


def test_the_buyer_chooses_what_a_pay_what_you_want_pack_costs(there: World) -> None:
    price = {"type": "one_time_price", "currency": "USD", "price": 500, "pay_what_you_want": True}
    open_ = there.dodo.products.create(name="Any", price=price, tax_category="saas")
    line = {"product_id": open_.product_id, "quantity": 1, "amount": 777}
    session = there.dodo.checkout_sessions.create(product_cart=[line])
    assert there.admin(f"pay/{session.session_id}").json()["total_amount"] == 777
    with pytest.raises(dodopayments.BadRequestError):
        there.dodo.checkout_sessions.create(product_cart=[line | {"amount": 499}])


def test_a_subscription_starts_active_for_a_month_of_the_calendar(there: World) -> None:
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


def test_a_subscription_whose_first_payment_fails_never_runs(there: World) -> None:
    customer = there.customer()
    there.admin(f"customers/{customer}/card", declines=True)
    failed = there.buy(customer, there.metered())
    assert failed["status"] == "failed"
    assert there.dodo.subscriptions.retrieve(str(failed["subscription_id"])).status == "failed"


def test_a_renewal_bills_the_closed_periods_usage_to_the_cent(there: World) -> None:
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


def test_usage_is_billed_in_the_period_of_its_timestamp_and_never_twice(there: World) -> None:
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


def test_a_clock_that_jumps_turns_every_period_between(there: World) -> None:
    one = there.subscribe(there.customer(), there.recurring(2000))
    answer = there.admin("clock", advance_s=370 * 86_400).json()
    assert answer["renewals"] == 12
    assert len(there.dodo.payments.list(subscription_id=one.subscription_id, page_size=100).items) == 13


def test_the_first_units_are_free_where_a_threshold_says_so(there: World) -> None:
    meter = there.meter()
    plan = there.metered({"meter_id": meter, "price_per_unit": "0.0000001", "free_threshold": 3_000_000_000})
    customer = there.customer()
    one = there.subscribe(customer, plan)
    there.charge(customer, 3_000_000_000, 10_000_000)
    usage = there.dodo.subscriptions.retrieve_usage_history(one.subscription_id, meter_id=meter).items[0].meters[0]
    assert (usage.consumed_units, usage.chargeable_units, usage.total_price) == ("3010000000", "10000000", 1)


def test_an_archived_meter_counts_nothing_more(there: World) -> None:
    customer, meter = there.customer(), there.meter()
    one = there.subscribe(customer, there.metered({"meter_id": meter, "price_per_unit": "0.0000001"}))
    there.charge(customer, 10**9, prefix="before")
    there.dodo.meters.archive(meter)
    there.admin("clock", advance_s=1)
    there.charge(customer, 10**9, prefix="after")
    history = there.dodo.subscriptions.retrieve_usage_history(one.subscription_id).items
    assert history[0].meters[0].consumed_units == str(10**9)


def test_a_cancellation_at_the_billing_date_bills_the_last_usage_and_nothing_else(there: World) -> None:
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


def test_a_cancellation_at_once_ends_it_for_good(there: World) -> None:
    one = there.subscribe(there.customer(), there.metered())
    assert there.dodo.subscriptions.update(one.subscription_id, status="cancelled").status == "cancelled"
    there.days(40)
    assert len(there.dodo.payments.list().items) == 1
    with pytest.raises(dodopayments.BadRequestError):
        there.dodo.subscriptions.update(one.subscription_id, status="active")


def test_a_cancellation_can_be_taken_back_before_it_takes_effect(there: World) -> None:
    one = there.subscribe(there.customer(), there.metered())
    there.dodo.subscriptions.update(one.subscription_id, cancel_at_next_billing_date=True)
    there.dodo.subscriptions.update(one.subscription_id, cancel_at_next_billing_date=False)
    there.days(32)
    assert there.dodo.subscriptions.retrieve(one.subscription_id).status == "active"


def test_a_failed_renewal_puts_on_hold_and_a_later_charge_brings_back(there: World) -> None:
    customer = there.customer()
    one = there.subscribe(customer, there.metered())
    there.charge(customer, 7 * 10**9)
    there.admin(f"customers/{customer}/card", declines=True)
    there.days(32)
    assert there.dodo.subscriptions.retrieve(one.subscription_id).status == "on_hold"
    failed = there.dodo.payments.list(status="failed").items[0]
    assert (failed.total_amount, failed.includes_usage, failed.service_periods) == (700, True, [])
    there.admin(f"customers/{customer}/card", declines=False)
    assert there.admin(f"subscriptions/{one.subscription_id}/renew").json()["status"] == "active"
    assert [bill.total_amount for bill in there.dodo.payments.list(status="succeeded").items] == [700, 0]


def test_a_paused_subscription_is_not_billed(there: World) -> None:
    one = there.subscribe(there.customer(), there.recurring())
    assert there.dodo.subscriptions.update(one.subscription_id, pause=True).status == "paused"
    there.days(40)
    assert len(there.dodo.payments.list().items) == 1
    assert there.dodo.subscriptions.update(one.subscription_id, pause=False).status == "active"


def test_a_subscription_expires_at_the_end_of_its_period(there: World) -> None:
    plan = there.recurring(1000, subscription_period_count=2, subscription_period_interval="Month")
    one = there.subscribe(there.customer(), plan)
    there.days(80)
    assert there.dodo.subscriptions.retrieve(one.subscription_id).status == "expired"
    assert len(there.dodo.payments.list().items) == 2


def test_a_trial_charges_nothing_until_it_ends(there: World) -> None:
    one = there.subscribe(there.customer(), there.recurring(1000, trial_period_days=7))
    assert one.next_billing_date - one.created_at == timedelta(days=7)
    there.days(8)
    assert [bill.total_amount for bill in there.dodo.payments.list().items] == [1000, 0]


def test_a_period_can_be_ended_now_without_moving_the_clock(there: World) -> None:
    customer = there.customer()
    one = there.subscribe(customer, there.metered())
    there.charge(customer, 2 * 10**9)
    there.admin(f"subscriptions/{one.subscription_id}/renew")
    assert there.dodo.payments.list().items[0].total_amount == 200
    there.charge(customer, 10**9, prefix="next")
    there.admin(f"subscriptions/{one.subscription_id}/renew")
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
def test_a_plan_change_now_is_billed_by_its_mode(there: World, mode: str, due: int, keeps_date: bool) -> None:
    one = there.subscribe(there.customer(), there.recurring(2000))
    half = (one.next_billing_date - one.previous_billing_date) / 2
    there.admin("clock", now=(one.previous_billing_date + half).isoformat())
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


def test_a_plan_change_bills_the_usage_so_far_once(there: World) -> None:
    customer, meter = there.customer(), {"meter_id": there.meter(), "price_per_unit": "0.0000001"}
    one = there.subscribe(customer, there.metered(meter))
    there.charge(customer, 3 * 10**9)
    there.admin("clock", advance_s=60)
    there.dodo.subscriptions.change_plan(
        one.subscription_id, product_id=there.metered(meter, fixed_price=500).product_id, quantity=1,
        proration_billing_mode="full_immediately",
    )  # fmt: skip
    there.charge(customer, 10**9, prefix="later")
    there.days(32)
    assert [bill.total_amount for bill in there.dodo.payments.list().items] == [600, 800, 0]


def test_a_plan_change_waits_for_the_billing_date_or_is_cancelled(there: World) -> None:
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


def test_a_refund_gives_back_all_that_is_left_and_no_more(there: World) -> None:
    there.admin("settings", tax_bps=1000)
    paid = str(there.buy(there.customer(), there.pack(500))["payment_id"])
    item = there.dodo.payments.retrieve_line_items(paid).items[0].items_id
    part = there.dodo.refunds.create(payment_id=paid, items=[{"item_id": item, "amount": 150}], reason="goodwill")
    assert (part.amount, part.is_partial, part.status) == (150, True, "succeeded")
    assert there.dodo.payments.retrieve(paid).refund_status == "partial"
    with pytest.raises(dodopayments.BadRequestError):
        there.dodo.refunds.create(payment_id=paid, items=[{"item_id": item, "amount": 401}])
    rest = there.dodo.refunds.create(payment_id=paid)
    assert rest.amount == 400
    full = there.dodo.payments.retrieve(paid)
    assert (full.refund_status, [one.amount for one in full.refunds]) == ("full", [150, 400])
    with pytest.raises(dodopayments.BadRequestError):
        there.dodo.refunds.create(payment_id=paid)
    assert {one.refund_id for one in there.dodo.refunds.list().items} == {part.refund_id, rest.refund_id}
    assert there.dodo.refunds.retrieve(part.refund_id).reason == "goodwill"


def test_only_a_payment_that_succeeded_can_be_refunded(there: World) -> None:
    failed = there.admin(f"pay/{there.session(there.customer(), there.pack())}", decline=True).json()["payment_id"]
    with pytest.raises(dodopayments.BadRequestError) as refused:
        there.dodo.refunds.create(payment_id=failed)
    assert code(refused) == "PAYMENT_NOT_SUCCEEDED"


def test_an_invoice_is_a_pdf(there: World) -> None:
    paid = there.buy(there.customer("(c)orp"), there.pack())
    content = there.dodo.invoices.payments.retrieve(str(paid["payment_id"])).read()
    assert content.startswith(b"%PDF-1.4")
    assert b"USD 5.00" in content
    assert content.rstrip().endswith(b"%%EOF")
