"""More requests than credit: a thousand clients at once on two gateways, and many rivals for credit for one call.

The gateways are processes of their own with real HTTP servers and scripted engines.
"""

import asyncio
import socket
from collections import Counter

from billing.ledger.account import Funding, Hold, HoldRequest, Settlement
from billing.ledger.errors import CreditOnHold, InsufficientCredits
from billing.ledger.ledger import Ledger
from billing.pricing.prices import Price
from billing.store.connection import connect
from billing.usage import RequestId, Status, TenantId, Usage
from cluster.dodo_sandbox.server import url_of
from tests.chaos.clients import Seen, ask, chat, client_of
from tests.chaos.gateway_process import GatewaySpec, serve
from tests.chaos.proof import Books, close_books
from tests.chaos.rig import USER_CONFIG, ProcessStarter, Rig, listener, open_rig, open_world, tenant_with
from tests.chaos.table import Row
from tests.support.world import World

NAME = "races"
CLIENTS, AFFORDABLE, GATEWAYS = 1_000, 50, 2
CALL_NANOS = 10_000_000
"""What one call of ``flat`` costs."""
TOKENS, ASKED_TOKENS = 16, 64
ANSWER_NANOS = Price.model_validate({"output_per_1m": "1777.777777"}).charge(Usage(completion_tokens=TOKENS))
ROUNDS, RIVALS, COPIES = 100, 30, 3


def run() -> list[Row]:
    starter = ProcessStarter("tests.chaos.gateway_process")
    with open_rig() as rig, listener() as bound:
        return asyncio.run(_run(rig, starter, bound))


async def _run(rig: Rig, starter: ProcessStarter, bound: socket.socket) -> list[Row]:
    spec = GatewaySpec(rig.store_url, rig.folder, rig.environ, USER_CONFIG, tokens=TOKENS, token_s=0.001, lease_s=30)
    gateways = [starter.start(serve, spec, bound) for _ in range(GATEWAYS)]
    async with open_world(rig) as world:
        rows = [await _fixed_price(world, bound), await _by_tokens(world, bound)]
        for gateway in gateways:
            assert gateway.exitcode is None, "a gateway ended"
            gateway.kill()
        return [*rows, await _last_credit(world, rig)]


async def _fixed_price(world: World, bound: socket.socket) -> Row:
    """Exactly the requests that the credit pays for are answered; all others get a refusal."""
    key = await tenant_with(world, "fixed", AFFORDABLE * CALL_NANOS)
    seen = await _all_at_once(bound, key, chat("flat", 4))
    answered, denied = seen.statuses[200], seen.statuses[402] + seen.statuses[429]
    assert (answered + denied, seen.cut) == (CLIENTS, 0), f"{seen.statuses}, {seen.cut} cut"
    assert set(seen.codes) <= {"insufficient_credits", "credit_on_hold"}, seen.codes
    books = await close_books(world)
    await _check_spent(world, books, "fixed", AFFORDABLE * CALL_NANOS)
    row = books.row(f"{CLIENTS:,} clients, {AFFORDABLE} affordable calls", CLIENTS, seen.receipts)
    missing, too_many = max(0, AFFORDABLE - answered), max(0, answered - AFFORDABLE)
    return Row(row.name, row.tries, row.lost + missing, row.doubled + too_many, row.difference_nanos)


async def _by_tokens(world: World, bound: socket.socket) -> Row:
    """With a price per token holds are extended until the credit ends; the charges never exceed the credit."""
    credit = AFFORDABLE * ANSWER_NANOS + 1
    key = await tenant_with(world, "tokens", credit)
    seen = await _all_at_once(bound, key, chat("pirate", ASKED_TOKENS))
    assert (seen.statuses[200] + seen.statuses[402] + seen.statuses[429], seen.cut) == (CLIENTS, 0), seen.statuses
    assert min(seen.tokens) < TOKENS, "no answer was truncated by the credit"
    books = await close_books(world)
    await _check_spent(world, books, "tokens", credit)
    return books.row(f"{CLIENTS:,} clients, priced by tokens", CLIENTS, seen.receipts)


async def _all_at_once(bound: socket.socket, key: str, body: dict[str, object]) -> Seen:
    seen = Seen()
    async with client_of(url_of(bound), CLIENTS) as client:
        await asyncio.gather(*(ask(client, key, body, seen) for _ in range(CLIENTS)))
    return seen


async def _check_spent(world: World, books: Books, tenant: str, credit: int) -> None:
    """The charges and the balance add up to the credit granted, and the balance is not negative."""
    charged = sum(record.charged_nanos for record in books.records if record.tenant == tenant)
    left = (await world.ledger.account(TenantId(tenant))).balance_nanos
    assert left >= 0, f"the balance of {tenant} is negative: {left}"
    assert charged + left == credit, f"{tenant} had {credit}, was charged {charged} and has {left}"


async def _last_credit(world: World, rig: Rig) -> Row:
    """Credit for one call and thirty rivals, every operation sent three times over connections of its own."""
    ledgers = [Ledger(await connect(rig.store_url)) for _ in range(COPIES)]
    winners: Counter[int] = Counter()
    applied: Counter[int] = Counter()
    receipts: dict[str, int] = {}
    for number in range(ROUNDS):
        tenant = f"last-{number}"
        await tenant_with(world, tenant, CALL_NANOS)
        asked = [_request(tenant, rival) for rival in range(RIVALS)]
        held = await asyncio.gather(*(_hold(ledger, one) for one in asked for ledger in ledgers))
        won = {hold.request.request_id for hold in held if hold is not None}
        winners[number] = len(won)
        for request_id in won:
            settlement = _settlement(request_id, asked[0])
            copies = await asyncio.gather(*(ledger.settle(settlement) for ledger in ledgers))
            applied[number] += sum(not receipt.is_repeat for receipt in copies)
            receipts |= {receipt.record.record_id: int(receipt.record.charged_nanos) for receipt in copies}
    books = await close_books(world)
    row = books.row(f"last credit, every operation {COPIES} times", ROUNDS, receipts)
    lost = sum(winners[number] == 0 for number in range(ROUNDS))
    doubled = sum(max(0, counts[number] - 1) for counts in (winners, applied) for number in range(ROUNDS))
    return Row(row.name, ROUNDS, row.lost + lost, row.doubled + doubled, row.difference_nanos)


async def _hold(ledger: Ledger, request: HoldRequest) -> Hold | None:
    try:
        return await ledger.hold(request)
    except (InsufficientCredits, CreditOnHold):
        return None


def _settlement(request_id: RequestId, like: HoldRequest) -> Settlement:
    return Settlement(request_id, like.tenant, Usage(1), like.price.charge(Usage(1)), Status.COMPLETE)


def _request(tenant: str, rival: int) -> HoldRequest:
    return HoldRequest(
        request_id=RequestId(f"req_{tenant}_{rival}"),
        tenant=TenantId(tenant),
        key_id="key",
        model="flat",
        adapter="flat",
        adapter_class="default",
        plan="prepaid",
        price=Price.model_validate({"per_request": "0.01"}),
        prompt_tokens=1,
        max_tokens=1,
        funding=Funding(),
    )
