"""A saved card is charged once per attempt, whatever Dodo answers; what became of it is found out, never guessed."""

import asyncio
from contextlib import suppress
from dataclasses import replace

import pytest

from billing.catalog.catalog import Catalog
from billing.catalog.terms import Terms
from billing.commerce.auto_refill.refill import COOLDOWN_MS, AttemptState, Refill, refusal_of
from billing.commerce.auto_refill.refiller import LOST_MS, Refiller
from billing.commerce.auto_refill.store import Refills
from billing.commerce.dodo_ids import keep_ids
from billing.commerce.sync import sync
from billing.dodo.errors import DodoUnavailable
from billing.ledger.account import Bucket, Funding, Grant
from billing.ledger.admission import funding_for, plan_of
from billing.notices.log import Notices
from billing.notices.notice import NoticeKind
from billing.tenants.tenant import Subscription, SubscriptionStatus
from billing.usage import BucketId, TenantId, Unit
from tests.support.hiccup import fail_next_notice
from tests.support.purchases import AUTH, balance, spend
from tests.support.samples import request
from tests.support.world import CATALOG, DAY, MINUTE, World, delivery

ACME, USD = TenantId("acme"), 1_000_000_000
SMALL = Refill(pack="small", threshold_nanos=USD, monthly_cap_cents=1_500)


def refiller(world: World) -> Refiller:
    return Refiller(world.commerce())


async def low(world: World, refill: Refill = SMALL) -> Refills:
    """A tenant with a saved card, auto-refill and nothing left."""
    await world.tenant("acme")
    await world.buy("acme", "pack:small")  # saves the card; its webhook never comes, so nothing is granted
    world.clock.move(1_000)
    refills = Refills(world.redis)
    await refills.put(ACME, refill)
    return refills


async def state(refills: Refills) -> Refill:
    found = await refills.get(ACME)
    assert found is not None
    return found


async def charges(world: World) -> int:
    """Payments at Dodo that belong to a refill."""
    listed = (await world.operator.get("/payments?page_size=100", headers=AUTH)).json()["items"]
    return sum("farebox_refill" in payment["metadata"] for payment in listed)


async def decline(world: World, declines: bool = True) -> None:
    customer = (await world.tenants.get(ACME)).dodo_customer_id
    await world.operator.post(f"/_sandbox/customers/{customer}/card", json={"declines": declines})


async def test_low_balance_is_refilled_once(world: World) -> None:
    refills = await low(world)
    assert await refiller(world).run_once(world.sweep()) == 1
    assert await balance(world) == 5 * USD
    for _ in range(3):
        world.clock.move(COOLDOWN_MS)
        assert await refiller(world).run_once(world.sweep()) == 0, "there is enough now"
    assert await charges(world) == 1
    (attempt,) = (await state(refills)).attempts
    assert attempt.state is AttemptState.SUCCEEDED
    (notice,) = await Notices(world.redis).newest()
    assert (notice.kind, notice.tenant, notice.facts["amount_usd"]) == (NoticeKind.REFILL_SUCCEEDED, ACME, "5.00")


async def test_pack_on_other_terms_is_not_charged(world: World) -> None:
    """Its tenant agreed to $5 for $5: neither $50 for $50 nor $5 for $4 is that."""
    agreed = SMALL.model_copy(update={"terms": Terms.of_pack("small", world.catalog.packs["small"]).key})
    refills = await low(world, agreed.model_copy(update={"monthly_cap_cents": 100_000}))
    dear = {"small": {"price": "50", "grants": {"usd": "50"}}}
    world.catalog = Catalog.model_validate(CATALOG | {"packs": dear})
    await sync(world.dodo, world.redis, world.catalog)
    for _ in range(2):
        assert await refiller(world).run_once(world.sweep()) == 0
    assert await charges(world) == 0
    found = await state(refills)
    assert (found.is_on, "other terms" in found.stopped_because) == (False, True)
    (notice,) = await Notices(world.redis).newest()
    assert (notice.kind, notice.tenant) == (NoticeKind.REFILL_STOPPED, ACME)


