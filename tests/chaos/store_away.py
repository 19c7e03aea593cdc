"""Kill or stop the store: every new request is refused in time, and served again soon after the store is back.

``lost`` counts requests that got no answer in time, or none after the store was back; ``doubled`` counts requests that
were admitted while the store could not write.
"""

import asyncio
import os
import random
import signal
import tempfile
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from billing.ledger.account import HoldRequest
from billing.ledger.ledger import Ledger
from billing.store.cluster import Cluster
from billing.store.connection import connect
from billing.store.errors import StoreUnavailable
from billing.store.keys import shard_for
from billing.usage import TenantId
from cluster import valkey
from tests.chaos.store_load import Fault, Load, until_served
from tests.chaos.table import Row
from tests.support.fleet import Fleet, cluster

NAME = "store-away"
OUTAGES = 5
PROBES = 20
REFUSED_S, BACK_S = 0.3, 2.0
SLACK_S = 0.3
"""What scenarios that run at the same time on the same cores may add to either."""
SEED = 20_261_130


def run() -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="fb") as name, tempfile.TemporaryDirectory(prefix="fb") as other:
        rows = [asyncio.run(_outages(f"store {how}", Path(name), how)) for how in ("killed", "hung")]
        with cluster(Path(other)) as fleet:
            return [*rows, asyncio.run(_hung_nodes(fleet))]


async def _outages(name: str, folder: Path, how: str) -> Row:
    server, found = valkey.start(folder), Fault()
    redis = await connect(server.url)
    await redis.flushall()
    ledger, chance = Ledger(redis), random.Random(f"{SEED}:{name}")
    for number in range(OUTAGES):
        load = Load(f"{how}{number}", chance)
        await load.open(ledger)
        using = asyncio.create_task(load.run(ledger))
        await load.under_way()
        _take_away(server, how)
        await using
        asked = [load.next_request() for _ in range(PROBES)]
        found += await _all_refused(ledger, asked)
        if how == "killed":
            server = valkey.start(folder)
        else:
            os.kill(server.pid, signal.SIGCONT)
        found += await _served_again(redis, ledger, load, asked)
    await redis.aclose()
    server.stop()
    return found.row(name, OUTAGES)


def _take_away(server: valkey.Valkey, how: str) -> None:
    if how == "killed":
        server.kill()
    else:
        os.kill(server.pid, signal.SIGSTOP)


async def _all_refused(ledger: Ledger, asked: list[HoldRequest]) -> Fault:
    """Send a burst of new requests while the store is down: all are refused in time."""
    answers = await asyncio.gather(*(_time(ledger.hold(request)) for request in asked))
    slow = sum(seconds > REFUSED_S + SLACK_S for _, seconds in answers)
    return Fault(lost=slow, doubled=sum(is_answered for is_answered, _ in answers))


async def _time(call: Coroutine[Any, Any, object]) -> tuple[bool, float]:
    started = time.monotonic()
    try:
        await call
    except StoreUnavailable:
        return False, time.monotonic() - started
    return True, time.monotonic() - started


async def _served_again(redis: Redis, ledger: Ledger, load: Load, refused: Sequence[HoldRequest] = ()) -> Fault:
    late = max([await until_served(ledger, tenant) for tenant in load.tenants]) > BACK_S + SLACK_S
    await load.finish(ledger)
    await load.void(ledger, refused)
    return Fault(lost=int(late)) + await load.audit(redis, ledger)


async def _hung_nodes(fleet: Fleet) -> Row:
    """Stop one node of three: its tenants are refused in time, and the others are served."""
    redis, found = await connect(fleet.url), Fault()
    ledger, chance = Ledger(redis), random.Random(f"{SEED}:nodes")
    for number in range(OUTAGES):
        load = Load(f"node{number}", chance)
        await load.open(ledger)
        hung = fleet.servers[number % len(fleet.servers)]
        hung.send(signal.SIGSTOP)
        answers = await asyncio.gather(*(_time(ledger.account(tenant)) for tenant in load.tenants * 5))
        hung.send(signal.SIGCONT)
        for tenant, (is_answered, seconds) in zip(load.tenants * 5, answers, strict=True):
            is_there = _port_of(redis, tenant) != hung.port
            found += Fault(lost=int(is_answered != is_there or (not is_there and seconds > REFUSED_S + SLACK_S)))
        found += await _served_again(redis, ledger, load)
    await redis.aclose()
    return found.row("node of a cluster hung", OUTAGES)


def _port_of(redis: Redis, tenant: TenantId) -> int:
    assert isinstance(redis, Cluster)
    node = redis.owner(("GET", shard_for(tenant).tag))
    assert node is not None
    return node.port
