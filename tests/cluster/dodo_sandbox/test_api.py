"""The sandbox's resources through Dodo's SDK, which validates every answer."""

from collections.abc import Iterator
from pathlib import Path

import dodopayments
import httpx
import pytest
from dodopayments import AsyncDodoPayments, DodoPayments

from tests.support.sandbox_world import API_KEY, MONTH, ONCE, World, world


@pytest.fixture
def there(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path / "dodo") as running:
        yield running


@pytest.mark.parametrize("key", ["wrong", "", API_KEY + "x"])
def test_wrong_key_gets_401(there: World, key: str) -> None:
    with DodoPayments(base_url=there.url, bearer_token=key or "x", max_retries=0) as stranger:
        with pytest.raises(dodopayments.AuthenticationError) as refused:
            stranger.customers.list()
        assert refused.value.body == {"code": "UNAUTHORIZED", "message": "API key is missing or invalid"}


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/customers/cus_none", 404, "CUSTOMER_NOT_FOUND"),
        ("/products/pdt_none", 404, "PRODUCT_NOT_FOUND"),
        ("/meters/mtr_none", 404, "METER_NOT_FOUND"),
        ("/events/none", 404, "EVENT_NOT_FOUND"),
        ("/checkouts/cks_none", 404, "CHECKOUT_SESSION_NOT_FOUND"),
        ("/payments/pay_none", 404, "PAYMENT_NOT_FOUND"),
        ("/payments/pay_none/line-items", 404, "PAYMENT_NOT_FOUND"),
        ("/refunds/ref_none", 404, "REFUND_NOT_FOUND"),
        ("/subscriptions/sub_none", 404, "SUBSCRIPTION_NOT_FOUND"),
        ("/subscriptions/sub_none/usage-history", 404, "SUBSCRIPTION_NOT_FOUND"),
        ("/webhooks/ep_none", 404, "WEBHOOK_NOT_FOUND"),
        ("/no/such/path", 404, "NOT_FOUND"),
        ("/customers?page_size=101", 422, "UNPROCESSABLE_ENTITY"),
        ("/customers?page_number=-1", 422, "UNPROCESSABLE_ENTITY"),
    ],
)
def test_errors_have_code_and_message(there: World, path: str, status: int, code: str) -> None:
    answer = there.http.get(path, headers={"authorization": f"Bearer {API_KEY}"})
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.json()["message"]
    assert set(answer.json()) == {"code", "message"}


def test_invalid_json_is_422(there: World) -> None:
    answer = there.http.post("/customers", content=b"{nope", headers={"authorization": f"Bearer {API_KEY}"})
    assert answer.status_code == 422
    assert answer.json()["code"] == "UNPROCESSABLE_ENTITY"


def test_large_body_is_413(there: World) -> None:
    there.control("settings", max_body_bytes=100)
    with pytest.raises(dodopayments.APIStatusError) as refused:
        there.dodo.customers.create(email="a@example.com", name="n" * 200)
    assert refused.value.status_code == 413


def test_customers_are_created_found_and_updated(there: World) -> None:
    made = there.dodo.customers.create(email="a@example.com", name="Ada", metadata={"farebox_tenant": "t1", "n": 1})
    there.dodo.customers.create(email="b@example.com", name="Bob")
    assert there.dodo.customers.retrieve(made.customer_id).metadata == {"farebox_tenant": "t1", "n": 1}
    assert [one.customer_id for one in there.dodo.customers.list(email="a@example.com").items] == [made.customer_id]
    assert [one.name for one in there.dodo.customers.list(name="BO").items] == ["Bob"]
    assert there.dodo.customers.update(made.customer_id, name="Ada L.").name == "Ada L."
    assert there.dodo.customers.retrieve(made.customer_id).email == "a@example.com"
    assert there.dodo.customers.customer_portal.create(made.customer_id).link.endswith(made.customer_id)


def test_customers_may_share_an_email(there: World) -> None:
    assert there.customer("Acme") != there.customer("Acme")