async def test_pack_off_sale_stops_auto_refill(world: World) -> None:
    refills = await low(world)
    world.catalog = Catalog.model_validate(CATALOG | {"packs": {}})
    assert await refiller(world).run_once(world.sweep()) == 0
    found = await state(refills)
    assert (found.is_on, "sold no more" in found.stopped_because) == (False, True)


async def test_monthly_cap_counts_the_tax(world: World) -> None:
    """At 19 % a pack of $5 costs $5.95: a cap of $10 pays for one."""
    await world.operator.post("/_sandbox/settings", json={"tax_bps": 1_900})
    refills = await low(world, SMALL.model_copy(update={"monthly_cap_cents": 1_000}))
    for _ in range(2):
        await refiller(world).run_once(world.sweep())
        world.clock.move(COOLDOWN_MS)
        if await balance(world):
            await spend(world, "5")
    assert (await charges(world), (await state(refills)).month_cents) == (1, 595)
    (notice,) = await Notices(world.redis).newest()
    assert notice.facts["amount_usd"] == "5.95"


async def test_refill_of_before_agreed_to_the_terms_of_its_time(world: World) -> None:
    """Set up under 0.1, whose products a migration gave the terms in force then."""
    refills = await low(world, SMALL.model_copy(update={"monthly_cap_cents": 100_000}))
    await keep_ids(world.redis, {"pack:small": await world.product("pack:small")})
    world.catalog = Catalog.model_validate(CATALOG | {"packs": {"small": {"price": "50", "grants": {"usd": "4"}}}})
    await sync(world.dodo, world.redis, world.catalog)
    assert await refiller(world).run_once(world.sweep()) == 0
    assert (await charges(world), (await state(refills)).is_on) == (0, False)


async def test_price_changed_at_dodo_is_not_charged(world: World) -> None:
    """A merchant can change it in Dodo's dashboard: the tenant agreed to $5, not to $90."""
    refills = await low(world, SMALL.model_copy(update={"monthly_cap_cents": 100_000}))
    path = f"/products/{await world.product('pack:small')}"
    price = (await world.operator.get(path, headers=AUTH)).json()["price"]
    (await world.operator.patch(path, json={"price": price | {"price": 9_000}}, headers=AUTH)).raise_for_status()
    assert await refiller(world).run_once(world.sweep()) == 0
    assert (await charges(world), (await state(refills)).is_on) == (0, False)


async def test_pack_on_the_agreed_terms_is_charged(world: World) -> None:
    await low(world, SMALL.model_copy(update={"terms": Terms.of_pack("small", world.catalog.packs["small"]).key}))
    assert await refiller(world).run_once(world.sweep()) == 1
    assert await balance(world) == 5 * USD


async def test_invoice_of_a_refill_names_its_pack(world: World) -> None:
    await low(world)
    await refiller(world).run_once(world.sweep())
    customer_id = (await world.tenants.get(ACME)).dodo_customer_id
    newest, *_ = await world.dodo.invoices(customer_id, 0, 10)
    assert (newest.product, newest.total_amount) == ("pack:small", 500)


async def test_allowance_of_another_plan_does_not_prevent_a_refill(world: World) -> None:
    await low(world)
    left = Bucket(BucketId("allowance:free"), Unit.NANOS, 9 * USD, 9 * USD, world.clock() + DAY, is_allowance=True)
    await world.ledger.hold(request(funding=Funding(left)))
    assert await refiller(world).run_once(world.sweep()) == 1


async def test_webhook_of_a_refill_grants_nothing_more(world: World) -> None:
    refills = await low(world)
    await refiller(world).run_once(world.sweep())
    payment_id = (await state(refills)).attempts[0].payment_id
    payment = (await world.operator.get(f"/payments/{payment_id}", headers=AUTH)).json()
    await world.webhooks().receive(*delivery("payment.succeeded", payment))
    assert await balance(world) == 5 * USD


