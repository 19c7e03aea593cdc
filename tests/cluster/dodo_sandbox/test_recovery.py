"""Failed renewals: grace period, retries on Dodo's schedule, and dunning."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from dodopayments.types import Subscription

from tests.support.sandbox_world import Merchant, World, merchant, world
from tests.support.waiting import eventually

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
HALF_A_DAY = 0.5


@pytest.fixture
def shop() -> Iterator[Merchant]:
    with merchant() as listener:
        yield listener


@pytest.fixture
def there(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path / "dodo", webhook_secret=SECRET) as running:
        yield running


def fail_a_renewal(there: World, **settings: object) -> Subscription:
    """The clock is at the time of the failed renewal, or a few milliseconds later."""
    there.control("settings", **settings)
    customer = there.customer()
    one = there.subscribe(customer, there.recurring(1000))
    there.control(f"customers/{customer}/card", declines=True)
    there.control("clock", now=one.next_billing_date.isoformat())
    return one


def mend(there: World, one: Subscription) -> None:
    there.control(f"customers/{one.customer.customer_id}/card", declines=False)


def status(there: World, one: Subscription) -> str:
    return there.dodo.subscriptions.retrieve(one.subscription_id).status


@pytest.mark.parametrize(
    ("window_days", "tries_at_days"),
    [(1, [0.5]), (13, [0.5, 1.5, 3.5, 6.5, 10.5]), (30, [0.5, 1.5, 3.5, 6.5, 10.5, 15.5, 22.5, 29.5])],
)
def test_retry_schedule_of_a_failed_renewal(there: World, window_days: int, tries_at_days: list[float]) -> None:
    one = fail_a_renewal(there, payment_retries=True, recovery_window_days=window_days)
    there.days(60)
    failed = there.dodo.payments.list(status="failed", page_size=100).items[::-1]
    after = [(each.created_at - failed[0].created_at).total_seconds() / 86_400 for each in failed[1:]]
    assert after == tries_at_days
    whole = [there.dodo.payments.retrieve(each.payment_id) for each in failed]
    assert [each.retry_attempt for each in whole] == list(range(len(failed)))
    assert status(there, one) == "on_hold"


def test_retries_and_dunning_are_off_by_default(there: World, shop: Merchant) -> None:
    there.dodo.webhooks.create(url=shop.url)
    one = fail_a_renewal(there)
    there.days(60)
    assert status(there, one) == "on_hold"
    assert len(there.dodo.payments.list(status="failed").items) == 1
    eventually(lambda: "subscription.on_hold" in shop.types())
    assert not [type_ for type_ in shop.types() if type_.startswith("dunning")]


def test_successful_retry_keeps_the_billing_date(there: World) -> None:
    one = fail_a_renewal(there, payment_retries=True)
    mend(there, one)
    there.days(HALF_A_DAY)
    back = there.dodo.subscriptions.retrieve(one.subscription_id)
    assert (back.status, back.previous_billing_date) == ("active", one.next_billing_date)
    there.days(60)
    assert status(there, one) == "active"


def test_past_due_lasts_for_the_grace_period(there: World, shop: Merchant) -> None:
    there.dodo.webhooks.create(url=shop.url, filter_types=["subscription.past_due", "subscription.on_hold"])
    one = fail_a_renewal(there, past_due_grace_days=5)
    assert status(there, one) == "past_due"
    (webhook,) = shop.wait(1)
    assert str(webhook.data["past_due_ends_at"]) > one.next_billing_date.isoformat()
    there.days(4.9)
    assert status(there, one) == "past_due"
    there.days(0.2)
    assert status(there, one) == "on_hold"
    assert shop.wait(2)[1].data["past_due_ends_at"] is None


def test_usage_while_unpaid_is_billed_in_its_period(there: World) -> None:
    there.control("settings", past_due_grace_days=5, payment_retries=True)
    customer = there.customer()
    one = there.subscribe(customer, there.metered(fixed_price=100))
    there.charge(customer, 3 * 10**9)
    there.control(f"customers/{customer}/card", declines=True)
    there.control("clock", now=one.next_billing_date.isoformat())
    there.charge(customer, 4 * 10**9, prefix="late")
    mend(there, one)
    there.days(40)
    paid = there.dodo.payments.list(status="succeeded").items[::-1]
    assert [bill.total_amount for bill in paid] == [100, 100 + 300, 100 + 400]


def test_dunning_starts_once_and_recovers(there: World, shop: Merchant) -> None:
    types = ["dunning.started", "dunning.recovered"]
    there.dodo.webhooks.create(url=shop.url, filter_types=types)
    one = fail_a_renewal(there, dunning=True, payment_retries=True)
    there.days(HALF_A_DAY)
    mend(there, one)
    there.days(1)
    started, recovered = shop.wait(2)
    assert [started.type, recovered.type] == types
    assert started.data["trigger_state"] == recovered.data["trigger_state"] == "on_hold"
    assert recovered.data["status"] == "recovered"
    there.days(1)
    assert len(shop.received) == 2


def test_manual_charge_uses_no_retry(there: World) -> None:
    one = fail_a_renewal(there, payment_retries=True)
    assert there.control(f"subscriptions/{one.subscription_id}/renew").json()["status"] == "on_hold"
    mend(there, one)
    there.days(HALF_A_DAY)
    assert status(there, one) == "active"


def test_recovery_issues_no_second_licence_key(there: World) -> None:
    key = there.dodo.entitlements.create(
        name="Key", integration_type="license_key", integration_config={"fulfillment_mode": "auto"}
    )
    product = there.dodo.products.create(
        name="Pro", tax_category="saas", entitlements=[{"entitlement_id": key.id}],
        price=there.recurring(1000).price.to_dict(),
    )  # fmt: skip
    customer = there.customer()
    one = there.subscribe(customer, product)
    there.control(f"customers/{customer}/card", declines=True)
    there.days(32)
    mend(there, one)
    there.control(f"subscriptions/{one.subscription_id}/renew")
    assert status(there, one) == "active"
    assert len(list(there.dodo.entitlements.grants.list(key.id).items)) == 1
