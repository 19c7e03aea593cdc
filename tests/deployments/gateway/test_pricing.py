"""Price modifiers on requests, and the price that an open hold keeps."""

from dataclasses import replace

import pytest

from billing.ledger.account import Progress
from billing.store.keys import shard_for
from billing.usage import TenantId, Usage
from deployments.gateway.load import LoadMeter
from deployments.inference.request import EngineStats
from tests.support.gateway import USER_CONFIG, Harness
from tests.support.samples import ACME, money, request, settlement
from tests.support.scripted import ScriptedLink

ALL_DAY = [
    {"start": "00:00", "end": "12:00", "multiplier": "0.5"},
    {"start": "12:00", "end": "00:00", "multiplier": "0.5"},
]
HALF = {"kind": "time", "multiplier": "0.5"}


def sell(harness: Harness, **pricing: object) -> None:
    catalog = harness.gateway.parts.catalog_holder.put(USER_CONFIG | {"pricing": pricing})
    assert not [one for one in catalog.rejected if one.id == "pricing"], catalog.rejected


def receipt(reply: object) -> dict[str, object]:
    found: dict[str, object] = reply.json()["receipt"]  # type: ignore[attr-defined]
    return found


async def test_list_price_has_no_modifiers(harness: Harness) -> None:
    shown = receipt(await harness.chat(await harness.tenant()))
    assert (shown["cost_usd"], shown["modifiers"]) == ("0.015000", [])


async def test_modifier_shown_on_receipt_record_and_quote(harness: Harness) -> None:
    key = await harness.tenant()
    sell(harness, time_of_day=ALL_DAY)
    shown = receipt(await harness.chat(key))
    assert shown["cost_usd"] == "0.007500"
    (reason,) = shown["modifiers"]  # type: ignore[misc]
    assert HALF.items() <= reason.items()
    listed = await harness.client.get("/v1/usage/records", headers={"authorization": f"Bearer {key}"})
    (record,) = listed.json()["data"]
    assert (record["modifiers"], record["price_version"]) == ([reason], shown["price_version"])
    quoted = (await harness.post(key, "/v1/quote", model="pirate", prompt="one two three", max_tokens=10)).json()
    assert (quoted["modifiers"], quoted["price_version"]) == ([reason], shown["price_version"])


async def test_free_model_has_no_modifiers(harness: Harness) -> None:
    sell(harness, time_of_day=ALL_DAY)
    shown = receipt(await harness.chat(await harness.tenant(), model="gratis"))
    assert (shown["cost_usd"], shown["modifiers"]) == ("0.000000", [])


async def test_volume_tier_counts_spend_of_month(harness: Harness) -> None:
    key = await harness.tenant()
    sell(harness, volume_tiers=[{"above": "0.03", "multiplier": "0.1"}])
    costs = [receipt(await harness.chat(key))["cost_usd"] for _ in range(4)]
    assert costs == ["0.015000", "0.015000", "0.001500", "0.001500"]
    assert receipt(await harness.chat(await harness.tenant("other")))["cost_usd"] == "0.015000", (
        "each tenant for itself"
    )


async def test_load_meter_measures_share_of_capacity(harness: Harness, link: ScriptedLink) -> None:
    catalog_holder = harness.gateway.parts.catalog_holder
    sell(harness, load={"starts_at": "0.5", "ceiling": "3"})
    meter = LoadMeter(link, catalog_holder, max_running=4)
    link.busy = EngineStats(running=2, waiting=0)
    await meter.measure()
    assert meter() == 5_000
    link.busy = EngineStats(running=4, waiting=8)
    await meter.measure()
    assert meter() == 30_000
    catalog_holder.put(USER_CONFIG)
    await meter.measure()
    assert meter() == 0, "load is not measured while it has no price"


async def test_running_request_keeps_its_price(harness: Harness, link: ScriptedLink) -> None:
    key = await harness.tenant()
    gateway = harness.gateway
    principal = await gateway.authenticate(f"Bearer {key}")
    old = gateway.parts.catalog_holder.current
    model = old.find("pirate", TenantId("acme"), None)
    hold = await gateway.parts.admission.admit(principal, model, old, request().request_id, 3, 10)
    sell(harness, time_of_day=ALL_DAY)
    dearer = receipt(await harness.chat(key))
    assert dearer["price_version"] != hold.request.price.version
    usage = Usage(prompt_tokens=3, completion_tokens=6)
    cost = hold.request.price.charge(usage)
    settled = await harness.gateway.parts.ledger.settle(
        replace(settlement(), request_id=hold.request.request_id, usage=usage, list_nanos=cost)
    )
    assert (settled.record.charged_nanos, settled.record.price_version) == (cost, model.price.version)
    assert settled.record.modifiers == ()


async def test_rejected_pricing_keeps_last_good_version(harness: Harness) -> None:
    sell(harness, time_of_day=ALL_DAY)
    catalog_holder = harness.gateway.parts.catalog_holder
    kept = catalog_holder.put(
        USER_CONFIG | {"pricing": {"time_of_day": [{"start": "9", "end": "10:00", "multiplier": "1"}]}}
    )
    assert kept.pricing.time_of_day
    assert [(one.id, "time of day" in one.reason) for one in kept.rejected if one.id == "pricing"] == [
        ("pricing", True)
    ]
    assert not catalog_holder.put(USER_CONFIG).pricing.time_of_day, "left out is taken away"


MARCH, APRIL = 1_772_323_200_000, 1_775_001_600_000


@pytest.mark.parametrize("is_expired", [False, True])
async def test_spend_counts_for_month_of_hold(harness: Harness, is_expired: bool) -> None:
    ledger = harness.gateway.parts.ledger
    await ledger.grant(money(10**9))
    lease = 1 if is_expired else 30_000
    for number, month in enumerate((MARCH, MARCH, APRIL, MARCH)):
        held = request(f"req_{number}", month_start_ms=month, lease_ms=lease)
        await ledger.hold(held)
        if is_expired:
            done = settlement(f"req_{number}")
            await ledger.checkpoint([Progress(held.request_id, ACME, done.usage, done.list_nanos)])
    if is_expired:
        await harness.redis.zadd(shard_for(ACME).leases, {f"req_{n}": 0 for n in range(4)})
    spent = []
    for number in range(4):
        if is_expired:
            await ledger.expire(limit=1)
        else:
            await ledger.settle(settlement(f"req_{number}"))
        spent.append((await ledger.spent(ACME, MARCH), await ledger.spent(ACME, APRIL)))
    assert spent == [(20_000, 0), (40_000, 0), (0, 20_000), (0, 20_000)], "March's last one comes too late to count"


async def test_no_spend_counted_without_volume_tiers(harness: Harness) -> None:
    await harness.gateway.parts.ledger.grant(money(10**9))
    await harness.gateway.parts.ledger.hold(request())
    await harness.gateway.parts.ledger.settle(settlement())
    assert await harness.gateway.parts.ledger.spent(ACME, 0) == 0
    assert await harness.redis.hget(shard_for(ACME).account(ACME), "spent") is None