async def test_declined_card_switches_auto_refill_off(world: World) -> None:
    refills = await low(world)
    await decline(world)
    assert await refiller(world).run_once(world.sweep()) == 1
    stopped = await state(refills)
    assert (stopped.is_on, stopped.stopped_because) == (False, "the payment is failed")
    await decline(world, False)
    world.clock.move(DAY)
    assert await refiller(world).run_once(world.sweep()) == 0
    assert (await charges(world), await balance(world)) == (1, 0)
    assert (await Notices(world.redis).newest())[0].kind is NoticeKind.REFILL_FAILED


async def test_charge_with_a_lost_answer_is_found_again(world: World) -> None:
    refills = await low(world)
    await world.fault("timeout_after_commit", path="/checkouts", times=1)
    await refiller(world).run_once(world.sweep())
    assert (await state(refills)).attempts[0].state is AttemptState.STARTED
    await world.heal()
    assert await refiller(world).run_once(world.sweep()) == 0
    assert (await charges(world), await balance(world)) == (1, 5 * USD)
    assert (await state(refills)).attempts[0].state is AttemptState.SUCCEEDED


@pytest.mark.parametrize("minutes", [-600, -20, -1, 1, 20, 600])
async def test_charge_with_a_lost_answer_is_found_though_dodos_clock_is_another(world: World, minutes: int) -> None:
    """Dodo's clock is ahead by so many minutes."""
    refills = await low(world)
    ours = Refiller(replace(world.commerce(), clock=lambda: world.clock() - minutes * MINUTE))
    await world.fault("drop_after", path="/checkouts", times=1)
    await ours.run_once(world.sweep())
    await world.heal()
    world.clock.move(LOST_MS + 1)
    await ours.run_once(world.sweep())
    assert (await state(refills)).attempts[0].state is AttemptState.SUCCEEDED
    assert (await charges(world), await balance(world)) == (1, 5 * USD)


@pytest.mark.parametrize("status", [400, 403, 404, 422])
async def test_charge_that_was_made_though_its_answer_is_a_refusal_is_no_failure(world: World, status: int) -> None:
    """As a proxy between us and Dodo may answer."""
    refills = await low(world)
    await world.fault(f"status_after:{status}", path="/checkouts", times=1)
    await refiller(world).run_once(world.sweep())
    assert (await state(refills)).attempts[0].state is AttemptState.SUCCEEDED
    assert (await charges(world), await balance(world)) == (1, 5 * USD)


async def test_refused_charge_is_open_while_it_cannot_be_looked_up(world: World) -> None:
    refills = await low(world)
    await world.fault("status:422", path="/checkouts", times=1)
    await world.fault("status:500", path="/payments", times=1)
    with suppress(DodoUnavailable):
        await refiller(world).run_once(world.sweep())
    assert (await state(refills)).open_attempt is not None
    world.clock.move(LOST_MS + 1)
    await refiller(world).run_once(world.sweep())
    assert (await state(refills)).attempts[0].state is AttemptState.FAILED


async def test_charge_unknown_to_dodo_fails_after_an_hour(world: World) -> None:
    refills = await low(world)
    await world.fault("drop_before", path="/checkouts", times=1)
    await refiller(world).run_once(world.sweep())
    await world.heal()
    world.clock.move(LOST_MS)
    assert await refiller(world).run_once(world.sweep()) == 0
    assert (await state(refills)).open_attempt is not None, "not yet"
    world.clock.move(1)
    await refiller(world).run_once(world.sweep())
    given_up = await state(refills)
    assert (given_up.is_on, given_up.attempts[0].state) == (False, AttemptState.FAILED)
    assert await charges(world) == 0


async def test_open_attempt_waits_while_dodo_is_unavailable(world: World) -> None:
    refills = await low(world)
    await world.fault("drop_after", path="/checkouts", times=1)
    await refiller(world).run_once(world.sweep())
    await world.fault("status:500", path="/payments")
    assert await refiller(world).run_once(world.sweep()) == 0
    assert (await state(refills)).open_attempt is not None
    await world.heal()
    await refiller(world).run_once(world.sweep())
    assert (await charges(world), await balance(world)) == (1, 5 * USD)


