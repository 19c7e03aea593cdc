"""Two billing actors at once, each killed again and again at one point of the export, while usage is settled.

The actor is the class that Ray runs, in processes of their own without Ray.
"""

import asyncio
import random

from billing.ledger.account import Funding, HoldRequest, Settlement
from billing.money import Nanos
from billing.pricing.prices import Price
from billing.usage import RequestId, Status, TenantId, Usage
from tests.chaos.billing_process import AFTER_SEAL, AFTER_SEND, BEFORE_SEAL, BETWEEN_ACKS, BillingSpec, bill
from tests.chaos.fuse import Fuse
from tests.chaos.house import Forks, House, house, tenant_with, world
from tests.chaos.proof import close_books
from tests.chaos.table import Row
from tests.support.world import World

NAME = "billing-kills"
POINTS = {BEFORE_SEAL: 12, AFTER_SEAL: 12, AFTER_SEND: 2, BETWEEN_ACKS: 8}
"""By point, the highest number of times that a process passes it before it dies there."""
KILLS, ACTORS = 20, 2
TENANTS = tuple(TenantId(f"tenant-{number}") for number in range(8))
CREDIT = 2_000_000
"""Less than a tenant uses: the rest becomes overage, which is the kind that Dodo invoices."""
PRICE = Price.model_validate({"input_per_1m": "333.333333", "output_per_1m": "1777.777777"})
CAP = Funding(credit_limit=Nanos(10**12))
PAUSE_S = 0.01
SEED = 20_261_127


def run() -> list[Row]:
    forks = Forks("tests.chaos.billing_process")
    with house() as at:
        return asyncio.run(_run(at, forks))


async def _run(at: House, forks: Forks) -> list[Row]:
    async with world(at) as there:
        for name in TENANTS:
            await tenant_with(there, name, CREDIT)
        return [await _kill_at(point, there, at, forks) for point in POINTS]


async def _kill_at(point: str, there: World, at: House, forks: Forks) -> Row:
    receipts: dict[str, int] = {}
    chance = random.Random(f"{SEED}:{point}")
    using = asyncio.create_task(_use_for_ever(point, there, receipts))
    passes = [chance.randint(1, POINTS[point]) for _ in range(KILLS)]
    await asyncio.gather(*(_die_often(forks, at, point, passes[number::ACTORS]) for number in range(ACTORS)))
    using.cancel()
    await asyncio.wait([using])
    assert using.cancelled(), using.exception()
    books = await close_books(there)
    return books.row(f"billing actor killed {point}", KILLS, receipts)


async def _die_often(forks: Forks, at: House, point: str, passes: list[int]) -> None:
    for number in passes:
        await forks.live(bill, BillingSpec(at.environ, Fuse(point, number)))


async def _use_for_ever(point: str, there: World, receipts: dict[str, int]) -> None:
    """Hold and settle; what was acknowledged is written down."""
    chance, number = random.Random(f"{SEED}:{point}:use"), 0
    while True:
        number += 1
        request = _request(f"req_{point.replace(' ', '_')}_{number}", chance)
        await there.ledger.hold(request)
        usage = Usage(request.prompt_tokens, completion_tokens=chance.randint(0, request.max_tokens))
        charge = request.price.charge(usage)
        settlement = Settlement(request.request_id, request.tenant, usage, charge, Status.COMPLETE)
        record = (await there.ledger.settle(settlement)).record
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
