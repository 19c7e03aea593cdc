"""From a real hold and settle to Dodo's invoice: three books, one sum."""

from billing.account import Funding, Grant, HoldRequest, Settlement
from billing.money import Nanos
from billing.prices import Price
from billing.usage import RequestId, Status, TenantId, Unit, Usage
from tests.billing.dodo.world import World

ACME = TenantId("acme")
PRICE = Price.model_validate({"input_per_1m": "1", "output_per_1m": "2"})
CAP = Funding(overage_cap=Nanos(10**9))


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
    told = await world.told()
    assert overage > 0
    assert told[ACME, "charge_nanos"] == overage == (await world.ledger.account(ACME)).overage_nanos
    assert told[ACME, "covered_nanos"] == charged - overage == 95_000
    assert (told[ACME, "requests"], told[ACME, "completion_tokens"]) == (9, sum(range(9)))
