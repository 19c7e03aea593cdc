"""Checkouts, payments and refunds."""

from collections.abc import Iterator
from pathlib import Path

import dodopayments
import pytest

from tests.support.sandbox_world import ONCE, World, world


@pytest.fixture
def there(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path / "dodo") as running:
        yield running


def code(error: pytest.ExceptionInfo[dodopayments.APIStatusError]) -> str:
    return str(error.value.body["code"])


def test_payment_of_a_pack(there: World) -> None:
    customer, pack = there.customer(), there.pack(500)
    session = there.session(customer, pack, quantity=3, metadata={"farebox_tenant": "t1"})
    before = there.dodo.checkout_sessions.retrieve(session)
    assert (before.payment_id, before.payment_status, before.customer_email) == (None, None, "acme@example.com")
    paid = there.dodo.payments.retrieve(there.control(f"pay/{session}").json()["payment_id"])
    assert (paid.status, paid.total_amount, paid.currency, paid.charge_type) == ("succeeded", 1500, "USD", None)
    assert [(one.product_id, one.quantity) for one in paid.product_cart or []] == [(pack.product_id, 3)]
    assert paid.metadata == {"farebox_tenant": "t1"}
    assert (paid.customer.customer_id, paid.checkout_session_id) == (customer, session)
    assert there.dodo.checkout_sessions.retrieve(session).payment_status == "succeeded"
    assert there.dodo.payments.list(customer_id=customer, status="succeeded").items[0].payment_id == paid.payment_id


def test_session_is_paid_once(there: World) -> None:
    session = there.session(there.customer(), there.pack())
    there.control(f"pay/{session}")
    again = there.http.post(f"/_sandbox/pay/{session}")
    assert (again.status_code, again.json()["code"]) == (409, "CHECKOUT_SESSION_CONSUMED")
    assert len(there.dodo.payments.list().items) == 1


def test_session_expires_after_a_day(there: World) -> None:
    session = there.session(there.customer(), there.pack())
    there.days(1.01)
    assert there.http.post(f"/_sandbox/pay/{session}").json()["code"] == "CHECKOUT_SESSION_EXPIRED"


def test_declined_session_can_be_paid_later(there: World) -> None:
    session = there.session(there.customer(), there.pack())
    failed = there.control(f"pay/{session}", decline=True).json()
    assert (failed["status"], failed["error_code"]) == ("failed", "CARD_DECLINED")
    assert there.dodo.checkout_sessions.retrieve(session).payment_status == "failed"
    assert there.control(f"pay/{session}").json()["status"] == "succeeded"


def test_invalid_cart_is_refused(there: World) -> None:
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


def test_checkout_by_email_finds_the_customer(there: World) -> None:
    known = there.dodo.customers.create(email="a@example.com", name="Ada").customer_id
    cart = [{"product_id": there.pack().product_id, "quantity": 1}]
    for email, name in (("a@example.com", "Someone else"), ("new@example.com", "New")):
        session = there.dodo.checkout_sessions.create(product_cart=cart, customer={"email": email, "name": name})
        there.control(f"pay/{session.session_id}")
    newest, oldest = there.dodo.payments.list().items
    assert oldest.customer.customer_id == known
    assert newest.customer.name == "New"


def test_saved_card_is_charged_at_once(there: World) -> None:
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


def test_tax_is_added(there: World) -> None:
    there.control("settings", tax_bps=1925)
    paid = there.dodo.payments.retrieve(str(there.buy(there.customer(), there.pack(499))["payment_id"]))
    assert (paid.tax, paid.total_amount) == (96, 595)


def test_pay_what_you_want(there: World) -> None:
    price = ONCE | {"price": 500, "pay_what_you_want": True}
    open_ = there.dodo.products.create(name="Any", price=price, tax_category="saas")
    line = {"product_id": open_.product_id, "quantity": 1, "amount": 777}
    session = there.dodo.checkout_sessions.create(product_cart=[line])
    assert there.control(f"pay/{session.session_id}").json()["total_amount"] == 777
    with pytest.raises(dodopayments.BadRequestError):
        there.dodo.checkout_sessions.create(product_cart=[line | {"amount": 499}])


def test_refund_is_limited_to_what_is_left(there: World) -> None:
    there.control("settings", tax_bps=1000)
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


def test_failed_payment_is_not_refunded(there: World) -> None:
    failed = there.control(f"pay/{there.session(there.customer(), there.pack())}", decline=True).json()["payment_id"]
    with pytest.raises(dodopayments.BadRequestError) as refused:
        there.dodo.refunds.create(payment_id=failed)
    assert code(refused) == "PAYMENT_NOT_SUCCEEDED"


def test_invoice_is_a_pdf(there: World) -> None:
    paid = there.buy(there.customer("(c)orp"), there.pack())
    content = there.dodo.invoices.payments.retrieve(str(paid["payment_id"])).read()
    assert content.startswith(b"%PDF-1.4")
    assert b"USD 5.00" in content
    assert content.rstrip().endswith(b"%%EOF")
