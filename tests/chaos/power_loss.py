"""Cut the power of the store's machine: what no sync has put on disk is lost.

The cut is simulated: ``synced.c``, compiled here and loaded into the server with LD_PRELOAD, writes down after each
successful fsync or fdatasync how long the file was when the sync began. After SIGKILL every file of the data
folder is cut to the last length written down for its inode, or to nothing where it was never synced. That is the
worst that can happen on a disk that keeps what it has acknowledged. As a control, the same is done to a server that
syncs its log once a second: that one must lose acknowledged settles.
"""

import asyncio
import os
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

from billing.ledger.ledger import Ledger
from billing.store.connection import connect
from cluster import valkey
from tests.chaos.store_load import Fault, Load
from tests.chaos.table import Row

NAME = "power-loss"
LOSSES, CONTROLS = 12, 3
SEED = 20_261_129
SOURCE = Path(__file__).parent / "synced.c"


def run() -> list[Row]:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or os.uname().sysname != "Linux":
        print("power-loss is skipped: it needs Linux and a C compiler (gcc or cc) on PATH")
        return []
    with tempfile.TemporaryDirectory(prefix="fb") as name:
        folder = Path(name)
        shim = folder / "synced.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(shim), str(SOURCE)], check=True)
        losses = [_lose(folder / f"t{number}", shim, f"t{number}", "always") for number in range(LOSSES)]
        controls = [_lose(folder / f"c{number}", shim, f"c{number}", "everysec") for number in range(CONTROLS)]
    assert sum(control.lost for control in controls), "the control lost nothing, so the cut has no effect"
    found = sum(losses, Fault())
    return [found.row("power lost under the store", LOSSES)]


def _lose(folder: Path, shim: Path, name: str, policy: str) -> Fault:
    load = Load(name, random.Random(f"{SEED}:{name}"))
    folder.mkdir()
    return asyncio.run(_round(folder / "d", folder / "journal", shim, load, policy))


async def _round(folder: Path, journal: Path, shim: Path, load: Load, policy: str) -> Fault:
    env = {**os.environ, "LD_PRELOAD": str(shim), "SYNCED_JOURNAL": str(journal)}
    server = valkey.start(folder, env=env)
    redis = await connect(server.url)
    await redis.config_set("appendfsync", policy)
    await load.open(ledger := Ledger(redis))
    using = asyncio.create_task(load.run(ledger))
    await load.under_way()
    await asyncio.sleep(load.chance.uniform(0, 0.3) if policy == "always" else 1.5)
    server.kill()
    await using
    await redis.aclose()
    _cut(folder, journal)
    return await _look_again(folder, load, policy)


def _cut(folder: Path, journal: Path) -> None:
    """Cut each file to what was on disk."""
    lines = journal.read_text().splitlines()
    kept = {int(inode): int(length) for inode, length in (line.split() for line in lines)}
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in ("lock", "store.log"):
            stat = path.stat()
            os.truncate(path, min(stat.st_size, kept.get(stat.st_ino, 0)))


async def _look_again(folder: Path, load: Load, policy: str) -> Fault:
    server = valkey.start(folder)
    redis = await connect(server.url)
    lost = await load.missing(redis)
    found = Fault()
    if policy == "always":
        await load.finish(ledger := Ledger(redis))
        found = await load.audit(redis, ledger)
    await redis.aclose()
    server.kill()
    return Fault(max(lost, found.lost), found.doubled, found.difference_nanos)
