"""Kill a gateway again and again at one point of a request, under load.

The gateway is a process of its own with a real HTTP server and a scripted engine.
"""

import asyncio
import random
import socket
from collections import defaultdict
from pathlib import Path

from billing.usage import Status, UsageRecord
from cluster.dodo_sandbox.server import url_of
from tests.chaos.clients import Seen, ask_until
from tests.chaos.failpoint import Failpoint
from tests.chaos.gateway_process import AFTER_HOLD, AFTER_SETTLE, BEFORE_SETTLE, MID_STREAM, GatewaySpec, serve
from tests.chaos.proof import close_books
from tests.chaos.rig import USER_CONFIG, ProcessStarter, Rig, listener, open_rig, open_world, tenant_with
from tests.chaos.table import Row
from tests.support.world import World

NAME = "gateway-kills"
POINTS = (AFTER_HOLD, MID_STREAM, BEFORE_SETTLE, AFTER_SETTLE)
KILLS = 20
CLIENTS = 16
CREDIT = 1_000 * 10**9
SEED = 20_261_126


def run() -> list[Row]:
    starter = ProcessStarter("tests.chaos.gateway_process")
    with open_rig() as rig, listener() as bound:
        return asyncio.run(_run(rig, starter, bound))


async def _run(rig: Rig, starter: ProcessStarter, bound: socket.socket) -> list[Row]:
    rows: list[Row] = []
    async with open_world(rig) as world:
        keys = [await tenant_with(world, f"tenant-{number}", CREDIT) for number in range(4)]
        for point in POINTS:
            rows.append(await _kill_at(point, world, rig, starter, bound, keys))
    return rows


async def _kill_at(
    point: str, world: World, rig: Rig, starter: ProcessStarter, bound: socket.socket, keys: list[str]
) -> Row:
    seen, stopped, chance = Seen(), asyncio.Event(), random.Random(f"{SEED}:{point}")
    load = asyncio.create_task(ask_until(stopped, url_of(bound), keys, seen, CLIENTS, SEED))
    for _ in range(KILLS):
        failpoint = Failpoint(point, chance.randint(1, 2 * CLIENTS))
        await starter.run_until_killed(
            serve, GatewaySpec(rig.store_url, rig.folder, rig.environ, USER_CONFIG, failpoint), bound
        )
    last = starter.start(serve, GatewaySpec(rig.store_url, rig.folder, rig.environ, USER_CONFIG), bound)
    await asyncio.sleep(1)
    stopped.set()
    await load
    books = await close_books(world)
    last.kill()
    assert seen.receipts, "no client was served between the kills"
    assert seen.cut, "no client was cut off by the kills"
    assert set(seen.statuses) <= {200, 503}, f"answers that are neither 200 nor 503: {seen.statuses}"
    _check_expired(books.records, rig.folder / "checkpoints.txt")
    return books.row(f"gateway killed {point}", KILLS, seen.receipts)


def _check_expired(records: tuple[UsageRecord, ...], journal: Path) -> None:
    """A request whose gateway was killed costs its last acknowledged checkpoint, or a newer one that was sent."""
    sent: defaultdict[str, list[int]] = defaultdict(lambda: [0])
    kept: defaultdict[str, int] = defaultdict(int)
    for line in journal.read_text().splitlines():
        word, request_id, nanos = line.split()
        if word == "sent":
            sent[request_id].append(int(nanos))
        else:
            kept[request_id] = int(nanos)
    expired = [record for record in records if record.status is Status.EXPIRED]
    assert expired, "no request expired"
    for record in expired:
        assert record.list_nanos in sent[record.request_id][-2:], f"{record} costs neither of its last checkpoints"
        assert record.list_nanos >= kept[record.request_id], f"{record} costs less than an acknowledged checkpoint"
