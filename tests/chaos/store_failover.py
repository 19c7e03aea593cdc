"""The primary dies mid-load while its replica lags: what it acknowledged last is lost, and each gateway sends it again.

The lag is made: the replica is stopped and its connection cut, so that everything acknowledged from then on exists
on the primary alone, holds included. Each failover must lose something, or it proves nothing.
"""

import asyncio
import random
import signal
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from redis.asyncio import Redis

from billing.redo import Recent, Redo
from billing.store.connection import connect, identity
from billing.store.holds import Ledger
from tests.billing.fleet import Fleet, follow, wait_until, watched
from tests.chaos.store_load import Fault, Load, until_served
from tests.chaos.table import Row

NAME = "store-failover"
FAILOVERS, GATEWAYS = 4, 2
LAG_S = 0.4
SEED = 20_261_131


@dataclass
class Gateway:
    """What a gateway process has of the store."""

    redis: Redis
    ledger: Ledger
    redo: Redo
    load: Load

    @classmethod
    async def open(cls, url: str, load: Load) -> "Gateway":
        redis, recent = await connect(url), Recent()
        ledger = Ledger(redis, on_done=recent.note)
        return cls(redis, ledger, Redo(ledger, recent, partial(identity, redis)), load)


def run() -> list[Row]:
    found = Fault()
    with tempfile.TemporaryDirectory(prefix="fb") as name, watched(Path(name)) as fleet:
        for number in range(FAILOVERS):
            found += asyncio.run(_fail_over(fleet, number))
            follow(fleet.servers[1], fleet.servers[0])
    return [Row("sentinel failover mid-load, replica behind", FAILOVERS, found.lost, found.doubled, found.drift_nanos)]


async def _fail_over(fleet: Fleet, number: int) -> Fault:
    loads = [Load(f"f{number}g{n}", random.Random(f"{SEED}:{number}:{n}")) for n in range(GATEWAYS)]
    gateways = [await Gateway.open(fleet.url, load) for load in loads]
    for gateway in gateways:
        await gateway.load.open(gateway.ledger)
        await gateway.redo.watch_once()
    await asyncio.to_thread(wait_until, lambda: fleet.servers[0].client.wait(1, 100) == 1, "a replica in step")
    using = [asyncio.create_task(gateway.load.run(gateway.ledger)) for gateway in gateways]
    for load in loads:
        await load.under_way()
    await _kill_ahead_of_replica(fleet)
    await asyncio.gather(*using)
    await asyncio.gather(*(until_served(gateway.ledger, gateway.load.tenants[0]) for gateway in gateways))
    lost = [await gateway.load.missing(gateway.redis) for gateway in gateways]
    assert sum(lost), "the failover lost nothing: it proves nothing"
    found = sum([await _recover(gateway) for gateway in gateways], Fault())
    for gateway in gateways:
        await gateway.redis.aclose()
    return found


async def _kill_ahead_of_replica(fleet: Fleet) -> None:
    """For a while the primary is alone with what it acknowledges; then it is gone."""
    primary, replica = fleet.servers
    replica.send(signal.SIGSTOP)
    primary.client.client_kill_filter(_type="replica")
    await asyncio.sleep(LAG_S)
    primary.kill()
    replica.send(signal.SIGCONT)
    fleet.servers = [replica, primary]


async def _recover(gateway: Gateway) -> Fault:
    """Clients retry what was never answered; the gateway sends again what was."""
    await gateway.load.finish(gateway.ledger)
    assert await gateway.redo.watch_once(), "another store answers, and nothing was sent again"
    return await gateway.load.audit(gateway.redis, gateway.ledger)
