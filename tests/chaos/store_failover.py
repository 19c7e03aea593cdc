"""Kill or stop the primary under load while its replica lags: what it acknowledged last is lost, and sent again.

To make the lag, the replica is stopped and its connection cut, so that all that is acknowledged from then on, holds
included, exists on the primary alone. Each failover must lose something, or the scenario fails. A primary that was only
stopped comes back and still takes itself for the primary: no gateway may write to it.
"""

import asyncio
import random
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from redis.asyncio import Redis
from redis.crc import key_slot

from billing.ledger.ledger import Ledger
from billing.ledger.replay import Recent, Replay
from billing.store.connection import connect, identity, verify
from billing.store.errors import StoreUnavailable
from billing.store.keys import shard_for
from billing.usage import TenantId
from tests.chaos.store_load import PATIENCE_S, Fault, Load, until_served
from tests.chaos.table import Row
from tests.support.fleet import SLOTS, Fleet, Server, cluster, follow, wait_until, watched

NAME = "store-failover"
FAILOVERS, GATEWAYS = 3, 2
NODES = 3
LAG_S = 0.4
SEED = 20_261_131


@dataclass
class Gateway:
    """What a gateway process uses of the store."""

    redis: Redis
    ledger: Ledger
    replay: Replay
    load: Load

    @classmethod
    async def open(cls, url: str, load: Load) -> "Gateway":
        redis, recent = await connect(url), Recent()
        ledger = Ledger(redis, on_done=recent.note)
        return cls(redis, ledger, Replay(ledger, recent, partial(identity, redis), partial(verify, redis)), load)


@dataclass
class Pair:
    """A primary and its replica. The primary is killed, or stopped where ``is_killed`` is false."""

    primary: Server
    replica: Server
    is_killed: bool

    async def lag_and_fail(self) -> None:
        """Let the primary acknowledge for a while what its replica does not have; then kill or stop it."""
        self.replica.send(signal.SIGSTOP)
        with self.primary.client as client:
            client.client_kill_filter(_type="replica")
        await asyncio.sleep(LAG_S)
        if self.is_killed:
            self.primary.kill()
        else:
            self.primary.send(signal.SIGSTOP)
        self.replica.send(signal.SIGCONT)

    def in_step(self) -> bool:
        with self.primary.client as client:
            return int(client.wait(1, 100)) == 1


def run() -> list[Row]:
    return [_behind_sentinels("killed"), _behind_sentinels("hung"), _in_a_cluster()]


def _behind_sentinels(how: str) -> Row:
    found, tries = Fault(), FAILOVERS if how == "killed" else 1
    with tempfile.TemporaryDirectory(prefix="fb") as name, watched(Path(name)) as fleet:
        for number in range(tries):
            pair = Pair(*fleet.servers, is_killed=how == "killed")
            found += asyncio.run(_fail_over(fleet, pair, f"{how}{number}"))
            if pair.is_killed:
                follow(pair.primary, pair.replica)
            fleet.servers = [pair.replica, pair.primary]
    return found.row(f"primary {how} ahead of its replica (sentinels)", tries)


def _in_a_cluster() -> Row:
    found = Fault()
    with tempfile.TemporaryDirectory(prefix="fb") as name, cluster(Path(name), NODES, replicas=1) as fleet:
        for number in range(NODES - 1):
            pair = Pair(fleet.servers[number], fleet.servers[NODES + number], is_killed=True)
            found += asyncio.run(_fail_over(fleet, pair, f"node{number}", partial(_is_on_node, number)))
            pair.primary.start().await_answer()
            wait_until(partial(_is_replica, pair.primary), "an old primary that follows")
    return found.row("primary killed ahead of its replica (cluster)", NODES - 1)


async def _fail_over(fleet: Fleet, pair: Pair, name: str, fits: Callable[[TenantId], bool] = lambda _: True) -> Fault:
    loads = [Load(f"{name}g{n}", random.Random(f"{SEED}:{name}:{n}"), fits) for n in range(GATEWAYS)]
    gateways = [await Gateway.open(fleet.url, load) for load in loads]
    for gateway in gateways:
        await gateway.load.open(gateway.ledger)
        await gateway.replay.watch_once()
    await asyncio.to_thread(wait_until, pair.in_step, "a replica in step")
    using = [asyncio.create_task(gateway.load.run(gateway.ledger)) for gateway in gateways]
    for load in loads:
        await load.under_way()
    await pair.lag_and_fail()
    await asyncio.gather(*using)
    await asyncio.gather(*(_served(gateway) for gateway in gateways))
    lost = [await gateway.load.missing(gateway.redis) for gateway in gateways]
    assert sum(lost), "the failover lost nothing"
    if not pair.is_killed:
        pair.primary.send(signal.SIGCONT)
    for gateway in gateways:
        await gateway.load.finish(gateway.ledger)
        assert await _sent_again(gateway.replay), "another primary answers, and nothing was sent again"
    if not pair.is_killed:
        await _use_beside(pair.primary, gateways)
    found = [await gateway.load.audit(gateway.redis, gateway.ledger) for gateway in gateways]
    for gateway in gateways:
        await gateway.redis.aclose()
    return sum(found, Fault())


async def _served(gateway: Gateway) -> None:
    for tenant in gateway.load.tenants:
        await until_served(gateway.ledger, tenant)


async def _sent_again(replay: Replay) -> int:
    deadline = asyncio.get_running_loop().time() + PATIENCE_S
    while True:
        try:
            return await replay.watch_once()
        except StoreUnavailable:
            assert asyncio.get_running_loop().time() < deadline, "the store did not come back"
            await asyncio.sleep(0.05)


async def _use_beside(old: Server, gateways: list[Gateway]) -> None:
    """Use the ledger while the old primary still takes itself for the primary, until it follows the new one."""
    for gateway in gateways:
        gateway.load.is_over = False
    using = [asyncio.create_task(gateway.load.run(gateway.ledger)) for gateway in gateways]
    await asyncio.sleep(1)
    for gateway in gateways:
        gateway.load.is_over = True
    await asyncio.gather(*using)
    await asyncio.to_thread(wait_until, partial(_is_replica, old), "an old primary that follows")


def _is_replica(server: Server) -> bool:
    with server.client as client:
        info = client.info("replication")
    return bool(info["role"] == "slave" and info["master_link_status"] == "up")


def _is_on_node(number: int, tenant: TenantId) -> bool:
    return bool(key_slot(shard_for(tenant).tag.encode()) * NODES // SLOTS == number)