@pytest.mark.parametrize("bad", [{"email": "no-at-sign", "name": "x"}, {"name": "x"}, {"email": "a@example.com"}])
def test_invalid_customer_is_422(there: World, bad: dict[str, str]) -> None:
    answer = there.http.post("/customers", json=bad, headers={"authorization": f"Bearer {API_KEY}"})
    assert answer.status_code == 422


def test_pages_cover_everything_once(there: World) -> None:
    made = [there.customer(f"C{number}") for number in range(25)]
    pages = [there.dodo.customers.list(page_number=page, page_size=10).items for page in range(4)]
    assert [len(page) for page in pages] == [10, 10, 5, 0]
    assert [one.customer_id for page in pages for one in page] == made[::-1]
    assert len(there.dodo.customers.list().items) == 10


def test_products_of_three_kinds(there: World) -> None:
    pack, pro, metered = there.pack(500), there.recurring(2000), there.metered(fixed_price=100)
    assert there.dodo.products.retrieve(pack.product_id).price.price == 500
    assert there.dodo.products.retrieve(pro.product_id).is_recurring
    price = there.dodo.products.retrieve(metered.product_id).price
    assert (price.fixed_price, price.meters[0].price_per_unit, price.meters[0].name) == (100, "0.0000001", "Charges")
    listed = {one.product_id: one.price for one in there.dodo.products.list().items}
    assert listed == {pack.product_id: 500, pro.product_id: 2000, metered.product_id: 100}
    assert [one.product_id for one in there.dodo.products.list(recurring=False).items] == [pack.product_id]


def test_products_are_updated_and_archived(there: World) -> None:
    pack = there.pack(500)
    there.dodo.products.update(pack.product_id, name="Big", price=ONCE | {"price": 900})
    assert there.dodo.products.retrieve(pack.product_id).name == "Big"
    there.dodo.products.archive(pack.product_id)
    assert there.dodo.products.list().items == []
    assert len(there.dodo.products.list(archived=True).items) == 1
    with pytest.raises(dodopayments.BadRequestError):
        there.session(there.customer(), pack)
    there.dodo.products.unarchive(pack.product_id)
    assert there.session(there.customer(), pack)


@pytest.mark.parametrize(
    ("price_per_unit", "taken"),
    [
        ("0.0000001", True), ("99999", True), ("0.000000000001", True), ("10.50", True),
        ("0", False), ("0.000", False), ("100000", False), ("0.0000000000001", False), ("-1", False), ("1e-7", False),
    ],
)  # fmt: skip
def test_unit_price_digits(there: World, price_per_unit: str, taken: bool) -> None:
    meter = {"meter_id": there.meter(), "price_per_unit": price_per_unit}
    if taken:
        there.metered(meter)
        return
    with pytest.raises(dodopayments.UnprocessableEntityError):
        there.metered(meter)


@pytest.mark.parametrize("count", [1, 10, 11])
def test_price_has_at_most_ten_meters(there: World, count: int) -> None:
    meters = [{"meter_id": there.meter(), "price_per_unit": "1"} for _ in range(count)]
    if count <= 10:
        there.metered(*meters)
        return
    with pytest.raises(dodopayments.BadRequestError):
        there.metered(*meters)


def test_invalid_price_is_refused(there: World) -> None:
    with pytest.raises(dodopayments.NotFoundError):
        there.metered({"meter_id": "mtr_none", "price_per_unit": "1"})
    with pytest.raises(dodopayments.BadRequestError):
        there.recurring(100, subscription_period_count=21)


def test_credit_entitlements_are_refused(there: World) -> None:
    with pytest.raises(dodopayments.UnprocessableEntityError):
        there.dodo.products.create(
            name="Credits",
            price=ONCE | {"price": 1},
            tax_category="saas",
            credit_entitlements=[{"credit_entitlement_id": "cde_1", "credits_amount": "5"}],
        )