async def test_two_actors_charge_once(world: World) -> None:
    await low(world)
    await asyncio.gather(*(refiller(world).run_once(world.sweep()) for _ in range(4)))
    assert (await charges(world), await balance(world)) == (1, 5 * USD)


async def test_monthly_cap_holds(world: World) -> None:
    await low(world, SMALL.model_copy(update={"threshold_nanos": 2**52, "monthly_cap_cents": 1_499}))
    for _ in range(5):
        await refiller(world).run_once(world.sweep())
        world.clock.move(COOLDOWN_MS)
    assert await charges(world) == 2


async def test_tenant_without_card_has_auto_refill_switched_off(world: World) -> None:
    await world.tenant("acme")
    refills = Refills(world.redis)
    await refills.put(ACME, SMALL)
    assert await refiller(world).run_once(world.sweep()) == 0
    assert "by hand" in (await state(refills)).stopped_because


async def test_sufficient_balance_is_not_refilled(world: World) -> None:
    await low(world)
    await world.ledger.grant(Grant("operator:gift", ACME, Unit.NANOS, USD + 1))
    assert await refiller(world).run_once(world.sweep()) == 0
    assert await charges(world) == 0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"pack": "nowhere"}, "choose one of small"),
        ({"pack": "calls"}, "no pack of dollars"),
        ({"threshold_nanos": 5 * USD}, "below what the pack gives"),
        ({"monthly_cap_cents": 499}, "does not pay for one pack"),
    ],
)
async def test_contradictory_refill_is_refused(world: World, change: dict[str, object], word: str) -> None:
    assert refusal_of(SMALL, world.catalog.packs) is None
    assert word in str(refusal_of(SMALL.model_copy(update=change), world.catalog.packs))


@pytest.mark.parametrize("status", [SubscriptionStatus.PAUSED, SubscriptionStatus.ON_HOLD])
async def test_paused_subscription_charges_no_card(world: World, status: SubscriptionStatus) -> None:
    await low(world, Refill(pack="small", threshold_nanos=USD, monthly_cap_cents=1_500))
    subscription = Subscription(
        id="sub_1",
        plan="pro",
        status=SubscriptionStatus.ACTIVE,
        period_start_ms=world.clock() - DAY,
        period_end_ms=world.clock() + 20 * DAY,
    )
    tenant = await world.tenants.update(
        ACME, lambda t: t.model_copy(update={"subscription": subscription, "plan": "pro"})
    )
    funding = funding_for(tenant, plan_of(tenant, world.catalog), world.clock())
    await world.ledger.hold(request(funding=funding))
    assert await refiller(world).run_once(world.sweep()) == 0
    rests = subscription.model_copy(update={"status": status})
    tenant = await world.tenants.update(ACME, lambda t: t.model_copy(update={"subscription": rests}))
    assert await refiller(world).run_once(world.sweep()) == 0
    await world.ledger.grant(Grant("payment:x", ACME, Unit.NANOS, USD // 2))
    while_resting = funding_for(tenant, plan_of(tenant, world.catalog), world.clock())
    await world.ledger.hold(request("req_resting", funding=while_resting))
    assert await refiller(world).run_once(world.sweep()) == 0


@pytest.mark.parametrize("declines", [True, False])
async def test_notice_of_a_refill_survives_a_store_that_was_away(
    world: World, monkeypatch: pytest.MonkeyPatch, declines: bool
) -> None:
    await low(world)
    await decline(world, declines)
    fail_next_notice(monkeypatch)
    assert await refiller(world).run_once(world.sweep()) == 0, "the run failed with the notice"
    await refiller(world).run_once(world.sweep())
    assert [notice.kind for notice in await Notices(world.redis).newest()] == [
        NoticeKind.REFILL_FAILED if declines else NoticeKind.REFILL_SUCCEEDED
    ]
    assert (await charges(world), await balance(world)) == (1, 0 if declines else 5 * USD)
