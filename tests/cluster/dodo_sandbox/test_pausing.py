"""Paused subscriptions: no renewals, later dates, an invoice for the usage so far, disabled licence keys."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import dodopayments
import pytest
from dodopayments.types import Subscription

from tests.support.sandbox_world import Merchant, World, merchant, world

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@pytest.fixture
def there(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path / "dodo", webhook_secret=SECRET) as running:
        yield running


@pytest.fixture
def shop() -> Iterator[Merchant]:
    with merchant() as listener:
        yield listener


def now(there: World, one: Subscription) -> Subscription:
    return there.dodo.subscriptions.retrieve(one.subscription_id)


def set_status(there: World, one: Subscription, status: str) -> Subscription:
    return there.dodo.subscriptions.update(one.subscription_id, status=status)  # type: ignore[arg-type]


def totals(there: World, status: str = "succeeded") -> list[int]:
    return [bill.total_amount for bill in there.dodo.payments.list(status=status, page_size=100).items][::-1]  # type: ignore[arg-type]


def used_and_paused(there: World, declines: bool = False, **settings: object) -> Subscription:
    """A subscription at $1 a month with $5 of usage, paused after a minute."""
    there.control("settings", **settings)
    customer = there.customer()
    one = there.subscribe(customer, there.metered(fixed_price=100))
    there.charge(customer, 5 * 10**9)
    there.control("clock", advance_s=60)
    there.control(f"customers/{customer}/card", declines=declines)
    set_status(there, one, "paused")
    return one


def test_paused_subscription_is_not_billed(there: World) -> None:
    one = there.subscribe(there.customer(), there.recurring(1000))
    paused = set_status(there, one, "paused")
    assert (paused.status, paused.paused_at is not None) == ("paused", True)
    there.days(40)
    assert totals(there) == [1000]
    back = set_status(there, one, "active")
    rested = back.next_billing_date - one.next_billing_date
    assert abs(rested - timedelta(days=40)) < timedelta(seconds=5)
    assert back.expires_at is not None
    assert one.expires_at is not None
    assert back.expires_at - one.expires_at == rested
    assert (back.paused_at, back.previous_billing_date) == (None, one.previous_billing_date)
    there.control("clock", now=back.next_billing_date.isoformat())
    assert totals(there) == [1000, 1000]


def test_pause_and_resume_send_webhooks(there: World, shop: Merchant) -> None:
    there.dodo.webhooks.create(url=shop.url, filter_types=["subscription.paused", "subscription.unpaused"])
    one = there.subscribe(there.customer(), there.recurring())
    set_status(there, one, "paused")
    (paused,) = shop.wait(1)
    assert (paused.type, paused.data["status"]) == ("subscription.paused", "paused")
    assert paused.data["paused_at"]
    set_status(there, one, "active")
    unpaused = shop.wait(2)[1]
    assert (unpaused.type, unpaused.data["status"], unpaused.data["paused_at"]) == (
        "subscription.unpaused",
        "active",
        None,
    )


def test_usage_is_invoiced_at_the_pause(there: World) -> None:
    one = used_and_paused(there)
    assert totals(there) == [100, 500]
    bill = there.dodo.payments.list().items[0]
    assert (bill.charge_type, bill.includes_usage, bill.service_periods) == ("renewal", True, [])
    there.days(1)
    set_status(there, one, "active")
    there.charge(one.customer.customer_id, 2 * 10**9, prefix="later")
    there.control("clock", now=now(there, one).next_billing_date.isoformat())
    assert totals(there) == [100, 500, 300]
    periods = there.dodo.subscriptions.retrieve_usage_history(one.subscription_id).items
    assert [period.meters[0].total_price for period in periods] == [0, 200, 500]
    assert periods[1].start_date == periods[2].end_date


def test_usage_may_wait_for_the_next_invoice(there: World) -> None:
    one = used_and_paused(there, bill_usage_at_pause=False)
    assert totals(there) == [100]
    set_status(there, one, "active")
    there.control("clock", now=now(there, one).next_billing_date.isoformat())
    assert totals(there) == [100, 600]


def test_unpaid_pause_goes_on_hold(there: World, shop: Merchant) -> None:
    there.dodo.webhooks.create(
        url=shop.url, filter_types=["subscription.on_hold", "subscription.paused", "subscription.past_due"]
    )
    one = used_and_paused(there, declines=True, past_due_grace_days=1, payment_retries=True)
    there.days(0.9)
    assert now(there, one).status == "paused"
    there.days(0.2)
    held = now(there, one)
    assert (held.status, held.paused_at is not None, totals(there, "failed")) == ("on_hold", True, [500, 500])
    there.control(f"customers/{one.customer.customer_id}/card", declines=False)
    there.days(1)
    assert (now(there, one).status, totals(there)) == ("paused", [100, 500])
    assert [webhook.type for webhook in shop.wait(3)] == [
        "subscription.paused",
        "subscription.on_hold",
        "subscription.paused",
    ]
    there.days(60)
    assert totals(there) == [100, 500]


def test_resume_writes_off_an_unpaid_invoice(there: World) -> None:
    one = used_and_paused(there, declines=True)
    assert now(there, one).status == "on_hold"
    there.control(f"customers/{one.customer.customer_id}/card", declines=False)
    assert set_status(there, one, "active").status == "active"
    there.control("clock", now=now(there, one).next_billing_date.isoformat())
    assert totals(there) == [100, 100]


def test_paused_subscription_can_only_be_cancelled_or_resumed(there: World) -> None:
    one = used_and_paused(there)
    with pytest.raises(dodopayments.BadRequestError, match="SUBSCRIPTION_INACTIVE"):
        set_status(there, one, "paused")
    with pytest.raises(dodopayments.BadRequestError, match="INACTIVE_SUBSCRIPTION_PLAN_CHANGE"):
        there.dodo.subscriptions.change_plan(
            one.subscription_id, product_id=there.recurring(1).product_id, quantity=1,
            proration_billing_mode="do_not_bill",
        )  # fmt: skip
    assert set_status(there, one, "cancelled").status == "cancelled"
    with pytest.raises(dodopayments.BadRequestError):
        set_status(there, one, "active")


def test_unpaid_subscription_cannot_be_paused_or_resumed(there: World) -> None:
    there.control("settings", past_due_grace_days=2)
    customer = there.customer()
    one = there.subscribe(customer, there.recurring())
    there.control(f"customers/{customer}/card", declines=True)
    there.control("clock", now=one.next_billing_date.isoformat())
    with pytest.raises(dodopayments.BadRequestError):
        set_status(there, one, "paused")
    there.days(3)
    assert now(there, one).status == "on_hold"
    with pytest.raises(dodopayments.BadRequestError):
        set_status(there, one, "active")


@pytest.mark.parametrize("change", [{"pause": True}, {"status": "paused", "metadata": {"a": "b"}}])
def test_pause_is_sent_alone(there: World, change: dict[str, object]) -> None:
    one = there.subscribe(there.customer(), there.recurring())
    with pytest.raises(dodopayments.UnprocessableEntityError):
        there.dodo.subscriptions.update(one.subscription_id, **change)  # type: ignore[arg-type]
    assert now(there, one).status == "active"


def test_licence_keys_are_disabled_while_paused(there: World, shop: Merchant) -> None:
    key = there.dodo.entitlements.create(
        name="Key", integration_type="license_key", integration_config={"fulfillment_mode": "auto"}
    )
    product = there.dodo.products.create(
        name="Pro", tax_category="saas", entitlements=[{"entitlement_id": key.id}],
        price=there.recurring(1000).price.to_dict(),
    )  # fmt: skip
    one = there.subscribe(there.customer(), product)
    (given,) = there.dodo.entitlements.grants.list(key.id).items
    there.dodo.webhooks.create(url=shop.url, filter_types=["entitlement_grant.revoked", "entitlement_grant.delivered"])
    set_status(there, one, "paused")
    (rests,) = there.dodo.entitlements.grants.list(key.id).items
    assert (rests.id, rests.status) == (given.id, "Revoked")
    set_status(there, one, "active")
    (back,) = there.dodo.entitlements.grants.list(key.id).items
    assert (back.status, back.license_key, back.revoked_at) == ("Delivered", given.license_key, None)
    assert [webhook.type for webhook in shop.wait(2)] == ["entitlement_grant.revoked", "entitlement_grant.delivered"]