def test_meters_are_updated_and_archived(there: World) -> None:
    meter = there.meter()
    there.dodo.meters.update(meter, name="Renamed")
    assert [one.name for one in there.dodo.meters.list().items] == ["Renamed"]
    there.dodo.meters.archive(meter)
    assert there.dodo.meters.list().items == []
    assert [one.id for one in there.dodo.meters.list(archived=True).items] == [meter]
    there.dodo.meters.unarchive(meter)
    assert there.dodo.meters.retrieve(meter).aggregation.key == "charge_nanos"


def test_account_has_at_most_fifty_meters(there: World) -> None:
    made = [there.meter("count") for _ in range(50)]
    with pytest.raises(dodopayments.BadRequestError) as refused:
        there.meter("count")
    assert refused.value.body["code"] == "METER_LIMIT_REACHED"
    there.dodo.meters.archive(made[0])
    there.meter("count")


@pytest.mark.parametrize("kind", ["sum", "max", "last"])
def test_sum_meter_needs_a_key(there: World, kind: str) -> None:
    with pytest.raises(dodopayments.UnprocessableEntityError):
        there.dodo.meters.create(
            name="m",
            event_name="e",
            measurement_unit="u",
            aggregation={"type": kind},
        )


def nested(depth: int) -> dict[str, object]:
    leaf: dict[str, object] = {"key": "k", "operator": "equals", "value": 1}
    for _ in range(depth):
        leaf = {"conjunction": "and", "clauses": [leaf]}
    return leaf


@pytest.mark.parametrize(("depth", "taken"), [(1, True), (3, True), (4, False)])
def test_filter_has_at_most_three_levels(there: World, depth: int, taken: bool) -> None:
    def make() -> None:
        there.dodo.meters.create(
            name="m",
            event_name="e",
            measurement_unit="u",
            aggregation={"type": "count"},
            filter=nested(depth),
        )

    if taken:
        make()
        return
    with pytest.raises(dodopayments.BadRequestError):
        make()


def test_endpoints_are_created_once_updated_and_deleted(there: World) -> None:
    made = there.dodo.webhooks.create(url="http://127.0.0.1:1/hook", idempotency_key="k", description="d")
    assert there.dodo.webhooks.create(url="http://127.0.0.1:1/hook", idempotency_key="k").id == made.id
    other = there.dodo.webhooks.create(url="http://127.0.0.1:1/other", filter_types=["payment.succeeded"])
    assert [one.id for one in there.dodo.webhooks.list()] == [made.id, other.id]
    assert [one.id for one in there.dodo.webhooks.list(limit=1)] == [made.id, other.id]
    assert there.dodo.webhooks.retrieve_secret(made.id).secret.startswith("whsec_")
    assert there.dodo.webhooks.update(made.id, url="http://127.0.0.1:1/new").url.endswith("/new")
    there.dodo.webhooks.delete(made.id)
    with pytest.raises(dodopayments.NotFoundError):
        there.dodo.webhooks.retrieve(made.id)


async def test_async_client(there: World) -> None:
    async with AsyncDodoPayments(
        base_url=there.url, bearer_token=API_KEY, max_retries=0, _strict_response_validation=True
    ) as dodo:
        made = await dodo.customers.create(email="a@example.com", name="Ada")
        assert (await dodo.customers.retrieve(made.customer_id)).name == "Ada"


def test_rate_limit_is_off_by_default(there: World) -> None:
    for _ in range(250):
        assert there.http.get("/customers", headers={"authorization": f"Bearer {API_KEY}"}).status_code == 200
    there.control("settings", rate_limit_per_min=2)
    there.dodo.customers.list()
    there.dodo.customers.list()
    with pytest.raises(dodopayments.RateLimitError) as refused:
        there.dodo.customers.list()
    assert refused.value.response.headers["x-ratelimit-limit"] == "2"
    there.control("settings", rate_limit_per_min=None)
    there.dodo.customers.list()


