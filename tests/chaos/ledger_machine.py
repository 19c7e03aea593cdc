"""The ledger against its model in thousands of long courses: every kind of movement and of failure, in any order.

Half of them on the embedded Valkey and half on redis-server, where that is installed, each in a process of its own.
"""

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from cluster import valkey
from tests.chaos.table import Row
from tests.support.ledger_machine import drive, relax
from tests.support.servers import SYSTEM_REDIS

NAME = "ledger-machine"
EXAMPLES, STEPS = 5_000, 60


def run() -> list[Row]:
    """Half of the examples on each kind of store. The machine raises where ledger and model differ."""
    has_redis = SYSTEM_REDIS.exists()
    kinds = [None, SYSTEM_REDIS if has_redis else None]
    with ProcessPoolExecutor(len(kinds), multiprocessing.get_context("spawn")) as processes:
        steps = sum(processes.map(_drive, kinds))
    return [Row(f"state machine, Valkey{' and redis-server' if has_redis else ''}", steps, 0, 0, 0)]


def _drive(binary: Path | None) -> int:
    examples = EXAMPLES // 2
    with tempfile.TemporaryDirectory(prefix="fb") as folder:
        server = valkey.start(Path(folder), binary)
        try:
            relax(server.url)
            drive(server.url, examples, STEPS)
        finally:
            server.stop()
    return examples * STEPS
