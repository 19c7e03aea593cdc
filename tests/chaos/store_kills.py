"""Kill the store with SIGKILL under load, while it writes and while it rewrites its log.

The first look at the books comes before anything is sent again: what was acknowledged must be on disk.
"""

import asyncio
import random
import tempfile
import time
from pathlib import Path

from redis.asyncio import Redis

from billing.ledger.ledger import Ledger
from billing.store.connection import connect
from cluster import valkey
from tests.chaos.store_load import Fault, Load
from tests.chaos.table import Row

NAME = "store-kills"
KILLS = 20
SEED = 20_261_128
KEYS, KEY_DELAY_US = 1_000, 300
"""How many keys a rewrite copies, and how long the server waits after each, so that the kill falls in the rewrite."""


def run() -> list[Row]:
    return [_kill_often("store killed mid-write", False), _kill_often("store killed mid-rewrite", True)]


def _kill_often(name: str, is_rewriting: bool) -> Row:
    chance, found = random.Random(f"{SEED}:{name}"), Fault()
    with tempfile.TemporaryDirectory(prefix="fb") as folder:
        for number in range(KILLS):
            found += asyncio.run(_round(Path(folder), Load(f"r{number}", chance), is_rewriting))
    return found.row(name, KILLS)


async def _round(folder: Path, load: Load, is_rewriting: bool) -> Fault:
    server = valkey.start(folder)
    redis = await connect(server.url)
    await redis.flushall()
    await load.open(ledger := Ledger(redis))
    using = asyncio.create_task(load.run(ledger))
    await load.under_way()
    if is_rewriting:
        await _begin_rewrite(redis)
    await asyncio.sleep(load.chance.uniform(0, 0.15))
    if is_rewriting:
        assert (await redis.info("persistence"))["aof_rewrite_in_progress"] == 1, "the rewrite ended before the kill"
    server.kill()
    await using
    await redis.aclose()
    return await _look_again(folder, load)


async def _look_again(folder: Path, load: Load) -> Fault:
    server = valkey.start(folder)
    redis = await connect(server.url)
    ledger = Ledger(redis)
    lost = await load.missing(redis)
    await load.finish(ledger)
    found = await load.audit(redis, ledger)
    await redis.aclose()
    server.stop()
    return Fault(max(lost, found.lost), found.doubled, found.difference_nanos)


async def _begin_rewrite(redis: Redis) -> None:
    """Begin a rewrite that takes long: it copies many keys slowly."""
    pipe = redis.pipeline(transaction=False)
    for number in range(KEYS):
        pipe.set(f"ballast:{number}", "x")
    await pipe.execute()
    await redis.config_set("rdb-key-save-delay", KEY_DELAY_US)
    deadline = time.monotonic() + 10
    await redis.bgrewriteaof()
    while (await redis.info("persistence"))["aof_rewrite_in_progress"] != 1:
        assert time.monotonic() < deadline, "the rewrite did not begin"
        await asyncio.sleep(0.005)
