"""One key limited to 60 requests a minute, burst 6, through four gateways, with 20 clients that ignore Retry-After.

Each gateway logs when it admitted a request, by the store's clock. The scenario takes three minutes of real time,
because the store's clock cannot be moved.
"""

import asyncio
import random
import socket
from bisect import bisect_left

from cluster.dodo_sandbox.server import url_of
from tests.chaos.clients import Seen, ask_until, chat
from tests.chaos.gateway_process import HOLDS, GatewaySpec, serve
from tests.chaos.proof import close_books
from tests.chaos.rig import USER_CONFIG, ProcessStarter, Rig, listener, open_rig, open_world, tenant_with
from tests.chaos.table import Row

NAME = "limits"
SECONDS = 185.0
GATEWAYS, CLIENTS, PER_MINUTE, BURST = 4, 20, 60, 6
MINUTE_MS = 60_000
TENANT = "limited"
CREDIT = 10**12
CONFIG = USER_CONFIG | {
    "plans": {"prepaid": {"kind": "prepaid", "limits": {"requests_per_minute": PER_MINUTE, "burst": BURST}}}
}


def run() -> list[Row]:
    starter = ProcessStarter("tests.chaos.gateway_process")
    with open_rig() as rig, listener() as bound:
        return asyncio.run(_run(rig, starter, bound, SECONDS))


async def _run(rig: Rig, starter: ProcessStarter, bound: socket.socket, seconds: float) -> list[Row]:
    spec = GatewaySpec(rig.store_url, rig.folder, rig.environ, CONFIG, tokens=1, token_s=0.0)
    gateways = [starter.start(serve, spec, bound) for _ in range(GATEWAYS)]
    async with open_world(rig) as world:
        key = await tenant_with(world, TENANT, CREDIT)
        seen, stopped = Seen(), asyncio.Event()
        load = asyncio.create_task(ask_until(stopped, url_of(bound), [key], seen, CLIENTS, 1, _small_chat))
        await asyncio.sleep(seconds)
        stopped.set()
        await load
        assert set(seen.statuses) == {200, 429}, seen.statuses
        assert set(seen.codes) == {"rate_limit_exceeded"}, seen.codes
        books = await close_books(world)
    for gateway in gateways:
        assert gateway.exitcode is None, "a gateway ended"
        gateway.kill()
    held = sorted(int(line) for line in (rig.folder / HOLDS).read_text().split())
    assert len(held) == seen.statuses[200], "the holds are not as many as the answers"
    row = books.row(
        f"one key at {PER_MINUTE} requests a minute, {GATEWAYS} gateways", seen.statuses.total(), seen.receipts
    )
    return [Row(row.name, row.tries, row.lost + _too_few(held), row.doubled + _too_many(held), row.difference_nanos)]


def _small_chat(_: random.Random) -> dict[str, object]:
    return chat("flat", 1)


def _too_many(held: list[int]) -> int:
    """How many requests the fullest sliding minute has above the limit and its burst."""
    fullest = max(bisect_left(held, start + MINUTE_MS) - number for number, start in enumerate(held))
    return max(0, fullest - PER_MINUTE - BURST)


def _too_few(held: list[int]) -> int:
    """How far the rate after the first burst is from the limit, where that is more than one a minute."""
    minutes = (held[-1] - held[0]) / MINUTE_MS
    assert minutes > 1, "the run was shorter than a minute"
    steady = (len(held) - BURST) / minutes
    print(f"{len(held)} admitted in {minutes * 60:.1f} s: {steady:.2f} a minute after the burst")
    return 0 if abs(steady - PER_MINUTE) <= 1 else max(1, round(abs(steady - PER_MINUTE)))
