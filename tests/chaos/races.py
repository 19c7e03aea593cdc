"""More clients than credit: a thousand at once through two real gateways, and the last credit a hundred times.

The gateways are processes of the same parts behind real HTTP servers, with an engine of clockwork.
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
from tests.chaos.house import USER_CONFIG, Forks, House, house, listener, tenant_with, world
from tests.chaos.proof import Books, close_books
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
    forks = Forks("tests.chaos.gateway_process")
    with house() as at, listener() as bound:
        return asyncio.run(_run(at, forks, bound))


async def _run(at: House, forks: Forks, bound: socket.socket) -> list[Row]:
    spec = GatewaySpec(at.store_url, at.folder, at.environ, USER_CONFIG, tokens=TOKENS, token_s=0.001, lease_s=30)
    gateways = [forks.start(serve, spec, bound) for _ in range(GATEWAYS)]
    async with world(at) as there:
        rows = [await _fixed_price(there, bound), await _by_tokens(there, bound)]
        for gateway in gateways:
            assert gateway.exitcode is None, "a gateway survives its clients"
            gateway.kill()
        return [*rows, await _last_credit(there, at)]


async def _fixed_price(there: World, bound: socket.socket) -> Row:
    """Exactly those that can be paid for are answered; everybody else is told why not."""
    key = await tenant_with(there, "fixed", AFFORDABLE * CALL_NANOS)
    seen = await _all_at_once(bound, key, chat("flat", 4))
    answered, denied = seen.statuses[200], seen.statuses[402] + seen.statuses[429]
    assert (answered + denied, seen.cut) == (CLIENTS, 0), f"{seen.statuses}, {seen.cut} cut"
    assert set(seen.codes) <= {"insufficient_credits", "credit_on_hold"}, seen.codes
    books = await close_books(there)
    await _check_spent(there, books, "fixed", AFFORDABLE * CALL_NANOS)
    row = books.row(f"{CLIENTS:,} clients, {AFFORDABLE} affordable calls", CLIENTS, seen.receipts)
    missing, too_many = max(0, AFFORDABLE - answered), max(0, answered - AFFORDABLE)
    return Row(row.name, row.tries, row.lost + missing, row.doubled + too_many, row.drift_nanos)


async def _by_tokens(there: World, bound: socket.socket) -> Row:
    """Priced by tokens, holds grow step by step until the credit ends: what is charged is never more than there was."""
    credit = AFFORDABLE * ANSWER_NANOS + 1
    key = await tenant_with(there, "tokens", credit)
    seen = await _all_at_once(bound, key, chat("pirate", ASKED_TOKENS))
    assert (seen.statuses[200] + seen.statuses[402] + seen.statuses[429], seen.cut) == (CLIENTS, 0), seen.statuses
    assert min(seen.tokens) < TOKENS, "some answers ended where the credit did"
    books = await close_books(there)
    await _check_spent(there, books, "tokens", credit)
    return books.row(f"{CLIENTS:,} clients, priced by tokens", CLIENTS, seen.receipts)


async def _all_at_once(bound: socket.socket, key: str, body: dict[str, object]) -> Seen:
    seen = Seen()
    async with client_of(url_of(bound), CLIENTS) as client:
        await asyncio.gather(*(ask(client, key, body, seen) for _ in range(CLIENTS)))
    return seen


async def _check_spent(there: World, books: Books, tenant: str, credit: int) -> None:
    """Charges and what is left are together what there was, and no charge went below zero."""
    charged = sum(record.charged_nanos for record in books.records if record.tenant == tenant)
    left = (await there.ledger.account(TenantId(tenant))).balance_nanos
    assert left >= 0, f"{tenant} was let below zero: {left}"
    assert charged + left == credit, f"{tenant} had {credit}, was charged {charged} and has {left}"


async def _last_credit(there: World, at: House) -> Row:
    """Credit for one call, thirty rivals, every operation sent three times over connections of its own."""
    ledgers = [Ledger(await connect(at.store_url)) for _ in range(COPIES)]
    winners: Counter[int] = Counter()
    applied: Counter[int] = Counter()
    receipts: dict[str, int] = {}
    for number in range(ROUNDS):
        tenant = f"last-{number}"
        await tenant_with(there, tenant, CALL_NANOS)
        asked = [_request(tenant, rival) for rival in range(RIVALS)]
        held = await asyncio.gather(*(_hold(ledger, one) for one in asked for ledger in ledgers))
        won = {hold.request.request_id for hold in held if hold is not None}
        winners[number] = len(won)
        for request_id in won:
            settlement = _settlement(request_id, asked[0])
            told = await asyncio.gather(*(ledger.settle(settlement) for ledger in ledgers))
            applied[number] += sum(not receipt.is_repeat for receipt in told)
            receipts |= {receipt.record.record_id: int(receipt.record.charged_nanos) for receipt in told}
    books = await close_books(there)
    row = books.row(f"last credit, every operation {COPIES} times", ROUNDS, receipts)
    lost = sum(winners[number] == 0 for number in range(ROUNDS))
    doubled = sum(max(0, counts[number] - 1) for counts in (winners, applied) for number in range(ROUNDS))
    return Row(row.name, ROUNDS, row.lost + lost, row.doubled + doubled, row.drift_nanos)


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
