"""One key at 60 requests a minute, burst 6, through four gateways, and twenty clients who never wait as they are told.

When a request was admitted is read by the store's clock from each gateway's own log. It runs in real time, three
minutes: the store's clock rules, and nobody can move that.
"""

import asyncio
import random
import socket
from bisect import bisect_left

from cluster.dodo_sandbox.server import url_of
from tests.chaos.clients import Seen, ask_until, chat
from tests.chaos.gateway_process import HOLDS, GatewaySpec, serve
from tests.chaos.house import USER_CONFIG, Forks, House, house, listener, tenant_with, world
from tests.chaos.proof import close_books
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
    forks = Forks("tests.chaos.gateway_process")
    with house() as at, listener() as bound:
        return asyncio.run(_run(at, forks, bound, SECONDS))


async def _run(at: House, forks: Forks, bound: socket.socket, seconds: float) -> list[Row]:
    spec = GatewaySpec(at.store_url, at.folder, at.environ, CONFIG, tokens=1, token_s=0.0)
    gateways = [forks.start(serve, spec, bound) for _ in range(GATEWAYS)]
    async with world(at) as there:
        key = await tenant_with(there, TENANT, CREDIT)
        seen, stopped = Seen(), asyncio.Event()
        load = asyncio.create_task(ask_until(stopped, url_of(bound), [key], seen, CLIENTS, 1, _small_chat))
        await asyncio.sleep(seconds)
        stopped.set()
        await load
        assert set(seen.statuses) == {200, 429}, seen.statuses
        assert set(seen.codes) == {"rate_limit_exceeded"}, seen.codes
        books = await close_books(there)
    for gateway in gateways:
        assert gateway.exitcode is None, "a gateway survives its clients"
        gateway.kill()
    held = sorted(int(line) for line in (at.folder / HOLDS).read_text().split())
    assert len(held) == seen.statuses[200], "each answer was admitted once"
    row = books.row(
        f"one key at {PER_MINUTE} requests a minute, {GATEWAYS} gateways", seen.statuses.total(), seen.receipts
    )
    return [Row(row.name, row.tries, row.lost + _too_few(held), row.doubled + _too_many(held), row.drift_nanos)]


def _small_chat(_: random.Random) -> dict[str, object]:
    return chat("flat", 1)


def _too_many(held: list[int]) -> int:
    """By how many the fullest sliding minute is above the limit and its burst."""
    fullest = max(bisect_left(held, start + MINUTE_MS) - number for number, start in enumerate(held))
    return max(0, fullest - PER_MINUTE - BURST)


def _too_few(held: list[int]) -> int:
    """By how many the long run, after its first burst, is more than one a minute away from the limit."""
    minutes = (held[-1] - held[0]) / MINUTE_MS
    assert minutes > 1, "too short to tell"
    steady = (len(held) - BURST) / minutes
    print(f"{len(held)} admitted in {minutes * 60:.1f} s: {steady:.2f} a minute after the burst")
    return 0 if abs(steady - PER_MINUTE) <= 1 else max(1, round(abs(steady - PER_MINUTE)))
