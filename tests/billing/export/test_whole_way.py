"""From a real hold and settle to Dodo's invoice: three books, one sum."""

import asyncio
import random
import sys
from pathlib import Path

import pytest

from billing.export.outbox import Outbox
from billing.ledger.account import Funding, Grant, HoldRequest, Settlement
from billing.money import Nanos
from billing.pricing.prices import Price
from billing.usage import RequestId, Status, TenantId, Unit, Usage
from tests.support.world import World, assert_same

ACME = TenantId("acme")
PRICE = Price.model_validate({"input_per_1m": "1", "output_per_1m": "2"})
CAP = Funding(credit_limit=Nanos(10**9))


def asks(number: int) -> HoldRequest:
    return HoldRequest(
        request_id=RequestId(f"req_{number}"),
        tenant=ACME,
        key_id="key",
        model="base",
        adapter="base",
        adapter_class="default",
        plan="payg",
        price=PRICE,
        prompt_tokens=10,
        max_tokens=20,
        funding=CAP,
    )


async def test_ledger_records_and_dodo_agree_to_the_nano(world: World) -> None:
    await world.tenant("acme", plan="payg")
    await world.ledger.grant(Grant("payment:1", ACME, Unit.NANOS, 95_000))
    charged = overage = 0
    for number in range(9):
        await world.ledger.hold(asks(number))
        usage = Usage(prompt_tokens=10, completion_tokens=number)
        settlement = Settlement(RequestId(f"req_{number}"), ACME, usage, PRICE.charge(usage), Status.COMPLETE)
        record = (await world.ledger.settle(settlement)).record
        charged, overage = charged + record.charged_nanos, overage + record.overage_nanos
        if number % 4 == 3:
            await world.exporter().flush_once()
    await world.exporter().flush_once()
    exported = await world.exported()
    assert overage > 0
    assert exported[ACME, "charge_nanos"] == overage == (await world.ledger.account(ACME)).overage_nanos
    assert exported[ACME, "covered_nanos"] == charged - overage == 95_000
    assert (exported[ACME, "requests"], exported[ACME, "completion_tokens"]) == (9, sum(range(9)))


@pytest.mark.slow
async def test_sums_hold_over_kills_and_dodo_faults(world: World, store_url: str, repo: Path) -> None:
    """Two exporters at a time, each killed with SIGKILL at a random moment, while half the calls fail."""
    dice = random.Random(20_261_123)
    names = [f"tenant-{number}" for number in range(5)]
    for name in names:
        await world.tenant(name)
    await world.fault("status:500", "drop_before", "drop_after", "status_after:503", rate=0.5)
    for _ in range(3):
        exporters = [await _exporter(world, store_url, repo) for _ in range(2)]
        for exporter in exporters:
            for _ in range(20):
                await world.use(dice.choice(names), charged=dice.randrange(1, 10**9), overage=dice.randrange(2))
                await asyncio.sleep(dice.random() * 0.02)
            exporter.kill()
            await exporter.communicate()
    await world.heal()
    await world.exporter().flush_once()
    assert_same(await world.exported(), world.sums)
    sums = await Outbox(world.redis).sums()
    assert (sums.sealed_events, sums.dead_events) == (sums.acked_events, 0)
    assert sums.sealed_covered + sums.sealed_charge == sum(
        nanos for (_, key), nanos in world.sums.items() if key in ("covered_nanos", "charge_nanos")
    )


async def _exporter(world: World, store_url: str, repo: Path) -> asyncio.subprocess.Process:
    command = ["-m", "tests.billing.export.flush_process", store_url, str(world.operator.base_url)]
    pipe = asyncio.subprocess.PIPE
    exporter = await asyncio.create_subprocess_exec(sys.executable, *command, cwd=repo, stdout=pipe, stderr=pipe)
    assert exporter.stdout is not None
    assert await exporter.stdout.readline() == b"exporting\n"
    return exporter
