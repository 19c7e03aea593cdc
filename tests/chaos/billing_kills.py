"""Kill two billing actors again and again at one point of the export, while usage is settled.

The actor is the class that Ray runs, in a process of its own without Ray.
"""

import asyncio
import random

from billing.ledger.account import Funding, HoldRequest, Settlement
from billing.money import Nanos
from billing.pricing.prices import Price
from billing.usage import RequestId, Status, TenantId, Usage
from tests.chaos.billing_process import AFTER_SEAL, AFTER_SEND, BEFORE_SEAL, BETWEEN_ACKS, BillingSpec, bill
from tests.chaos.failpoint import Failpoint
from tests.chaos.proof import close_books
from tests.chaos.rig import ProcessStarter, Rig, open_rig, open_world, tenant_with
from tests.chaos.table import Row
from tests.support.world import World

NAME = "billing-kills"
POINTS = {BEFORE_SEAL: 12, AFTER_SEAL: 12, AFTER_SEND: 2, BETWEEN_ACKS: 8}
"""By failpoint, the most times that a process may pass it before it is killed there."""
KILLS, ACTORS = 20, 2
TENANTS = tuple(TenantId(f"tenant-{number}") for number in range(8))
CREDIT = 2_000_000
"""Less than a tenant uses: the rest is overage, which Dodo invoices."""
PRICE = Price.model_validate({"input_per_1m": "333.333333", "output_per_1m": "1777.777777"})
CAP = Funding(credit_limit=Nanos(10**12))
PAUSE_S = 0.01
SEED = 20_261_127


def run() -> list[Row]:
    starter = ProcessStarter("tests.chaos.billing_process")
    with open_rig() as rig:
        return asyncio.run(_run(rig, starter))


async def _run(rig: Rig, starter: ProcessStarter) -> list[Row]:
    async with open_world(rig) as world:
        for name in TENANTS:
            await tenant_with(world, name, CREDIT)
        return [await _kill_at(point, world, rig, starter) for point in POINTS]


async def _kill_at(point: str, world: World, rig: Rig, starter: ProcessStarter) -> Row:
    receipts: dict[str, int] = {}
    chance = random.Random(f"{SEED}:{point}")
    using = asyncio.create_task(_use_until_cancelled(point, world, receipts))
    passes = [chance.randint(1, POINTS[point]) for _ in range(KILLS)]
    await asyncio.gather(*(_kill_often(starter, rig, point, passes[number::ACTORS]) for number in range(ACTORS)))
    using.cancel()
    await asyncio.wait([using])
    assert using.cancelled(), using.exception()
    books = await close_books(world)
    return books.row(f"billing actor killed {point}", KILLS, receipts)


async def _kill_often(starter: ProcessStarter, rig: Rig, point: str, passes: list[int]) -> None:
    for number in passes:
        await starter.run_until_killed(bill, BillingSpec(rig.environ, Failpoint(point, number)))


async def _use_until_cancelled(point: str, world: World, receipts: dict[str, int]) -> None:
    """Hold and settle, and keep what each receipt said."""
    chance, number = random.Random(f"{SEED}:{point}:use"), 0
    while True:
        number += 1
        request = _request(f"req_{point.replace(' ', '_')}_{number}", chance)
        await world.ledger.hold(request)
        usage = Usage(request.prompt_tokens, completion_tokens=chance.randint(0, request.max_tokens))
        charge = request.price.charge(usage)
        settlement = Settlement(request.request_id, request.tenant, usage, charge, Status.COMPLETE)
        record = (await world.ledger.settle(settlement)).record
        receipts[record.record_id] = record.charged_nanos
        await asyncio.sleep(PAUSE_S)


def _request(request_id: str, chance: random.Random) -> HoldRequest:
    return HoldRequest(
        request_id=RequestId(request_id),
        tenant=chance.choice(TENANTS),
        key_id="key",
        model="pirate",
        adapter="pirate",
        adapter_class="default",
        plan="prepaid",
        price=PRICE,
        prompt_tokens=chance.randint(1, 100),
        max_tokens=chance.randint(1, 100),
        funding=CAP,
    )
