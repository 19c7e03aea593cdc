"""Failed payments, dunning, refunds, disputes and money that waits make notices, once each."""

import pytest

from billing.commerce.alerts import WAITS_LONG_MS
from billing.commerce.decisions import Decisions
from billing.commerce.inbox import Outcome
from billing.notices.log import Notices
from billing.notices.notice import NoticeKind
from billing.store.errors import StoreUnavailable
from billing.usage import TenantId
from tests.support.hiccup import fail_next_notice
from tests.support.purchases import refund
from tests.support.world import DAY, HOUR, MINUTE, World, delivery

ACME = TenantId("acme")


async def recorded(world: World) -> list[NoticeKind]:
    return [notice.kind for notice in reversed(await Notices(world.redis).newest())]


async def declined(world: World) -> dict[str, object]:
    tenant = await world.tenants.get(ACME)
    url = await world.dodo.checkout(tenant, await world.product("pack:small"), {}, "http://127.0.0.1/")
    paid = await world.operator.post(f"/_sandbox/pay/{url.rpartition('/')[2]}", json={"decline": True})
    payment: dict[str, object] = paid.json()
    return payment


async def test_failed_payment_is_noticed_once(world: World) -> None:
    await world.tenant("acme")
    payment = await declined(world)
    for webhook_id in ("msg_1", "msg_1", "msg_2"):
        applied = await world.webhooks().receive(*delivery("payment.failed", payment, webhook_id))
        assert applied.outcome is Outcome.APPLIED
    (notice,) = await Notices(world.redis).newest()
    assert (notice.kind, notice.tenant) == (NoticeKind.PAYMENT_FAILED, ACME)
    assert notice.facts["error_code"] == "CARD_DECLINED"
    assert (await world.ledger.account(ACME)).buckets == ()


async def test_failed_payment_of_unknown_customer_makes_no_notice(world: World) -> None:
    await world.tenant("acme")
    payment = await declined(world)
    unknown = payment | {"customer": {"customer_id": "cus_unknown"}}
    assert (await world.webhooks().receive(*delivery("payment.failed", unknown))).outcome is Outcome.KEPT
    assert await recorded(world) == []


@pytest.mark.parametrize("grace_days", [0, 3])
async def test_failing_renewal_is_noticed_from_start_to_end(world: World, grace_days: int) -> None:
    await world.tenant("acme", plan="payg")
    one = str((await world.buy("acme", "plan:payg"))["subscription_id"])
    customer = (await world.tenants.get(ACME)).dodo_customer_id
    await world.operator.post("/_sandbox/settings", json={"past_due_grace_days": grace_days})
    await world.operator.post(f"/_sandbox/customers/{customer}/card", json={"declines": True})
    world.clock.move(32 * DAY)
    failed = (await world.operator.post(f"/_sandbox/subscriptions/{one}/renew")).json()
    state = "past_due" if grace_days else "on_hold"
    assert failed["status"] == state
    await world.webhooks().receive(*delivery(f"subscription.{state}", failed))
    dunning = {"customer_id": customer, "subscription_id": one, "trigger_state": state, "created_at": "2026-12-01"}
    for number, kind in enumerate(("dunning.started", "dunning.recovered", "dunning.started")):
        await world.webhooks().receive(*delivery(kind, dunning, f"msg_dunning_{number}"))
    assert await recorded(world) == [f"subscription.{state}", "dunning.started", "dunning.recovered"]


async def test_dispute_is_noticed_from_opening_to_end(world: World) -> None:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    await world.webhooks().receive(*delivery("payment.succeeded", payment, "msg_paid"))
    opened = (await world.operator.post(f"/_sandbox/disputes/{payment['payment_id']}", json={"amount": 200})).json()
    won = (await world.operator.post(f"/_sandbox/disputes/{opened['dispute_id']}/won")).json()
    for number, (name, data) in enumerate((("opened", opened), ("opened", opened), ("won", won))):
        await world.webhooks().receive(*delivery(f"dispute.{name}", data, f"msg_{number}"))
    assert await recorded(world) == [NoticeKind.DISPUTE_OPENED, NoticeKind.DISPUTE_WON]
    notice = (await Notices(world.redis).newest())[1]
    assert (notice.tenant, notice.facts["payment_id"], notice.facts["amount"]) == (ACME, payment["payment_id"], "200")


