"""A gateway killed again and again at one point of a request's course, under load.

Runs in a process of the same parts behind a real HTTP server, with an engine of clockwork.
"""

import asyncio
import random
import socket
from collections import defaultdict
from pathlib import Path

from billing.usage import Status, UsageRecord
from cluster.dodo_sandbox.server import url_of
from tests.chaos.clients import Seen, ask_until
from tests.chaos.fuse import Fuse
from tests.chaos.gateway_process import AFTER_HOLD, AFTER_SETTLE, BEFORE_SETTLE, MID_STREAM, GatewaySpec, serve
from tests.chaos.house import USER_CONFIG, Forks, House, house, listener, tenant_with, world
from tests.chaos.proof import close_books
from tests.chaos.table import Row
from tests.support.world import World

NAME = "gateway-kills"
POINTS = (AFTER_HOLD, MID_STREAM, BEFORE_SETTLE, AFTER_SETTLE)
KILLS = 20
CLIENTS = 16
CREDIT = 1_000 * 10**9
SEED = 20_261_126


def run() -> list[Row]:
    forks = Forks("tests.chaos.gateway_process")
    with house() as at, listener() as bound:
        return asyncio.run(_run(at, forks, bound))


async def _run(at: House, forks: Forks, bound: socket.socket) -> list[Row]:
    rows: list[Row] = []
    async with world(at) as there:
        keys = [await tenant_with(there, f"tenant-{number}", CREDIT) for number in range(4)]
        for point in POINTS:
            rows.append(await _kill_at(point, there, at, forks, bound, keys))
    return rows


async def _kill_at(point: str, there: World, at: House, forks: Forks, bound: socket.socket, keys: list[str]) -> Row:
    seen, stopped, chance = Seen(), asyncio.Event(), random.Random(f"{SEED}:{point}")
    load = asyncio.create_task(ask_until(stopped, url_of(bound), keys, seen, CLIENTS, SEED))
    for _ in range(KILLS):
        fuse = Fuse(point, chance.randint(1, 2 * CLIENTS))
        await forks.live(serve, GatewaySpec(at.store_url, at.folder, at.environ, USER_CONFIG, fuse), bound)
    last = forks.start(serve, GatewaySpec(at.store_url, at.folder, at.environ, USER_CONFIG), bound)
    await asyncio.sleep(1)
    stopped.set()
    await load
    books = await close_books(there)
    last.kill()
    assert seen.receipts, "clients were served between the kills"
    assert seen.cut, "clients were cut off by the kills"
    assert set(seen.statuses) <= {200, 503}, f"nothing but answers and honest refusals: {seen.statuses}"
    _check_expired(books.records, at.folder / "checkpoints.txt")
    return books.row(f"gateway killed {point}", KILLS, seen.receipts)


def _check_expired(records: tuple[UsageRecord, ...], journal: Path) -> None:
    """A request whose gateway died costs its last checkpoint, and that is no older than the last one acknowledged."""
    sent: defaultdict[str, list[int]] = defaultdict(lambda: [0])
    kept: defaultdict[str, int] = defaultdict(int)
    for line in journal.read_text().splitlines():
        word, request_id, nanos = line.split()
        if word == "sent":
            sent[request_id].append(int(nanos))
        else:
            kept[request_id] = int(nanos)
    expired = [record for record in records if record.status is Status.EXPIRED]
    assert expired, "requests were left behind"
    for record in expired:
        assert record.list_nanos in sent[record.request_id][-2:], f"{record} was billed for no checkpoint of its last"
        assert record.list_nanos >= kept[record.request_id], f"{record} was billed less than was delivered and kept"
