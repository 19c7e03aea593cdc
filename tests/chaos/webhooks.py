"""Deliver payments and refunds several times and in any order, among thousands of forgeries.

The gateway is a process of its own with a real HTTP server; payments and refunds are made at the offline Dodo.
"""

import asyncio
import random
import socket
from collections import Counter

import httpx

from billing.usage import TenantId
from cluster.dodo_sandbox.server import url_of
from tests.chaos.clients import client_of
from tests.chaos.forgeries import Delivery, forge, malformed
from tests.chaos.gateway_process import GatewaySpec, serve
from tests.chaos.rig import USER_CONFIG, ProcessStarter, Rig, listener, open_rig, open_world, tenant_with
from tests.chaos.table import Row
from tests.support.world import API_KEY, World, delivery

NAME = "webhooks"
TENANTS = tuple(f"tenant-{number}" for number in range(6))
PAYMENTS, COPIES = 30, 5
FORGED, MALFORMED = 10_000, 500
AT_ONCE = 16
CENT = 10_000_000
"""Nanos of credit for a cent of a pack."""
AUTH = {"Authorization": f"Bearer {API_KEY}"}
SEED = 20_261_129


def run() -> list[Row]:
    starter = ProcessStarter("tests.chaos.gateway_process")
    with open_rig() as rig, listener() as bound:
        return asyncio.run(_run(rig, starter, bound))


async def _run(rig: Rig, starter: ProcessStarter, bound: socket.socket) -> list[Row]:
    gateway = starter.start(serve, GatewaySpec(rig.store_url, rig.folder, rig.environ, USER_CONFIG), bound)
    chance = random.Random(SEED)
    async with open_world(rig) as world, client_of(url_of(bound), AT_ONCE) as client:
        for name in TENANTS:
            await tenant_with(world, name, 0)
        model, genuine = await _trade(world, chance)
        copies = genuine * COPIES
        false = [forge(chance.choice(genuine), chance) for _ in range(FORGED)]
        odd = [malformed(chance, number) for number in range(MALFORMED)]
        answers = await _deliver(client, [*copies, *false, *odd], chance)
        assert gateway.exitcode is None, "the gateway ended"
        gateway.kill()
        off = {name: await _balance(world, name) - model[name] for name in TENANTS}
    _check(answers, copies, false, odd)
    difference = sum(map(abs, off.values()))
    missing, given_twice = sum(one < 0 for one in off.values()), sum(one > 0 for one in off.values())
    return [
        Row(f"webhooks delivered {COPIES} times, in any order", len(copies), missing, given_twice, difference),
        Row("forged or malformed webhooks", len(false) + len(odd), 0, _accepted(answers, false), difference),
    ]


async def _trade(world: World, chance: random.Random) -> tuple[Counter[str], list[Delivery]]:
    """Buy and refund at Dodo; returns the balance that each tenant must end with, and a delivery of each event."""
    model: Counter[str] = Counter()
    deliveries: list[Delivery] = []
    for number in range(PAYMENTS):
        name = chance.choice(TENANTS)
        payment = await world.buy(name, "pack:small", quantity=chance.randint(1, 3))
        cents = int(str(payment["total_amount"]))
        model[name] += cents * CENT
        deliveries.append(delivery("payment.succeeded", payment, f"msg_pay_{number}"))
        if number % 2:
            back = chance.randint(1, cents)
            refund = await _refund(world, str(payment["payment_id"]), back)
            model[name] -= back * CENT
            deliveries.append(delivery("refund.succeeded", refund, f"msg_refund_{number}"))
    return model, deliveries


async def _refund(world: World, payment_id: str, cents: int) -> dict[str, object]:
    lines = (await world.operator.get(f"/payments/{payment_id}/line-items", headers=AUTH)).json()
    items = [{"item_id": lines["items"][0]["items_id"], "amount": cents}]
    made = await world.operator.post("/refunds", json={"payment_id": payment_id, "items": items}, headers=AUTH)
    made.raise_for_status()
    refund: dict[str, object] = made.json()
    return refund


async def _deliver(client: httpx.AsyncClient, all_: list[Delivery], chance: random.Random) -> dict[int, int]:
    """Send every delivery, shuffled, several at a time; returns the statuses by index."""
    gate, answers = asyncio.Semaphore(AT_ONCE), dict[int, int]()

    async def one(place: int) -> None:
        body, headers = all_[place]
        wire = {name: value.encode() for name, value in headers.items()}
        async with gate:
            answers[place] = (await client.post("/webhooks/dodo", content=body, headers=wire)).status_code

    places = list(range(len(all_)))
    chance.shuffle(places)
    await asyncio.gather(*(one(place) for place in places))
    return answers


def _check(answers: dict[int, int], copies: list[Delivery], false: list[Delivery], odd: list[Delivery]) -> None:
    statuses = [answers[place] for place in range(len(answers))]
    genuine, forged, rest = statuses[: len(copies)], statuses[len(copies) : -len(odd)], statuses[-len(odd) :]
    assert set(genuine) == {200}, f"a genuine delivery was not accepted: {Counter(genuine)}"
    assert all(400 <= status < 500 for status in forged), f"a forgery was not refused: {Counter(forged)}"
    assert all(status < 500 for status in rest), f"a malformed delivery was answered 5xx: {Counter(rest)}"
    assert len(forged) == len(false)


def _accepted(answers: dict[int, int], false: list[Delivery]) -> int:
    first = len(answers) - MALFORMED - len(false)
    return sum(answers[place] < 300 for place in range(first, first + len(false)))


async def _balance(world: World, name: str) -> int:
    return (await world.ledger.account(TenantId(name))).balance_nanos