async def test_each_refund_of_a_payment_is_noticed(world: World) -> None:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    await world.webhooks().receive(*delivery("payment.succeeded", payment, "msg_paid"))
    for cents in (100, 150):
        made = await refund(world, payment, cents)
        for copy in range(2):
            await world.webhooks().receive(*delivery("refund.succeeded", made, f"msg_{cents}_{copy}"))
    assert [notice.facts["amount"] for notice in await Notices(world.redis).newest()] == ["150", "100"]
    assert await recorded(world) == 2 * [NoticeKind.REFUND_SUCCEEDED]


@pytest.mark.parametrize(("type_", "is_noticed"), [("payment.succeeded", True), ("subscription.active", False)])
async def test_money_that_waits_for_long_is_noticed_once(world: World, type_: str, is_noticed: bool) -> None:
    await world.tenant("acme")
    payment = await world.buy("acme", "pack:small")
    waits = payment | {"customer": {"customer_id": "cus_later"}, "subscription_id": "sub_unknown"}
    webhooks = world.webhooks()
    await webhooks.receive(*delivery(type_, waits))
    world.clock.move(WAITS_LONG_MS - MINUTE)
    await webhooks.replay(world.sweep())
    assert await recorded(world) == [], "it may still come right by itself"
    for _ in range(3):
        world.clock.move(HOUR)
        await webhooks.replay(world.sweep())
    assert await recorded(world) == [NoticeKind.WEBHOOK_WAITING] * is_noticed
    for notice in await Notices(world.redis).newest():
        assert (notice.facts["payment_id"], "cus_later" in notice.facts["reason"]) == (payment["payment_id"], True)


async def test_notice_of_a_refund_survives_a_store_that_was_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.tenant("acme")
    payment, webhooks = await world.buy("acme", "pack:small"), world.webhooks()
    await webhooks.receive(*delivery("payment.succeeded", payment, "msg_paid"))
    signed = delivery("refund.succeeded", await refund(world, payment))
    fail_next_notice(monkeypatch)
    with pytest.raises(StoreUnavailable):
        await webhooks.receive(*signed)
    world.clock.move(HOUR)
    assert await webhooks.replay(world.sweep()) == 1
    assert await recorded(world) == [NoticeKind.REFUND_SUCCEEDED]


async def test_notice_of_money_that_waits_survives_a_store_that_was_away(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.tenant("acme")
    waits, webhooks = (
        await world.buy("acme", "pack:small") | {"customer": {"customer_id": "cus_later"}},
        world.webhooks(),
    )
    await webhooks.receive(*delivery("payment.succeeded", waits))
    world.clock.move(HOUR)
    fail_next_notice(monkeypatch)
    sweep = world.sweep()
    await webhooks.replay(sweep)
    assert [one.error_type for one in sweep.failing] == [StoreUnavailable]
    world.clock.move(HOUR)
    await webhooks.replay(sweep)
    assert await recorded(world) == [NoticeKind.WEBHOOK_WAITING]


async def test_notice_of_a_drop_survives_a_store_that_was_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.tenant("acme")
    waits = await world.buy("acme", "pack:small") | {"customer": {"customer_id": "cus_later"}}
    await world.webhooks().receive(*delivery("payment.succeeded", waits))
    decisions = Decisions(world.redis, world.clock)
    fail_next_notice(monkeypatch)
    with pytest.raises(StoreUnavailable):
        await decisions.drop("msg_1", "why not")
    await decisions.drop("msg_1", "why not")
    assert await recorded(world) == [NoticeKind.WEBHOOK_DROPPED]
