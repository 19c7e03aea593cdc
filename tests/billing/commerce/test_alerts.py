"""Failed payments and dunning make notices: once each, whatever the delivery's id, and only about tenants."""

import pytest

from billing.commerce.inbox import Outcome
from billing.notices.log import Notices
from billing.notices.notice import NoticeKind
from billing.usage import TenantId
from tests.support.world import DAY, World, delivery

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
