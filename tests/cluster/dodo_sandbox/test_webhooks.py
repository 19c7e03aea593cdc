"""Webhooks: signatures, retries, and delivery out of order."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from dodopayments.types import (
    DunningRecoveredWebhookEvent,
    DunningStartedWebhookEvent,
    PaymentFailedWebhookEvent,
    PaymentSucceededWebhookEvent,
    RefundSucceededWebhookEvent,
    SubscriptionActiveWebhookEvent,
    SubscriptionCancelledWebhookEvent,
    SubscriptionOnHoldWebhookEvent,
    SubscriptionPastDueWebhookEvent,
    SubscriptionPausedWebhookEvent,
    SubscriptionPlanChangedWebhookEvent,
    SubscriptionRenewedWebhookEvent,
    SubscriptionUnpausedWebhookEvent,
    SubscriptionUpdatedWebhookEvent,
)

from cluster.dodo_sandbox.outbox import RETRY_DELAYS_S, Delivery, Outbox
from cluster.dodo_sandbox.refunds import RefundRecord
from cluster.dodo_sandbox.store import Store
from tests.support.sandbox_world import Merchant, World, merchant, world
from tests.support.waiting import eventually

pytestmark = pytest.mark.slow

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
SHAPES = {
    "dunning.started": DunningStartedWebhookEvent,
    "dunning.recovered": DunningRecoveredWebhookEvent,
    "subscription.past_due": SubscriptionPastDueWebhookEvent,
    "payment.succeeded": PaymentSucceededWebhookEvent,
    "payment.failed": PaymentFailedWebhookEvent,
    "refund.succeeded": RefundSucceededWebhookEvent,
    "subscription.active": SubscriptionActiveWebhookEvent,
    "subscription.cancelled": SubscriptionCancelledWebhookEvent,
    "subscription.on_hold": SubscriptionOnHoldWebhookEvent,
    "subscription.paused": SubscriptionPausedWebhookEvent,
    "subscription.plan_changed": SubscriptionPlanChangedWebhookEvent,
    "subscription.renewed": SubscriptionRenewedWebhookEvent,
    "subscription.unpaused": SubscriptionUnpausedWebhookEvent,
    "subscription.updated": SubscriptionUpdatedWebhookEvent,
}


@pytest.fixture
def shop() -> Iterator[Merchant]:
    with merchant() as listener:
        yield listener


@pytest.fixture
def there(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path / "dodo", webhook_secret=SECRET) as running:
        yield running


def listen(there: World, shop: Merchant, *types: str) -> str:
    if types:
        return there.dodo.webhooks.create(url=shop.url, filter_types=list(types)).id
    return there.dodo.webhooks.create(url=shop.url).id


def deliveries(there: World) -> list[dict[str, object]]:
    found: list[dict[str, object]] = there.http.get("/_sandbox/webhooks").json()["data"]
    return found


def test_events_are_signed_and_fit_the_sdk(there: World, shop: Merchant) -> None:
    listen(there, shop)
    there.control("settings", dunning=True)
    customer = there.customer()
    one = there.subscribe(customer, there.recurring(1000))
    there.dodo.subscriptions.change_plan(
        one.subscription_id, product_id=there.recurring(2000).product_id, quantity=1,
        proration_billing_mode="full_immediately",
    )  # fmt: skip
    there.dodo.subscriptions.update(one.subscription_id, status="paused")
    there.dodo.subscriptions.update(one.subscription_id, status="active")
    there.control(f"subscriptions/{one.subscription_id}/renew")
    there.control(f"customers/{customer}/card", declines=True)
    there.control(f"subscriptions/{one.subscription_id}/renew")
    there.control(f"customers/{customer}/card", declines=False)
    there.control(f"subscriptions/{one.subscription_id}/renew")
    there.control("settings", past_due_grace_days=3)
    there.control(f"customers/{customer}/card", declines=True)
    there.control(f"subscriptions/{one.subscription_id}/renew")
    there.dodo.refunds.create(payment_id=there.dodo.payments.list(status="succeeded").items[0].payment_id)
    there.dodo.subscriptions.update(one.subscription_id, status="cancelled")
    eventually(lambda: set(shop.types()) == set(SHAPES))
    for webhook in shop.received:
        there.dodo.webhooks.unwrap(webhook.body.decode(), headers=webhook.headers, key=SECRET)
        SHAPES[webhook.type].model_validate_json(webhook.body)
        assert webhook.data.get("payload_type") in ("Payment", "Subscription", "Refund", None)


def test_signature_covers_the_body(there: World, shop: Merchant) -> None:
    listen(there, shop)
    there.buy(there.customer(), there.pack())
    webhook = shop.wait(1)[0]
    for body, key in ((webhook.body + b" ", SECRET), (webhook.body, "whsec_" + "A" * 32)):
        with pytest.raises(Exception, match="signature"):
            there.dodo.webhooks.unwrap(body.decode(), headers=webhook.headers, key=key)


def test_payment_webhook_of_a_pack(there: World, shop: Merchant) -> None:
    listen(there, shop)
    customer, pack = there.customer(), there.pack(500)
    paid = there.buy(customer, pack, quantity=2, metadata={"farebox_tenant": "t1"})
    (webhook,) = shop.wait(1)
    assert webhook.type == "payment.succeeded"
    assert webhook.data["payment_id"] == paid["payment_id"]
    assert webhook.data["product_cart"] == [{"product_id": pack.product_id, "quantity": 2}]
    assert webhook.data["metadata"] == {"farebox_tenant": "t1"}
    assert "lines" not in webhook.data


def test_webhooks_of_a_new_subscription(there: World, shop: Merchant) -> None:
    listen(there, shop)
    one = there.subscribe(there.customer(), there.metered())
    shop.wait(3)
    assert sorted(shop.types()) == ["payment.succeeded", "subscription.active", "subscription.updated"]
    active = next(webhook for webhook in shop.received if webhook.type == "subscription.active")
    assert (active.data["subscription_id"], active.data["status"]) == (one.subscription_id, "active")


def test_renewal_webhook_has_its_payment(there: World, shop: Merchant) -> None:
    listen(there, shop, "subscription.renewed", "payment.succeeded")
    customer = there.customer()
    one = there.subscribe(customer, there.metered())
    there.charge(customer, 10**9)
    there.days(32)
    by_type = {webhook.type: webhook.data for webhook in shop.wait(3)}
    renewal = there.dodo.payments.list(subscription_id=one.subscription_id).items[0]
    assert by_type["subscription.renewed"]["payment_id"] == renewal.payment_id
    bills = [each.data for each in shop.received if each.type == "payment.succeeded"]
    assert {(bill["charge_type"], bill["includes_usage"]) for bill in bills} == {("new", False), ("renewal", True)}


def test_endpoint_filters_types(there: World, shop: Merchant) -> None:
    listen(there, shop, "refund.succeeded")
    paid = there.buy(there.customer(), there.pack())
    there.control(f"refund/{paid['payment_id']}")
    shop.wait(1)
    assert shop.types() == ["refund.succeeded"]


@pytest.mark.parametrize("refusal", [500, 404, 302, 401])
def test_refused_webhook_is_retried_with_its_id(there: World, shop: Merchant, refusal: int) -> None:
    there.control("settings", webhook_speed=1000)
    shop.answers = [refusal, refusal, 204]
    listen(there, shop)
    there.buy(there.customer(), there.pack())
    attempts = shop.wait(3)
    assert len({one.id for one in attempts}) == 1
    eventually(lambda: deliveries(there)[0]["state"] == "delivered")
    assert deliveries(there)[0]["attempts"] == 3


def test_webhook_fails_after_eight_attempts(there: World, shop: Merchant) -> None:
    there.control("settings", webhook_speed=10_000_000)
    shop.answers = [500] * 20
    listen(there, shop)
    there.buy(there.customer(), there.pack())
    eventually(lambda: bool(deliveries(there)) and deliveries(there)[0]["state"] == "failed")
    assert len(shop.received) == len(RETRY_DELAYS_S) == 8


def test_retry_delays(tmp_path: Path) -> None:
    store, now = Store(tmp_path), [0]
    outbox = Outbox(store, lambda: now[0])
    refund = RefundRecord.model_construct(refund_id="ref_1")
    outbox.emit("refund.succeeded", "refund", refund, ["ep"], 0)
    spacing = []
    while (due := next((one.due_ms for one in outbox.recent() if one.state == "pending"), None)) is not None:
        spacing.append((due - now[0]) // 1000)
        now[0] = due
        (delivery,) = outbox.due()
        assert isinstance(delivery, Delivery)
        outbox.sent(delivery, accepted=False, status="500", speed=1)
    assert tuple(spacing) == RETRY_DELAYS_S == (0, 5, 300, 1_800, 7_200, 18_000, 36_000, 36_000)
    store.close()


def test_unreachable_endpoint_is_retried(there: World, shop: Merchant) -> None:
    there.control("settings", webhook_speed=100)
    endpoint = there.dodo.webhooks.create(url="http://127.0.0.1:9/hook").id
    there.buy(there.customer(), there.pack())
    eventually(lambda: deliveries(there)[0]["last_status"] == "ConnectError")
    there.dodo.webhooks.update(endpoint, url=shop.url)
    there.control("webhooks/flush")
    shop.wait(1)


def test_payload_is_the_latest(there: World, shop: Merchant) -> None:
    there.control("settings", webhooks_paused=True)
    listen(there, shop, "payment.succeeded")
    paid = there.buy(there.customer(), there.pack())
    there.control(f"refund/{paid['payment_id']}")
    assert shop.received == []
    there.control("settings", webhooks_paused=False)
    webhook = shop.wait(1)[0]
    assert (webhook.type, webhook.data["refund_status"]) == ("payment.succeeded", "full")


def test_webhooks_survive_a_restart(tmp_path: Path, shop: Merchant) -> None:
    with world(tmp_path, webhook_secret=SECRET) as before:
        before.control("settings", webhooks_paused=True)
        listen(before, shop)
        before.buy(before.customer(), before.pack())
    with world(tmp_path, webhook_secret=SECRET) as after:
        assert [one["state"] for one in deliveries(after)] == ["pending"]
        after.control("settings", webhooks_paused=False)
        webhook = shop.wait(1)[0]
        after.dodo.webhooks.unwrap(webhook.body.decode(), headers=webhook.headers, key=SECRET)


def test_new_secret_applies_to_old_endpoints(tmp_path: Path, shop: Merchant) -> None:
    with world(tmp_path) as before:
        endpoint = listen(before, shop)
        assert before.dodo.webhooks.retrieve_secret(endpoint).secret != SECRET
    with world(tmp_path, webhook_secret=SECRET) as after:
        assert after.dodo.webhooks.retrieve_secret(endpoint).secret == SECRET
        after.buy(after.customer(), after.pack())
        webhook = shop.wait(1)[0]
        after.dodo.webhooks.unwrap(webhook.body.decode(), headers=webhook.headers, key=SECRET)


def test_signatures_use_real_time(there: World, shop: Merchant) -> None:
    there.days(400)
    listen(there, shop)
    there.buy(there.customer(), there.pack())
    webhook = shop.wait(1)[0]
    there.dodo.webhooks.unwrap(webhook.body.decode(), headers=webhook.headers, key=SECRET)
    assert json.loads(webhook.body)["timestamp"] > "2027"


@pytest.mark.parametrize("concurrent", [False, True])
def test_redelivery_keeps_the_id(there: World, shop: Merchant, concurrent: bool) -> None:
    listen(there, shop)
    there.buy(there.customer(), there.pack())
    first = shop.wait(1)[0].id
    answer = there.control(f"webhooks/{first}/redeliver", times=5, concurrent=concurrent)
    assert answer.json() == {"statuses": ["200"] * 5}
    assert {one.id for one in shop.received} == {first}
    assert len(shop.received) == 6
    assert there.http.post("/_sandbox/webhooks/msg_none/redeliver").status_code == 404


def test_redelivery_out_of_order(there: World, shop: Merchant) -> None:
    listen(there, shop, "payment.succeeded")
    customer = there.customer()
    for _ in range(3):
        there.buy(customer, there.pack())
    shop.wait(3)
    order = [one["webhook_id"] for one in reversed(deliveries(there))]
    shop.received.clear()
    there.control("webhooks/redeliver", order="reverse")
    assert [one.id for one in shop.received] == order[::-1]
    shop.received.clear()
    there.control("webhooks/redeliver", ids=[order[1], order[0], order[1]], times=2)
    assert [one.id for one in shop.received] == [order[1], order[1], order[0], order[0], order[1], order[1]]


def test_copies_share_an_id(there: World, shop: Merchant) -> None:
    there.control("settings", webhook_copies=3, webhooks_shuffled=True)
    listen(there, shop)
    there.buy(there.customer(), there.pack())
    assert len({one.id for one in shop.wait(3)}) == 1


def test_deleted_endpoint_gets_nothing(there: World, shop: Merchant) -> None:
    gone, off = listen(there, shop), listen(there, shop)
    there.dodo.webhooks.delete(gone)
    there.dodo.webhooks.update(off, disabled=True)
    there.buy(there.customer(), there.pack())
    assert deliveries(there) == []