def test_misspelt_control_fields_are_refused(there: World) -> None:
    for path, order in [
        ("settings", {"webhook_sped": 2}),
        ("clock", {"advance": 1}),
        ("clock", {}),
        ("faults", {"kinds": ["explode"]}),
        ("faults", {"kinds": ["status:200"]}),
    ]:
        assert there.http.post(f"/_sandbox/{path}", json=order).status_code == 422, (path, order)


def test_cart_has_one_currency(there: World) -> None:
    euro = there.dodo.products.create(name="Euro", price=ONCE | {"currency": "EUR", "price": 1}, tax_category="saas")
    cart = [{"product_id": one.product_id, "quantity": 1} for one in (euro, there.pack())]
    with pytest.raises(dodopayments.BadRequestError):
        there.dodo.checkout_sessions.create(product_cart=cart)


def test_calendar_months() -> None:
    from datetime import UTC, datetime

    from cluster.dodo_sandbox.wire import add_interval

    start = datetime(2028, 1, 31, 12, tzinfo=UTC)
    assert add_interval(start, 1, "Month").date().isoformat() == "2028-02-29"
    assert add_interval(start, 11, "Month").date().isoformat() == "2028-12-31"
    assert add_interval(start, 1, "Year").date().isoformat() == "2029-01-31"
    assert add_interval(start, 2, "Week").date().isoformat() == "2028-02-14"
    assert add_interval(start, 3, "Day").date().isoformat() == "2028-02-03"
    assert MONTH["payment_frequency_interval"] == "Month"


def test_control_routes_need_no_key(there: World) -> None:
    answer: httpx.Response = there.http.get("/_sandbox/health")
    assert answer.json() == {"status": "ok"}
    assert API_KEY not in there.http.get("/").text


def test_statuses_of_success_are_those_of_the_document(there: World) -> None:
    authorization = {"authorization": f"Bearer {API_KEY}"}
    meter = {"name": "m", "event_name": "e", "measurement_unit": "u", "aggregation": {"type": "count"}}
    made = there.http.post("/meters", json=meter, headers=authorization)
    endpoint = there.http.post("/webhooks", json={"url": "http://127.0.0.1:9/"}, headers=authorization)
    product = there.pack().product_id
    found = {
        "POST /meters": made.status_code,
        "DELETE /meters": there.http.delete(f"/meters/{made.json()['id']}", headers=authorization).status_code,
        "POST /webhooks": endpoint.status_code,
        "DELETE /webhooks": there.http.delete(f"/webhooks/{endpoint.json()['id']}", headers=authorization).status_code,
        "DELETE /products": there.http.delete(f"/products/{product}", headers=authorization).status_code,
    }
    assert found == {
        "POST /meters": 201,
        "DELETE /meters": 204,
        "POST /webhooks": 200,
        "DELETE /webhooks": 200,
        "DELETE /products": 200,
    }


def test_refunds_and_disputes_carry_what_the_sdk_reads(there: World) -> None:
    paid = there.buy(there.customer(), there.pack(500))
    opened = there.control(f"disputes/{paid['payment_id']}", amount=200, is_resolved_by_rdr=True).json()
    dispute = there.dodo.disputes.retrieve(opened["dispute_id"])
    assert (dispute.currency, dispute.is_resolved_by_rdr) == ("USD", True)
    assert there.dodo.disputes.list().items[0].is_resolved_by_rdr
    refund = there.dodo.refunds.create(payment_id=str(paid["payment_id"]))
    assert (refund.currency, there.dodo.refunds.list().items[0].currency) == ("USD", "USD")


@pytest.mark.parametrize("missing", ["discount", "purchasing_power_parity", "currency", "price"])
def test_price_without_a_required_field_is_422(there: World, missing: str) -> None:
    price = {name: value for name, value in (ONCE | {"price": 500}).items() if name != missing}
    with pytest.raises(dodopayments.UnprocessableEntityError) as refused:
        there.dodo.products.create(name="Pack", price=price, tax_category="saas")
    assert missing in str(refused.value.body)
